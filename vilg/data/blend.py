"""Several data sets read as one, each as often as its weight says: a pure function of (seed, global sample index).

Global indices come in stretches of 8,192. Every stretch holds the same number of samples of a data set, its share rounded so
that all add up, at places drawn by (seed, stretch). So the place of an index within its own data set is

    stretch * (the data set's samples per stretch) + (how many of its places in this stretch come before)

and from there each data set goes through its own epochs in its own order (`order.py`).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from vilg.config.schema import DataConfig
from vilg.data.dataset import SampleError, TokenDataset, TokenSample
from vilg.data.order import Order, philox
from vilg.data.remote import RemoteDataset
from vilg.errors import UserError
from vilg.tokens.sequence import SequenceSpec

STRETCH = 8192  # a share is exact to half of 1 / 8192


def open_data(config: DataConfig) -> "TokenDataset | Blend":
    """What `data.train` and `data.blend` name. Raises UserError naming the folder, file or weight at fault."""
    first = _open(config.train, config)
    if not config.blend:
        return first
    others = [_open(part.path, config) for part in config.blend]
    return Blend([first, *others], [1.0, *(part.weight for part in config.blend)])


def parts_of(data: "TokenDataset | Blend") -> tuple[TokenDataset, ...]:
    """The data sets of a blend, or the one."""
    return data.parts if isinstance(data, Blend) else (data,)


def _open(place: Path | str, config: DataConfig) -> TokenDataset:
    if isinstance(place, Path):
        return TokenDataset.open(place, cache_dir=config.cache_dir)
    return RemoteDataset.open(place, cache_dir=config.cache_dir, cache_bytes=int(config.cache_gib * 2**30))


class Blend:
    """Data sets as one, with the calls of `TokenDataset` that a loader needs; sample numbers run on through them."""

    def __init__(self, parts: Sequence[TokenDataset], weights: Sequence[float]):
        self.parts, self.weights = tuple(parts), tuple(weights)
        self.counts = stretch_counts(self.weights)
        for part, count in zip(self.parts, self.counts):
            if count == 0:
                raise UserError(
                    f"data.blend: {part.folder} would get less than one sample of {STRETCH}; raise its weight, or leave "
                    "it out"
                )
        self.folder: Path = self.parts[0].folder
        self.num_samples = sum(part.num_samples for part in self.parts)
        self.firsts = np.cumsum([0, *(part.num_samples for part in self.parts)])[:-1]
        described = [[part.manifest_hash, count] for part, count in zip(self.parts, self.counts)]
        self.manifest_hash = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        self.is_remote = any(part.is_remote for part in self.parts)

    def __reduce__(self):
        return Blend, (self.parts, self.weights)

    def __len__(self) -> int:
        return self.num_samples

    def check(
        self, spec: SequenceSpec, *, image_tokenizer_hash: str | None = None, image_size: int | None = None
    ) -> None:
        """As `TokenDataset.check`, of every part."""
        for part in self.parts:
            part.check(spec, image_tokenizer_hash=image_tokenizer_hash, image_size=image_size)

    def sample(self, number: int) -> TokenSample:
        """As `TokenDataset.sample`."""
        part, inner = self._locate(number)
        return part.sample(inner)

    def error(self, number: int, reason: str, detail: str) -> SampleError:
        """As `TokenDataset.error`."""
        part, inner = self._locate(number)
        return part.error(inner, reason, detail)

    def shard_of(self, number: int) -> str:
        """As `TokenDataset.shard_of`."""
        part, inner = self._locate(number)
        return part.shard_of(inner)

    def read_ahead(self, numbers: np.ndarray) -> None:
        """As `RemoteDataset.read_ahead`, of the parts that are remote."""
        for part, first in zip(self.parts, self.firsts):
            mine = numbers[(numbers >= first) & (numbers < first + part.num_samples)] - first
            if part.is_remote and len(mine):
                part.read_ahead(mine)

    def order(self, seed: int) -> "BlendOrder":
        """In which order a run of this seed visits the samples."""
        return BlendOrder(tuple(part.num_samples for part in self.parts), self.counts, seed)

    def _locate(self, number: int) -> tuple[TokenDataset, int]:
        which = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return self.parts[which], int(number - self.firsts[which])


@dataclass(frozen=True)
class BlendOrder:
    """`Order` of a blend. sizes: samples of each part; counts: of `stretch_counts`."""

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        orders = tuple(Order(size, self.seed, stream=f"blend-{i}") for i, size in enumerate(self.sizes))
        object.__setattr__(self, "orders", orders)
        object.__setattr__(self, "_stretch", lru_cache(maxsize=4)(self._draw_stretch))

    def __reduce__(self):
        return BlendOrder, (self.sizes, self.counts, self.seed)

    def __call__(self, global_indices: np.ndarray) -> np.ndarray:
        """Sample numbers (int64 [n]) of global indices (int64 [n])."""
        parts, indices = self.places(global_indices)
        numbers = np.empty_like(indices)
        for which, order in enumerate(self.orders):
            at = parts == which
            if at.any():
                numbers[at] = order(indices[at]) + sum(self.sizes[:which])
        return numbers

    def places(self, global_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Part of each global index, and its index within that part, counting on through the part's epochs: int64 [n]."""
        stretches, offsets = np.divmod(np.asarray(global_indices, np.int64), STRETCH)
        parts, indices = np.empty_like(offsets), np.empty_like(offsets)
        counts = np.array(self.counts)
        for stretch in np.unique(stretches):
            at = stretches == stretch
            part_at, rank_at = self._stretch(int(stretch))
            parts[at] = part_at[offsets[at]]
            indices[at] = stretch * counts[parts[at]] + rank_at[offsets[at]]
        return parts, indices

    def epoch(self, index: int) -> int:
        """The epoch of its own data set in which the sample at a global index is visited."""
        (part,), (inner,) = self.places(np.array([index]))
        return int(inner) // self.sizes[part]

    def following(self, index: int, steps: int) -> int:
        """The sample `steps` places after that of a global index, in the same epoch of the same data set, round its end."""
        (part,), (inner,) = self.places(np.array([index]))
        return self.orders[part].following(int(inner), steps) + sum(self.sizes[:part])

    def _draw_stretch(self, stretch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every place of a stretch: which part, and how many of that part come before it."""
        parts = np.repeat(np.arange(len(self.counts)), self.counts)
        parts = parts[np.argsort(philox(self.seed, "blend", stretch).random_raw(STRETCH), kind="stable")]
        ranks = np.empty_like(parts)
        for which, count in enumerate(self.counts):
            ranks[parts == which] = np.arange(count)
        return parts, ranks


def stretch_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of every data set in a stretch: shares of `STRETCH` by the method of largest remainders."""
    shares = np.array(weights, float) / sum(weights) * STRETCH
    counts = np.floor(shares).astype(int)
    rest = STRETCH - counts.sum()
    counts[np.argsort(counts - shares, kind="stable")[:rest]] += 1
    return tuple(int(count) for count in counts)
