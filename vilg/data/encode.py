"""Raw shards -> token shards: pictures are decoded ahead in threads while a batch is encoded. B images of a batch.

A batch is a stretch of one shard's samples (those that cannot be used left out), so a shard's bytes depend on the raw
shard, the tokenizer and the `Recipe` only: not on threads, processes, restarts, or which shards a process has. Decoding
runs on into the next shards, so the encoder does not wait at a shard's end; only its last batch is smaller.
"""

import hashlib
import itertools
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vilg.data.dataset import INDEX_FOLDER, index_path
from vilg.data.fields import (
    BadField,
    decode_captions,
    decode_meta,
    decode_questions,
    describe,
    encode_codes,
    encode_pixels,
)
from vilg.data.manifest import ShardEntry
from vilg.data.records import Record, Rejected, record_path
from vilg.data.shards import IMAGE_FIELDS, PIXELS, TOKEN_FIELDS, ShardIndex, ShardReader, index_shard
from vilg.data.writer import ShardWriter
from vilg.errors import UserError
from vilg.tokens.vqgan.images import BadImage, Crop, decode_image, to_float
from vilg.tokens.vqgan.source import seeded_random

_BATCHES_AHEAD = 2  # decoded or being decoded while another one is encoded
LEAST_CROP = 0.5  # a JPEG is decoded at twice the size that is needed; a smaller crop of it would be enlarged


class ImageEncoder(Protocol):
    """What is needed of `vilg.tokens.vqgan.ImageTokenizer`."""

    vocab_size: int
    factor: int
    image_size: int
    hash: str

    def encode(self, images: Tensor) -> Tensor: ...


