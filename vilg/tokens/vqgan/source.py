"""The images a tokenizer is trained on: held in memory if they fit, else read shard by shard.

Some images are held back for the final figures: about one in ten, picked by the hash of shard name and key, from
the first shard on, until there are enough. All processes hold back the same ones.
"""

import hashlib
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vilg.errors import UserError
from vilg.tokens.raw import raw_shards, read_raw
from vilg.tokens.vqgan.config import ImageTokenizerRecipe
from vilg.tokens.vqgan.images import IMAGE_SUFFIXES, BadImage, decode_image

log = logging.getLogger(__name__)

_SHUFFLE_BUFFER = 4096  # images a streaming reader mixes
_BAD_SHOWN = 10


def seeded_random(seed: int, purpose: str, index: int) -> np.random.Generator:
    """A stream of random numbers that depends on these three only."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), index])))


def data_fingerprint(folder: Path) -> str:
    """sha256 in hex of the shards' names and sizes: tells whether a finished tokenizer was trained on this data."""
    described = "\n".join(f"{shard.name} {shard.stat().st_size}" for shard in raw_shards(folder))
    return hashlib.sha256(described.encode()).hexdigest()


@dataclass
class BadImages:
    """Counts unreadable images and stops when they are too many a share of those seen."""

    max_fraction: float
    seen: int = 0
    bad: int = 0

    def count(self, shard: Path, key: str, error: BadImage | None) -> None:
        """Note one image. Raises UserError at more than max_fraction of the (at least 200) images seen."""
        self.seen += 1
        if error is None:
            return
        self.bad += 1
        if self.bad <= _BAD_SHOWN:
            log.warning("%s: %s: %s; skipped", shard, key, error)
        if self.bad > self.max_fraction * max(self.seen, 200):
            raise UserError(
                f"{shard}: {key}: {self.bad} of {self.seen} images cannot be read, more than train.max_bad_fraction="
                f"{self.max_fraction}; the last: {error}"
            )


def _images(shard: Path, size: int, bad: BadImages, pick=None) -> Iterator[tuple[str, np.ndarray]]:
    """(key, image uint8 [S, S, 3]) of the readable images of a shard; of those only that `pick(shard, key)` wants."""
    for key, members in read_raw(shard, IMAGE_SUFFIXES):
        if pick is not None and not pick(shard, key):
            continue
        try:
            image = decode_image(next(iter(members.values())), size)
        except BadImage as error:
            bad.count(shard, key, error)
        else:
            bad.count(shard, key, None)
            yield key, image


def _may_be_held_back(shard: Path, key: str) -> bool:
    return hashlib.sha256(f"{shard.name}/{key}".encode()).digest()[0] % 10 == 0


@dataclass
class ImageData:
    """Images of a folder of raw shards.

    held_back: uint8 [M, S, S, 3]. images: uint8 [n, S, S, 3], or None where they do not fit into memory; `batches` then
    reads from the shards. num_images counts the images for training that are in memory (None when streaming).
    """

    shards: Sequence[Path]
    recipe: ImageTokenizerRecipe
    held_back: np.ndarray
    held_back_keys: frozenset[tuple[str, str]]
    images: np.ndarray | None
    bad: BadImages = field(repr=False)

    @classmethod
    def read(cls, folder: Path, recipe: ImageTokenizerRecipe) -> "ImageData":
        """Decode the images, or those held back alone once the rest exceeds `train.memory_mib`.

        Raises UserError if there are no shards, a shard is damaged, or fewer than 20 images can be read.
        """
        shards = raw_shards(folder)
        size = recipe.model.image_size
        most = recipe.train.memory_mib * 2**20 // (3 * size * size)
        bad = BadImages(recipe.train.max_bad_fraction)
        held_back: dict[tuple[str, str], np.ndarray] = {}
        images: list[np.ndarray] | None = []
        for shard in shards:
            for key, image in _images(shard, size, bad):
                if len(held_back) < recipe.train.held_back and _may_be_held_back(shard, key):
                    held_back[shard.name, key] = image
                elif images is not None:
                    images.append(image)
                    images = images if len(images) <= most else None
                elif len(held_back) >= recipe.train.held_back:
                    break
            if images is None and len(held_back) >= recipe.train.held_back:
                break
        if not held_back or (images is not None and len(images) < 20):
            raise UserError(f"{folder}: only {bad.seen - bad.bad} readable images; an image tokenizer needs far more")
        kept = np.stack(images) if images is not None else None
        return cls(shards, recipe, np.stack(list(held_back.values())), frozenset(held_back), kept, bad)

    def batches(self, *, rank: int, world_size: int, workers: int = 0) -> Iterator[torch.Tensor]:
        """This rank's part of one global batch after the other, without end: uint8 [b, S, S, 3].

        In memory a global batch depends on the seed alone, in streaming on the number of readers as well.
        """
        local = self.recipe.train.batch_size // world_size
        if self.images is not None:
            return self._from_memory(rank, local, world_size)
        stream = _Stream(self, rank, world_size)
        return iter(torch.utils.data.DataLoader(stream, batch_size=local, num_workers=workers))

    def _from_memory(self, rank: int, local: int, world_size: int) -> Iterator[torch.Tensor]:
        images = torch.from_numpy(self.images)
        size, start, epoch = local * world_size, 0, 0
        order = np.empty(0, np.int64)
        while True:
            while order.size - start < size:
                random = seeded_random(self.recipe.seed, "order of images", epoch)
                order = np.concatenate([order[start:], random.permutation(len(images))])
                start, epoch = 0, epoch + 1
            mine = order[start + rank * local : start + (rank + 1) * local]
            start += size
            yield images[mine]


class _Stream(torch.utils.data.IterableDataset):
    """Endless images of one reader: its share of the shards, in another order each epoch, mixed in a buffer."""

    def __init__(self, data: ImageData, rank: int, world_size: int):
        self.shards, self.recipe, self.held_back_keys = data.shards, data.recipe, data.held_back_keys
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        readers, reader = self.world_size * workers, self.rank * workers + worker_id
        mix = seeded_random(self.recipe.seed, "mixing of images", reader)
        buffer: list[np.ndarray] = []
        for image in self._read(reader, readers):
            if len(buffer) < _SHUFFLE_BUFFER:
                buffer.append(image)
                continue
            slot = int(mix.integers(_SHUFFLE_BUFFER))
            out, buffer[slot] = buffer[slot], image
            yield torch.from_numpy(out)

    def _read(self, reader: int, readers: int) -> Iterator[np.ndarray]:
        bad = BadImages(self.recipe.train.max_bad_fraction)
        by_shard = len(self.shards) >= readers  # else readers share the shards, each taking its part of the samples

        def mine(shard: Path, key: str) -> bool:
            if (shard.name, key) in self.held_back_keys:
                return False
            return by_shard or zlib.crc32(key.encode()) % readers == reader

        epoch = 0
        while True:
            found = False
            order = seeded_random(self.recipe.seed, "order of shards", epoch).permutation(len(self.shards))
            for index in order[reader::readers] if by_shard else order:
                for _, image in _images(self.shards[index], self.recipe.model.image_size, bad, mine):
                    found = True
                    yield image
            if not found:
                raise UserError(
                    f"{self.shards[0].parent}: reader {reader} of {readers} finds no images; use fewer processes"
                )
            epoch += 1
