"""Scores of pictures against the scenes they should show: is the nearest scene the right one?

The measure (`vilg.evaluate.scenes`) needs no weights, and it gives exactly 1 on rendered scenes, so whatever a
reconstruction or a sample loses is its own. Two-object pictures are judged half by half.

Shapes: B pictures, S side in pixels, O objects (1 or 2), G glyphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vilg.demo.glyphs import glyph_layer
from vilg.demo.scenes import BACKGROUNDS, Scene, SceneConfig, places_for
from vilg.evaluate.scenes import CompositeMatcher


@dataclass(frozen=True)
class NearestScenes:
    """Glyphs (int64 [B, O], left to right), background (int64 [B]) and margin (float32 [B, O]): how much further away
    the best scene with another glyph is, root mean square in levels of 255."""

    glyphs: np.ndarray
    backgrounds: np.ndarray
    margin: np.ndarray


class SceneMatcher:
    """Nearest scene among all glyphs x backgrounds x sizes x places of a configuration, untinted."""

    def __init__(self, config: SceneConfig) -> None:
        self.config = config
        colors = np.array([background.rgb for background in BACKGROUNDS[: config.num_backgrounds]], dtype=np.uint8)
        self._matcher = CompositeMatcher(self._layers(), colors)

    def _layers(self) -> Iterator[np.ndarray]:
        """For each glyph all its drawings in a frame: uint8 [K, S, frame_width, 4]."""
        config = self.config
        corners = [(size, place) for size in config.sizes for place in places_for(config, size)]
        for glyph in range(config.num_glyphs):
            layers = np.zeros((len(corners), config.image_size, config.frame_width, 4), dtype=np.uint8)
            for layer, (size, (x, y)) in zip(layers, corners):
                layer[y : y + size, x : x + size] = glyph_layer(glyph, size)
            yield layers

    def nearest(self, images: np.ndarray) -> NearestScenes:
        """uint8 [B, S, S, 3] -> nearest scenes. ValueError on another shape or dtype."""
        images, config = np.asarray(images), self.config
        side = config.image_size
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            raise ValueError(f"images are {images.dtype} {images.shape}; expected uint8 [B, {side}, {side}, 3]")
        if not config.two_objects:
            found = self._matcher.nearest(images)
            return NearestScenes(found.glyphs[:, None], found.colors, found.margin[:, None])
        # Both halves stand on one background: the colour that serves them together, then each half's glyph on it.
        halves = np.stack(np.split(images, 2, axis=2), axis=1).reshape(-1, side, config.frame_width, 3)
        distances = self._matcher.distances(halves).reshape(len(images), 2, config.num_glyphs, config.num_backgrounds)
        backgrounds = np.sum(distances.min(axis=2) ** 2, axis=1).argmin(axis=1)
        on_it = np.take_along_axis(distances, backgrounds[:, None, None, None], axis=3)[..., 0]  # [B, 2, G]
        nearest_two = np.partition(on_it, 1, axis=2)[..., :2]
        return NearestScenes(on_it.argmin(axis=2), backgrounds, nearest_two[..., 1] - nearest_two[..., 0])


def scene_scores(
    images: np.ndarray, scenes: Sequence[Scene], config: SceneConfig, *, matcher: SceneMatcher | None = None
) -> dict[str, float]:
    """Score picture i against scene i.

    Args:
        images: uint8 [B, S, S, 3].
        scenes: the B scenes that the pictures should show.
        matcher: reuse one; building it takes longer than scoring a few pictures.

    Returns:
        `glyph_recall`: share of objects whose nearest glyph is theirs, in their place; `background_accuracy`;
        `scene_exact`: share of pictures with every glyph and the background right; `margin`: mean over objects, levels
        of 255; `images`: B.
    """
    if len(images) != len(scenes) or not len(scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes; give one for each, and at least one")
    found = (matcher or SceneMatcher(config)).nearest(images)
    glyph_right = found.glyphs == np.array([scene.glyphs for scene in scenes])
    background_right = found.backgrounds == np.array([scene.background for scene in scenes])
    return {
        "glyph_recall": float(glyph_right.mean()),
        "background_accuracy": float(background_right.mean()),
        "scene_exact": float((glyph_right.all(axis=1) & background_right).mean()),
        "margin": float(found.margin.mean()),
        "images": float(len(scenes)),
    }