class Count(Protocol):
    """Who counts images: `vilg.data.progress.Progress`, or a process's part of it."""

    def image_done(self) -> None: ...

    def skip(self, images: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """What a token shard's bytes depend on beside the raw shard and the tokenizer.

    image_size: side in pixels; batch_size: images per encoder call. views: samples made of an image; with
    `least_crop` each shows a random square of at least that share of the shorter side, drawn by (seed, key, view);
    without it there is one view, the middle. images: the pixels that were encoded are stored beside the codes, for
    end-to-end training.
    """

    image_size: int
    batch_size: int
    views: int = 1
    least_crop: float | None = None
    seed: int = 0
    images: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.image_size < 1 or self.views < 1:
            raise UserError("--batch-size, --image-size and --views must be at least 1")
        if self.least_crop is None and self.views > 1:
            raise UserError(f"--views {self.views} would all be the same middle of the image; add --least-crop 0.8")
        if self.least_crop is not None and not LEAST_CROP <= self.least_crop <= 1:
            raise UserError(f"--least-crop {self.least_crop} is not from {LEAST_CROP} to 1")

    def job(self) -> dict[str, object]:
        """For job.json. Jobs from before there were images hold nothing about them."""
        return {**asdict(self), "images": self.images or None}

    def key(self, key: str, view: int) -> str:
        """The token sample's key: the raw one's, with the view where there are several."""
        return key if self.views == 1 else f"{key}-{view}"

    def crop(self, key: str, view: int) -> Crop | None:
        """What a view shows; None is the middle."""
        if self.least_crop is None:
            return None
        number = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        size, x, y = seeded_random(self.seed, f"crop {view}", number).random(3).tolist()
        return Crop(self.least_crop + size * (1 - self.least_crop), x, y)


@dataclass(frozen=True)
class Batch:
    """Samples `rows` of an opened raw shard, seen as view number `view`."""

    number: int
    reader: ShardReader
    rows: range
    view: int


@dataclass(frozen=True)
class Decoded:
    """A sample with its pixels uint8 [S, S, 3] and text fields, or the reason why it cannot be used."""

    key: str
    pixels: np.ndarray | None = None
    fields: dict[str, bytes] | None = None
    rejected: Rejected | None = None


def encode_shards(
    shards: Sequence[tuple[Path, ShardIndex]],
    out: Path,
    image_tokenizer: ImageEncoder,
    recipe: Recipe,
    *,
    device: torch.device | str,
    threads: int,
    count: Count,
) -> Iterator[Record]:
    """Make the token shards of `shards` in `out`, each with its index and, last, its record; yields the records.

    threads: that decode; 0 decodes between the encoder's calls. Raises UserError for a damaged raw shard.
    """
    readers: deque[ShardReader] = deque()
    with ExitStack() as stack:
        stack.callback(lambda: [reader.close() for reader in readers])
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads else None
        if pool is not None:  # ended before the files that it reads are closed
            stack.callback(pool.shutdown, cancel_futures=True)
        stream = _decoded(_batches(shards, recipe, readers), recipe, pool)
        for number, batches in itertools.groupby(stream, key=lambda item: item[0].number):
            shard, index = shards[number]
            rejected: list[Rejected] = []
            with ShardWriter(out / shard.name) as writer:
                for batch, samples in batches:
                    _write_batch(writer, batch, samples, image_tokenizer, recipe, device, rejected)
                    for _ in samples:
                        count.image_done()
            token_fields = (*TOKEN_FIELDS, PIXELS) if recipe.images else TOKEN_FIELDS
            yield _record(writer, out, shard, index, tuple(rejected), token_fields)


def _batches(
    shards: Sequence[tuple[Path, ShardIndex]], recipe: Recipe, readers: deque[ShardReader]
) -> Iterator[Batch]:
    """All batches in order, a shard's views one after the other. `readers` are those that are open."""
    for number, (shard, index) in enumerate(shards):
        reader = ShardReader(shard, index)
        readers.append(reader)
        if len(readers) > _BATCHES_AHEAD + 2:  # a shard is one batch at least, so nobody reads the first any more
            readers.popleft().close()
        for view in range(recipe.views):
            for first in range(0, max(1, len(index)), recipe.batch_size):
                yield Batch(number, reader, range(first, min(first + recipe.batch_size, len(index))), view)


def _decoded(
    batches: Iterable[Batch], recipe: Recipe, pool: ThreadPoolExecutor | None
) -> Iterator[tuple[Batch, list[Decoded]]]:
    """Batches with their samples, in order."""
    if pool is None:
        for batch in batches:
            yield batch, [_decode(batch, row, recipe) for row in batch.rows]
        return
    waiting: deque[tuple[Batch, list[Future[Decoded]]]] = deque()
    for batch in batches:
        waiting.append((batch, [pool.submit(_decode, batch, row, recipe) for row in batch.rows]))
        if len(waiting) > _BATCHES_AHEAD:
            yield _results(*waiting.popleft())
    while waiting:
        yield _results(*waiting.popleft())


def _results(batch: Batch, futures: list[Future[Decoded]]) -> tuple[Batch, list[Decoded]]:
    return batch, list(map(operator.methodcaller("result"), futures))


def _decode(batch: Batch, row: int, recipe: Recipe) -> Decoded:
    fields, key = batch.reader.read(row), batch.reader.key(row)
    try:
        meta = decode_meta(fields.get("json"))
        decode_captions(fields.get("txt"), meta)
        decode_questions(meta)
        image = next((fields[name] for name in IMAGE_FIELDS if name in fields), None)
        if image is None:
            raise BadField("no image", "has no image")
        pixels = decode_image(image, recipe.image_size, crop=recipe.crop(key, batch.view))
    except (BadField, BadImage) as error:
        reason = getattr(error, "reason", "bad image")
        return Decoded(key, rejected=Rejected(batch.reader.shard.name, key, reason, describe(error)))
    return Decoded(key, pixels, {name: fields[name] for name in ("txt", "json") if name in fields})


def _write_batch(
    writer: ShardWriter,
    batch: Batch,
    samples: list[Decoded],
    image_tokenizer: ImageEncoder,
    recipe: Recipe,
    device: torch.device | str,
    rejected: list[Rejected],
) -> None:
    good = [sample for sample in samples if sample.rejected is None]
    if batch.view == 0:  # the others would only say it again
        rejected += [sample.rejected for sample in samples if sample.rejected is not None]
    if not good:
        return
    images = to_float(np.stack([sample.pixels for sample in good])).to(device)
    codes = image_tokenizer.encode(images).flatten(1).cpu().numpy().astype(np.uint16)  # [B, N]
    for sample, row in zip(good, codes, strict=True):
        fields = {"img.npy": encode_codes(row), **sample.fields}
        if recipe.images:
            fields[PIXELS] = encode_pixels(sample.pixels)
        writer.write(recipe.key(sample.key, batch.view), fields)


def _record(
    writer: ShardWriter, out: Path, shard: Path, index: ShardIndex, rejected: tuple[Rejected, ...],
    token_fields: Sequence[str],
) -> Record:  # fmt: skip
    """Leave the index and the record of a shard that has its name; whoever sees the record may rely on both others."""
    entry = ShardEntry(shard.name, writer.samples, writer.bytes, writer.sha256)
    token_index = index_shard(writer.path, token_fields, sha256=writer.sha256)
    token_index.save(index_path(out / INDEX_FOLDER, shard.name))
    record = Record(entry, index.fingerprint, rejected)
    record.save(record_path(out, shard.name))
    return record
