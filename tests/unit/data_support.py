"""Small token shards and stand-ins for the tokenizers, shared by the data tests."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

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
