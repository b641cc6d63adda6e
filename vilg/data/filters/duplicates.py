"""Duplicates among any number of images: 64-bit hashes, near ones found without comparing all with all.

Two hashes that differ in at most d bits agree in one of d + 1 bands of them (pigeonhole), so only hashes that share a
band are compared. A band's value, or its low 16 bits, is a bucket: with 100 million images and d = 3 about 1,500 hashes
in each of four buckets, compared by one numpy operation. Banding: Manku, Jain, Das Sarma 2007, "Detecting
near-duplicates for web crawling".
"""

import hashlib
from array import array

import numpy as np
from PIL import Image

_BITS = 64
_BUCKET_BITS = 16
_SIDE, _KEPT = 32, 8  # of the cosine transform: pixels in, frequencies kept
_FLAT = 1e-3  # grey levels below which a frequency is rounding, not picture


class HashIndex:
    """Hashes seen so far; `distance`: bits (0 to 7) that two of one kind may differ in.

    Memory: 12 bytes times (distance + 1) a hash, measured with 10 million (8 are the hash, the rest the buckets).
    """

    def __init__(self, distance: int = 0):
        if not 0 <= distance < 8:
            raise ValueError(f"distance {distance} is not from 0 to 7")
        self.distance = distance
        edges = [_BITS * i // (distance + 1) for i in range(distance + 2)]
        # (shift, mask) of each band
        self._bands = [(low, (1 << min(high - low, _BUCKET_BITS)) - 1) for low, high in zip(edges, edges[1:])]
        self._buckets: list[dict[int, array]] = [{} for _ in self._bands]

    def __contains__(self, value: int) -> bool:
        wanted = np.uint64(value)
        for (shift, mask), buckets in zip(self._bands, self._buckets):
            bucket = buckets.get(value >> shift & mask)
            if bucket is not None:
                # The view must be gone before the array may grow again.
                if (np.bitwise_count(np.frombuffer(bucket, np.uint64) ^ wanted) <= self.distance).any():
                    return True
        return False

    def add(self, value: int) -> None:
        """Remember a hash (0 to 2**64 - 1)."""
        for (shift, mask), buckets in zip(self._bands, self._buckets):
            buckets.setdefault(value >> shift & mask, array("Q")).append(value)


def content_hash(*parts: bytes) -> int:
    """64 bits of BLAKE2b over all parts; among 800 million different ones two are equal with a chance of 2%."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def perceptual_hash(pixels: np.ndarray) -> int:
    """64 bits of uint8 [S, S, 3] that stay nearly the same when the image is scaled, recompressed or made brighter.

    The signs of the lowest 8 x 8 frequencies of a cosine transform of 32 x 32 grey pixels against their median, the
    mean left out ("pHash", Zauner 2010). Colour is not looked at; an even area counts as frequency 0.
    """
    grey = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    transform = _COSINE @ np.asarray(grey, np.float32) @ _COSINE.T  # [8, 8]
    frequencies = np.where(np.abs(transform) < _FLAT, 0, transform).flatten()
    frequencies[0] = 0
    bits = frequencies > np.median(frequencies[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _cosine() -> np.ndarray:
    """float32 [8, 32]: the first rows of the orthonormal type-II transform, scaled so that grey levels stay such."""
    k, n = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None]
    return (np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE)) / _SIDE).astype(np.float32)


_COSINE = _cosine()
