"""Open an export folder for inference."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from vilg.config.schema import ModelConfig
from vilg.errors import UserError
from vilg.inference.format import (
    CONFIG_FILE,
    EXPORT_FORMAT_VERSION,
    GENERATION_FILE,
    IMAGE_TOKENIZER_FOLDER,
    RECONSTRUCTOR_FOLDER,
    TEXT_MODEL_FILE,
    sampling_of,
)
from vilg.inference.sampling import SamplingConfig
from vilg.inference.texts import TextSegment
from vilg.inference.weights import NO_EXPORT, FolderWeights
from vilg.model.reconstructor import Reconstructor, load_reconstructor
from vilg.model.vilg import Vilg
from vilg.parallel.grid import Grid
from vilg.parallel.layout import full_shape
from vilg.parallel.precision import DTYPE_OF_NAME
from vilg.tokens.sequence import SequenceSpec
from vilg.tokens.text import TextTokenizer
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.images import to_float, to_uint8


@dataclass(frozen=True)
class Bundle:
    """Everything of one export folder: the model (in evaluation mode), both tokenizers, the default sampling;
    of end-to-end training the reconstructor too."""

    name: str
    model: Vilg
    spec: SequenceSpec
    text: TextTokenizer
    image: ImageTokenizer
    sampling: SamplingConfig
    reconstructor: Reconstructor | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of pictures in pixels."""
        return self.spec.grid[0] * self.image.factor, self.spec.grid[1] * self.image.factor

    @property
    def segment(self) -> TextSegment:
        """Fits prompts and questions into the text slots."""
        return TextSegment(self.text, self.spec.text_slots)

    def encode_prompt(self, prompt: str, *, truncate: bool = False) -> list[int]:
        """Token ids of a prompt, at most T; `TextSegment.prompt` says more of one that is cut, and what is raised."""
        return self.segment.prompt(prompt, truncate=truncate).ids

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


@dataclass(frozen=True)
class Description:
    """What config.json says: sizes, stored dtype, and the hashes of both tokenizers ("text", "image")."""

    name: str
    shape: ModelConfig
    spec: SequenceSpec
    dtype: torch.dtype
    tokenizers: dict[str, str]


def read_description(folder: Path) -> Description:
    """Read config.json of an export folder. Raises UserError naming what is missing or of another version."""
    config = _read_versioned(folder / CONFIG_FILE)
    with _described_by(folder / CONFIG_FILE):
        return Description(
            name=config["name"],
            shape=ModelConfig(**config["model"]),
            spec=SequenceSpec(**config["sequence"]),
            dtype=DTYPE_OF_NAME[config["dtype"]],
            tokenizers={kind: str(config[f"{kind}_tokenizer"]["hash"]) for kind in ("text", "image")},
        )


def read_sampling(folder: Path) -> SamplingConfig:
    """How the export draws where nothing else is asked for. Raises UserError."""
    generation = _read_versioned(folder / GENERATION_FILE)
    with _described_by(folder / GENERATION_FILE):
        return sampling_of(generation)


def read_segment(folder: Path) -> TextSegment:
    """The text segment of an export folder, without its weights: texts that do not fit are found in no time. Raises
    UserError."""
    slots = read_description(folder).spec.text_slots
    return TextSegment(TextTokenizer.load(folder / TEXT_MODEL_FILE), slots)


def load_model(
    folder: Path | str, *, device: str = "cpu", dtype: torch.dtype | None = None, grid: Grid | None = None
) -> Bundle:
    """Open an export folder.

    dtype: of the weights; None keeps the stored one on a GPU and uses float32 on a CPU. grid: of tensor-parallel ranks,
    each of which reads and holds its part of the transformer; all of them must then make the same calls. Reads
    safetensors and JSON only. Raises UserError naming the file that is missing, of another format version, or does not
    fit.
    """
    grid = grid or Grid.single()
    folder = Path(folder)
    description = read_description(folder)
    sampling = read_sampling(folder)
    text = TextTokenizer.load(folder / TEXT_MODEL_FILE)
    image = ImageTokenizer.load(folder / IMAGE_TOKENIZER_FOLDER, device=device)
    found = {"text": (TEXT_MODEL_FILE, text.hash), "image": (IMAGE_TOKENIZER_FOLDER, image.hash)}
    for kind, (file, now) in found.items():
        if now != description.tokenizers[kind]:
            named = description.tokenizers[kind][:12]
            raise UserError(f"{folder / file}: hash {now[:12]}, but {CONFIG_FILE} names {named}; export again")
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else description.dtype
    model = empty_model(folder, description, grid=grid)
    weights, part = FolderWeights(folder), dict(rank=grid.tensor_rank, size=grid.tensor_size)
    model.load_state_dict({name: weights.read(name, **part).to(device, dtype) for name in weights.index}, assign=True)
    model = model.eval().requires_grad_(False)
    reconstructor = None
    if description.shape.reconstructor is not None:
        place = folder / RECONSTRUCTOR_FOLDER
        reconstructor = load_reconstructor(place, description.shape, image, description.spec.grid, device)
    return Bundle(description.name, model, description.spec, text, image.eval(), sampling, reconstructor)


def empty_model(folder: Path, description: Description, *, grid: Grid | None = None) -> Vilg:
    """The model that config.json describes, or a rank's part of it, without memory (meta device). Raises UserError, with
    the first difference, unless the weights beside it have its names and shapes, or if it cannot be divided so."""
    grid = grid or Grid.single()
    with torch.device("meta"):
        model = Vilg(description.shape, description.spec, grid=grid)
    found = FolderWeights(folder).shapes
    needed = {
        name: full_shape(name, parameter.shape, size=grid.tensor_size) for name, parameter in model.named_parameters()
    }
    for name in sorted(set(needed) | set(found)):
        if found.get(name) != needed.get(name):
            raise UserError(
                f"{folder}: the weights do not fit the model of {CONFIG_FILE} ({name}: {found.get(name, 'missing')}, "
                f"needed {needed.get(name, 'nothing of this name')}); export again"
            )
    return model


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
        raise UserError(f"{path}: {NO_EXPORT}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    version = found.get("format_version") if isinstance(found, dict) else None
    if version != EXPORT_FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version!r}; this vilg reads {EXPORT_FORMAT_VERSION}. "
            "Export the checkpoint again with this version"
        )
    return found
