"""In which order samples are visited: a pure function of (seed, epoch, position), with random access.

Per epoch, blocks of 256 neighbouring samples are permuted; each window of 16 permuted blocks is then shuffled sample by
sample. Every sample comes exactly once per epoch, reads stay within 16 short runs of neighbours, and finding any
position costs one window's shuffle (4,096 keys), which is cached.

Permutations are the stable argsort of raw Philox output rather than `Generator.permutation`: numpy promises the stream
of a bit generator across versions, but not that of its distributions.
"""

import hashlib
from functools import lru_cache

import numpy as np

from vilg.errors import UserError

BLOCK_SAMPLES = 256
WINDOW_BLOCKS = 16
WINDOW_SAMPLES = BLOCK_SAMPLES * WINDOW_BLOCKS


def philox(seed: int, purpose: str, *indices: int, counter: int = 0) -> np.random.Philox:
    """An independent random stream for (seed, purpose, indices), starting at `counter` (4 uint64 per count)."""
    text = "/".join([purpose, str(int(seed)), *(str(int(i)) for i in indices)])
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Philox(key=key, counter=counter)


def uniforms(seed: int, purpose: str, first: int, count: int) -> np.ndarray:
    """Four random numbers in [0, 1) for each global index in first .. first + count - 1: float64 [count, 4].

    Row i depends on (seed, purpose, first + i) only.
    """
    raw = philox(seed, purpose, counter=first).random_raw(4 * count).reshape(count, 4)
    return (raw >> np.uint64(11)) * 2.0**-53


class Order:
    """Order of `num_samples` samples under one seed. stream: tells apart the data sets that a run blends."""

    def __init__(self, num_samples: int, seed: int, stream: str = "order"):
        if num_samples <= 0:
            raise UserError("the data set holds no samples, so there is no order to visit them in")
        self.num_samples, self.seed, self.stream = num_samples, seed, stream
        self._num_blocks = -(-num_samples // BLOCK_SAMPLES)
        self._missing = self._num_blocks * BLOCK_SAMPLES - num_samples  # samples that the last block lacks
        # A step touches one window, two at a border; a few more serve replacements. Block permutations: two epochs.
        self._blocks = lru_cache(maxsize=2)(self._permute_blocks)
        self._window = lru_cache(maxsize=4)(self._shuffle_window)

    def __reduce__(self):
        return Order, (self.num_samples, self.seed, self.stream)

    def __call__(self, global_indices: np.ndarray) -> np.ndarray:
        """Sample indices (int64 [n]) of global sample indices, which count on through the epochs (int64 [n])."""
        global_indices = np.asarray(global_indices, np.int64)
        epochs, positions = np.divmod(global_indices, self.num_samples)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            at = epochs == epoch
            samples[at] = self.at(int(epoch), positions[at])
        return samples

    def at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample indices (int64 [n]) at positions 0 .. num_samples - 1 of an epoch (int64 [n])."""
        positions = np.asarray(positions, np.int64)
        if positions.size and not 0 <= positions.min() <= positions.max() < self.num_samples:
            raise IndexError(f"position outside 0..{self.num_samples - 1}")
        samples = np.empty_like(positions)
        # Pretend that the one short block were full: positions behind its window shift by what it lacks.
        short_window_end = (self._short_window(epoch) + 1) * WINDOW_SAMPLES - self._missing
        shifted = np.where(positions >= short_window_end, positions + self._missing, positions)
        windows, offsets = np.divmod(shifted, WINDOW_SAMPLES)
        for window in np.unique(windows):
            at = windows == window
            samples[at] = self._window(epoch, int(window))[offsets[at]]
        return samples

    def epoch(self, index: int) -> int:
        """The epoch of a global index."""
        return index // self.num_samples

    def following(self, index: int, steps: int) -> int:
        """The sample `steps` places after that of a global index, in the same epoch, round its end."""
        epoch, position = divmod(index, self.num_samples)
        return int(self.at(epoch, np.array([(position + steps) % self.num_samples]))[0])

    def _short_window(self, epoch: int) -> int:
        return int(self._blocks(epoch)[1]) // WINDOW_BLOCKS

    def _permute_blocks(self, epoch: int) -> tuple[np.ndarray, int]:
        """The epoch's permutation of blocks and the place in it of the last, short block."""
        raw = philox(self.seed, f"{self.stream}-blocks", epoch).random_raw(self._num_blocks)
        blocks = np.argsort(raw, kind="stable")
        return blocks, int(np.flatnonzero(blocks == self._num_blocks - 1)[0])

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        """Sample indices of one window in visiting order: int64 [at most 4096]."""
        blocks = self._blocks(epoch)[0][window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
        samples = (blocks[:, None] * BLOCK_SAMPLES + np.arange(BLOCK_SAMPLES)).reshape(-1)
        samples = samples[samples < self.num_samples]
        raw = philox(self.seed, f"{self.stream}-window", epoch, window).random_raw(samples.size)
        return samples[np.argsort(raw, kind="stable")]
