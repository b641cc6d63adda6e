"""An image tokenizer on disk: a folder with `config.json` and `model.safetensors`; other files in it are not looked at.

config.json: {"format": "vilg-image-tokenizer", "format_version": 1, "hash": ..., "model": ImageTokenizerConfig}, and
"origin" of an imported one (format, file and sha256 it came from; for people). The hash covers the network's settings
and every weight; it is checked on loading, so that two files that do not belong together, or a damaged one, are noticed
before they turn pictures into noise.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from vilg.errors import UserError
from vilg.tokens.files import write_atomically
from vilg.tokens.vqgan.config import ImageTokenizerConfig

FORMAT = "vilg-image-tokenizer"
FORMAT_VERSION = 1


def content_hash(config: ImageTokenizerConfig, tensors: Mapping[str, Tensor]) -> str:
    """sha256 in hex over the settings and over name, type, shape and bytes of every tensor, in order of names."""
    digest = hashlib.sha256(config.model_dump_json().encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_folder(
    folder: Path, config: ImageTokenizerConfig, tensors: Mapping[str, Tensor], origin: Mapping[str, Any] | None = None
) -> None:
    """Write both files, each by renaming; the configuration last. origin: of an imported one, where it comes from."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "hash": content_hash(config, tensors),
        "model": config.model_dump(mode="json"),
        **({"origin": dict(origin)} if origin else {}),
    }
    write_atomically(Path(folder) / "model.safetensors", safetensors.torch.save(tensors))
    write_atomically(Path(folder) / "config.json", json.dumps(description, indent=2).encode() + b"\n")


def read_description(folder: Path) -> dict:
    """The content of config.json. Raises UserError if it is missing, no JSON, of another kind or another version."""
    path = Path(folder) / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: not an image tokenizer: {path.name}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise UserError(f"{path}: not an image tokenizer: 'format' is {found!r}, needed {FORMAT!r}")
    if description.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {description.get('format_version')!r} is not known here "
            f"(known: {FORMAT_VERSION}); use the version of vilg that wrote it"
        )
    return description


def read_folder(folder: Path) -> tuple[ImageTokenizerConfig, dict[str, Tensor], dict[str, Any]]:
    """Settings, tensors (on the CPU) and the content of config.json. Raises UserError naming the file at fault."""
    description = read_description(folder)
    try:
        config = ImageTokenizerConfig.model_validate(description.get("model"))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'model'}: {p['msg']}" for p in error.errors())
        raise UserError(f"{Path(folder) / 'config.json'}: {problems}") from error
    path = Path(folder) / "model.safetensors"
    try:
        return config, safetensors.torch.load_file(path), description
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from error


def check_tensors(file: Path, found: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Names, shapes and types must be those of the network. Raises UserError naming the file and six differences."""
    problems = [f"{name} is missing" for name in needed if name not in found]
    problems += [f"{name} is not of this architecture" for name in found if name not in needed]
    for name in sorted(set(found) & set(needed)):
        here, there = found[name], needed[name]
        if here.shape != there.shape or here.dtype != there.dtype:
            problems.append(f"{name} is {here.dtype} {list(here.shape)}, needed {there.dtype} {list(there.shape)}")
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise UserError(f"{file}: {'; '.join(problems[:6])}{more}")
