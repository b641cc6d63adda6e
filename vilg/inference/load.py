"""Open an export folder for inference."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from vilg.config.schema import ModelConfig
from vilg.errors import UserError
from vilg.inference.format import (
    CONFIG_FILE,
    EXPORT_FORMAT_VERSION,
    GENERATION_FILE,
    IMAGE_TOKENIZER_FOLDER,
    INDEX_FILE,
    TEXT_MODEL_FILE,
)
from vilg.inference.sampling import SamplingConfig
from vilg.model.vilg import Vilg
from vilg.tokens.sequence import SequenceSpec
from vilg.tokens.text import TextTokenizer
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.images import to_float, to_uint8

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Bundle:
    """Everything of one export folder: the model (in evaluation mode), both tokenizers, the default sampling."""

    name: str
    model: Vilg
    spec: SequenceSpec
    text: TextTokenizer
    image: ImageTokenizer
    sampling: SamplingConfig

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of pictures in pixels."""
        return self.spec.grid[0] * self.image.factor, self.spec.grid[1] * self.image.factor

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt. Raises UserError if it is empty or longer than the text segment."""
        ids = self.text.encode(prompt)
        if not ids:
            raise UserError(f"prompt {prompt!r} is empty; write what the picture should show")
        if len(ids) > self.spec.text_slots:
            raise UserError(
                f"prompt {prompt!r} has {len(ids)} tokens, the text segment {self.spec.text_slots}; shorten it"
            )
        return ids

    def prompt_seed(self, prompt: str, seed: int) -> int:
        """Seed of a prompt's candidates: of (seed, prompt) only, so its place in a batch file does not matter."""
        return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:8], "little")

    @torch.inference_mode()
    def decode_images(self, codes: Tensor, *, batch: int = 64) -> np.ndarray:
        """uint8 [I, height, width, 3] of codes int64 [I, N]."""
        grids = codes.view(-1, *self.spec.grid)
        return np.concatenate([to_uint8(self.image.decode(part)) for part in grids.split(batch)])

    @torch.inference_mode()
    def encode_images(self, images: np.ndarray, *, batch: int = 64) -> Tensor:
        """Codes int64 [I, N] of images uint8 [I, height, width, 3]."""
        pixels = to_float(images)
        return torch.cat([self.image.encode(part.to(self.device)).flatten(1) for part in pixels.split(batch)])


def load_model(folder: Path | str, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Bundle:
    """Open an export folder.

    dtype: of the weights; None keeps the stored one on a GPU and uses float32 on a CPU. Reads safetensors and JSON
    only. Raises UserError naming the file that is missing, of another format version, or does not fit.
    """
    folder = Path(folder)
    config = _read_versioned(folder / CONFIG_FILE)
    with _described_by(folder / CONFIG_FILE):
        spec = SequenceSpec(**config["sequence"])
        shape = ModelConfig(**config["model"])
        name, stored_dtype = config["name"], _DTYPES[config["dtype"]]
        expected = {
            TEXT_MODEL_FILE: config["text_tokenizer"]["hash"],
            IMAGE_TOKENIZER_FOLDER: config["image_tokenizer"]["hash"],
        }
    generation = _read_versioned(folder / GENERATION_FILE)
    with _described_by(folder / GENERATION_FILE):
        sampling = SamplingConfig(**{key: value for key, value in generation.items() if key != "format_version"})
    text = TextTokenizer.load(folder / TEXT_MODEL_FILE)
    image = ImageTokenizer.load(folder / IMAGE_TOKENIZER_FOLDER, device=device)
    for what, found in ((TEXT_MODEL_FILE, text.hash), (IMAGE_TOKENIZER_FOLDER, image.hash)):
        if found != expected[what]:
            named = str(expected[what])[:12]
            raise UserError(f"{folder / what}: hash {found[:12]}, but {CONFIG_FILE} names {named}; export again")
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else stored_dtype
    with torch.device("meta"):
        model = Vilg(shape, spec)
    weights = _read_weights(folder, dtype, device)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # names or shapes; torch lists them all
        first = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(
            f"{folder}: the weights do not fit the model of {CONFIG_FILE} ({first[0].strip()}); export again"
        ) from None
    return Bundle(name, model.eval().requires_grad_(False), spec, text, image.eval(), sampling)


@contextmanager
def _described_by(path: Path) -> Iterator[None]:
    """A file that lacks what is read of it, or holds something else there, becomes a UserError that names it."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]!r} is missing or unknown; export the checkpoint again") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise UserError(f"{path}: {problems}; export the checkpoint again") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}; export the checkpoint again") from None


def _read_versioned(path: Path) -> dict[str, Any]:
    """A JSON object of this format version. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected an export folder made by `vilg export`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    version = found.get("format_version") if isinstance(found, dict) else None
    if version != EXPORT_FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version!r}; this vilg reads {EXPORT_FORMAT_VERSION}. "
            "Export the checkpoint again with this version"
        )
    return found


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, as Hugging Face's index files hold it. Raises UserError."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(file, str) and file == os.path.basename(file) for file in names.values())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected an export folder made by `vilg export`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no index of weights ({error}); export the checkpoint again") from None
    if not plain:
        raise UserError(f"{path}: names a file outside its folder; only plain file names are read")
    return names


def _read_weights(folder: Path, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    index = _read_index(folder / INDEX_FILE)
    weights: dict[str, Tensor] = {}
    for name in sorted(set(index.values())):
        path = folder / name
        try:
            shard = load_file(path, device=device)
        except FileNotFoundError:
            raise UserError(f"{path}: shard named by {INDEX_FILE} is missing; copy it, or export again") from None
        except Exception as error:  # safetensors raises its own type for truncated or foreign files
            raise UserError(f"{path}: not a readable safetensors file ({error}); copy it again") from None
        weights.update({key: value.to(dtype) for key, value in shard.items()})
    if missing := sorted(set(index) - set(weights)):
        raise UserError(f"{folder}: {len(missing)} tensors named by {INDEX_FILE} are in no shard, first {missing[0]}")
    return weights
