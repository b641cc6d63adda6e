"""Small token shards and stand-ins for the tokenizers, shared by the data tests."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vilg.config.schema import DataConfig
from vilg.data.fields import encode_codes
from vilg.data.manifest import Manifest, ShardEntry
from vilg.data.writer import ShardWriter
from vilg.tokens.sequence import SequenceSpec

GRID, CODES, TEXT_SLOTS = (2, 3), 50, 8
SPEC = SequenceSpec(text_slots=TEXT_SLOTS, grid=GRID, text_vocab_size=300, image_vocab_size=CODES)


class Bytes:
    """A text tokenizer: one token a UTF-8 byte, behind the four special ids."""

    vocab_size = 260

    def encode(self, text: str) -> list[int]:
        return [4 + byte for byte in text.strip().encode("utf-8")]


def sample_fields(number: int) -> dict[str, bytes]:
    """Sample `number`: its codes and its caption name it."""
    codes = (np.arange(6) * 7 + number) % CODES
    return {"img.npy": encode_codes(codes), "txt": str(number).encode(), "json": json.dumps({"n": number}).encode()}


def make_shards(
    folder: Path, sizes: list[int], edit: Callable[[int, dict[str, bytes]], dict[str, bytes]] = lambda _, f: f
) -> Path:
    """Token shards of `sizes` samples with a manifest; `edit(number, fields)` may spoil single samples."""
    number, entries = 0, []
    for i, size in enumerate(sizes):
        with ShardWriter(folder / f"{i:05d}.tar") as writer:
            for j in range(size):
                writer.write(f"{i:05d}{j:04d}", edit(number, sample_fields(number)))
                number += 1
        entries.append(ShardEntry(writer.path.name, writer.samples, writer.bytes, writer.sha256))
    Manifest("tokenizer-hash", GRID, CODES, tuple(entries)).save(folder)
    return folder


def data_config(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(**{"train": folder, **changes})


class Averages:
    """An image tokenizer: the mean brightness of each patch is its code."""

    vocab_size, factor, image_size = CODES, 4, 8
    hash = "hash-of-averages"

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, images: Tensor) -> Tensor:
        self.calls += 1
        means = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), self.factor)[:, 0]
        return ((means + 1) / 2 * (self.vocab_size - 1)).round().long()


def picture(number: int, *, size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
    """An image file whose pixels depend on `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def make_raw(
    folder: Path, sizes: list[int], edit: Callable[[int, dict[str, bytes]], dict[str, bytes]] = lambda _, f: f
) -> Path:
    """Raw shards in img2dataset's form; `edit(number, fields)` may spoil single samples."""
    number = 0
    for i, size in enumerate(sizes):
        with ShardWriter(folder / f"{i:05d}.tar") as writer:
            for j in range(size):
                meta = json.dumps({"url": f"https://example.org/{number}", "width": 8})
                fields = {"png": picture(number), "txt": f"caption {number}".encode(), "json": meta.encode()}
                writer.write(f"{i:05d}{j:04d}", edit(number, fields))
                number += 1
    return folder
