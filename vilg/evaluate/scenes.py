"""Nearest scene in pixel space: what does a picture show, told without any network?

Candidates are all composites of one of G glyphs, drawn in one of K ways (sizes, places), on one of C plain colours.
With a layer's premultiplied colour `a` and transparency `w` a composite is `a + w c`; its squared distance to picture x

    |x - a - w c|^2 = |x - a|^2 - 2 sum_ch c_ch <x - a, w>_ch + |c|^2 <w, w>

needs two matrix products per glyph for all colours at once. Pictures made by `vilg.demo.scenes` score exactly 1.

Shapes: B pictures, G glyphs, K drawings of each, C colours, P pixels of a frame.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class NearestComposite:
    """For each of B pictures: nearest glyph and colour (int64 [B]), its distance, and by how much the nearest composite
    of any other glyph is further away (both float32 [B], root mean square in levels of 255)."""

    glyphs: np.ndarray
    colors: np.ndarray
    distance: np.ndarray
    margin: np.ndarray


class CompositeMatcher:
    """Finds the nearest composite.

    Args:
        layers: for each glyph its drawings, uint8 [K, H, W, 4], premultiplied by alpha; K may differ.
        colors: uint8 [C, 3].
    """

    def __init__(self, layers: Iterable[np.ndarray], colors: np.ndarray) -> None:
        # Everything is centred at mid grey: float32 sums then stay small enough to tell near twins apart.
        self._colors = np.asarray(colors, dtype=np.float32) / 255 - 0.5  # [C, 3]
        self._glyphs = [self._prepare(layer) for layer in layers]
        if len(self._glyphs) < 2:
            raise ValueError(f"{len(self._glyphs)} glyphs: a nearest one needs two or more")

    def _prepare(self, layers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """uint8 [K, H, W, 4] -> colours [3P, K], transparency [P, K], and the distance's part without x, [K, C]."""
        self.frame = layers.shape[1:3]
        flat = layers.reshape(len(layers), -1, 4).astype(np.float32) / 255  # [K, P, 4]
        alpha = flat[..., 3:]
        color, clear = flat[..., :3] - 0.5 * alpha, 1 - alpha[..., 0]
        cross = np.einsum("kpc,kp->kc", color, clear)
        constant = np.sum(color**2, axis=(1, 2))[:, None] + 2 * cross @ self._colors.T
        constant += np.sum(clear**2, axis=1)[:, None] * np.sum(self._colors**2, axis=1)
        planes = color.transpose(2, 1, 0).reshape(-1, len(layers))  # channel-major, as the pictures below
        return np.ascontiguousarray(planes), np.ascontiguousarray(clear.T), constant

    def distances(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] -> root mean square distance to the best drawing, float32 [B, G, C], levels of 255."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (*self.frame, 3):
            height, width = self.frame
            raise ValueError(f"images are {images.dtype} {images.shape}; expected uint8 [B, {height}, {width}, 3]")
        out = np.empty((len(images), len(self._glyphs), len(self._colors)), dtype=np.float32)
        for first in range(0, len(images), 256):  # 256 pictures keep the largest product at a few MB
            batch = images[first : first + 256].astype(np.float32) / 255 - 0.5
            planes = batch.transpose(0, 3, 1, 2).reshape(len(batch), 3, -1)  # [b, 3, P]
            energy = np.sum(planes**2, axis=(1, 2))[:, None]
            for glyph, (color, clear, constant) in enumerate(self._glyphs):
                match = planes.reshape(len(batch), -1) @ color  # [b, K]
                shine = planes.reshape(-1, planes.shape[2]) @ clear  # [3b, K]
                shine = np.einsum("bck,dc->bkd", shine.reshape(len(batch), 3, -1), self._colors)  # [b, K, C]
                squared = constant - 2 * (match[:, :, None] + shine)
                out[first : first + 256, glyph] = energy + squared.min(axis=1)
        return np.sqrt(np.maximum(out, 0) / (3 * self.frame[0] * self.frame[1])) * 255

    def nearest(self, images: np.ndarray) -> NearestComposite:
        """The nearest composite of each picture; uint8 [B, H, W, 3]."""
        distances = self.distances(images)
        rows = np.arange(len(distances))
        per_glyph = distances.min(axis=2)  # [B, G]
        glyphs = per_glyph.argmin(axis=1)
        best = per_glyph[rows, glyphs]
        colors = distances[rows, glyphs].argmin(axis=1)
        per_glyph[rows, glyphs] = np.inf
        return NearestComposite(glyphs, colors, best, per_glyph.min(axis=1) - best)
