"""`vilg tokenizer import`: an image tokenizer that others trained becomes a folder of ours.

Strict: every tensor of the file is used or named as left out by design, and every tensor of the network comes from the
file. What comes out has the same codes and pixels as the source (tests/unit/test_vqgan_import.py).
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from vilg.errors import UserError
from vilg.tokens.vqgan.config import ImageTokenizerConfig
from vilg.tokens.vqgan.folder import check_tensors
from vilg.tokens.vqgan.formats import FORMATS, renamed, shape_of, unit_length
from vilg.tokens.vqgan.model import ImageTokenizer
from vilg.tokens.vqgan.pickled import read_untrusted

_DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.bin")
_GROUPS = 32  # of all formats; diffusers' configuration says
# What a diffusers configuration must say for the network to be ours; absent keys have these values there.
_DIFFUSERS_FIXED = {
    "_class_name": "VQModel", "in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_type": "group",
    "mid_block_add_attention": True,
}  # fmt: skip


def import_tokenizer(
    source: Path,
    form: str,
    *,
    image_size: int = 256,
    weights: str | None = None,
    lookup: str | None = None,
    allow_pickled_objects: bool = False,
) -> tuple[ImageTokenizer, dict[str, list[str]]]:
    """The tokenizer in `source`, in eval mode without gradients, and {reason: names} of the tensors left out.

    form: a key of FORMATS. image_size: pixels a side it will be used at. weights: "model" or "ema" of a LlamaGen file,
    default the average if there is one. lookup: another rule than the format's. Raises UserError naming file and problem.
    """
    source = Path(source)
    groups = _GROUPS
    if form == "diffusers":
        source, settings = _diffusers_files(source)
        groups = settings.get("norm_num_groups", _GROUPS)
    content = read_untrusted(source, allow_pickled_objects=allow_pickled_objects)
    lookup = lookup or FORMATS[form].lookup
    try:
        tensors, left_out = renamed(_state_dict(content, form, weights), form)
        config = shape_of(tensors, image_size=image_size, lookup=lookup, groups=groups)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if lookup == "cosine":
        tensors = unit_length(tensors)
    tokenizer = ImageTokenizer(config)
    _check(source, config, tensors, tokenizer)
    tokenizer.load_state_dict(tensors)
    tokenizer.origin = {
        "format": form,
        "file": source.name,
        "sha256": _sha256(source),
        "legacy_beta": FORMATS[form].legacy_beta,
        "left_out": {reason: len(names) for reason, names in left_out.items()},
    }
    return tokenizer.eval().requires_grad_(False), left_out


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _check(source: Path, config: ImageTokenizerConfig, tensors: dict[str, Tensor], tokenizer: ImageTokenizer) -> None:
    try:
        check_tensors(source, tensors, tokenizer.state_dict())
    except UserError as error:
        shape = config.taming
        raise UserError(
            f"{error} (read as ch={shape.ch}, ch_mult={list(shape.ch_mult)}, num_res_blocks={shape.num_res_blocks}, "
            f"factor={config.factor}; names are ours)"
        ) from error


def _state_dict(content: Any, form: str, weights: str | None) -> dict[str, Tensor]:
    """The network's tensors in what a file holds."""
    if not isinstance(content, dict):
        raise UserError(f"holds a {type(content).__name__}, not a mapping of tensors")
    if form == "llamagen":
        known = [key for key in ("ema", "model") if isinstance(content.get(key), dict)]
        if weights and weights not in known:
            raise UserError(f"holds no '{weights}' weights (found: {', '.join(known) or 'none'})")
        content = content[weights or known[0]] if known else content
    elif weights:
        raise UserError(f"--weights is of the format llamagen, not of {form}")
    elif isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(f"not tensors: {', '.join(map(str, others[:6]))}; is it of another format than {form}?")
    return content


def _diffusers_files(source: Path) -> tuple[Path, dict[str, Any]]:
    """Weights and configuration of a diffusers model folder. Raises UserError for a network that is not VQGAN's."""
    path = source / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{source}: not a folder of diffusers: {path.name}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    for key, value in _DIFFUSERS_FIXED.items():
        if settings.get(key, value) != value:
            raise UserError(f"{path}: {key} is {settings[key]!r}; only {value!r} can be imported")
    for name in _DIFFUSERS_WEIGHTS:
        if (source / name).exists():
            return source / name, settings
    raise UserError(f"{source}: holds no weights; looked for {', '.join(_DIFFUSERS_WEIGHTS)}")


def main(argv: list[str] | None = None) -> int:
    """`vilg tokenizer import`."""
    parser = argparse.ArgumentParser(
        prog="vilg tokenizer import",
        description="Turn an image tokenizer trained with taming-transformers, LlamaGen or diffusers into a folder that "
        "every command here takes as an image tokenizer.",
    )
    parser.add_argument("source", type=Path, help="weight file; for diffusers the folder with config.json")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what wrote it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")
    parser.add_argument("--image-size", type=int, default=256, help="pixels a side it will be used at (default 256)")
    parser.add_argument("--weights", choices=("model", "ema"), help="of a LlamaGen file; default: ema if it is there")
    parser.add_argument(
        "--lookup", choices=("euclidean", "cosine"), help="for a network trained otherwise than its format usually is"
    )
    parser.add_argument(
        "--allow-pickled-objects",
        action="store_true",
        help="read a file that holds Python objects besides tensors: known ones are replaced by inert stand-ins, others "
        "refused; nothing is unpickled",
    )
    options = parser.parse_args(argv)
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"{options.out}: is not empty; choose another --out")
    if options.lookup and options.format == "taming-gumbel":
        raise UserError("--lookup: taming-gumbel chooses codes by logits, not by nearness")
    tokenizer, left_out = import_tokenizer(
        options.source,
        options.format,
        image_size=options.image_size,
        weights=options.weights,
        lookup=options.lookup,
        allow_pickled_objects=options.allow_pickled_objects,
    )
    tokenizer.save(options.out)
    config = tokenizer.config
    for reason, names in left_out.items():
        print(f"left out: {len(names)} tensors like {names[0]}: {reason}")
    print(
        f"{options.out}: {sum(p.numel() for p in tokenizer.state_dict().values()) / 1e6:.1f}M values, factor "
        f"{config.factor}, {config.num_codes} codes of width {config.code_dim}, {config.lookup} lookup, "
        f"for {config.image_size} x {config.image_size} pixels ({tokenizer.grid[0]} x {tokenizer.grid[1]} codes)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
