"""Scenes: a glyph on a coloured background, with its caption in Chinese and in English.

    "白色背景上的马"                  "a horse on a white background"
    "左边是猫，右边是狗，白色背景"      "a cat on the left and a dog on the right on a white background"

Scene `i` of a split is a pure function of (seed, split, i), so that any number of processes may draw any part of the
data and regenerate it to the byte. Some (glyph, background) combinations are *held out*: no training scene shows them,
though training shows each of those glyphs and each of those backgrounds many times. Splits: `train`; `seen`, evaluation
scenes from trained combinations; `held_out`, evaluation scenes from held-out combinations.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vilg.demo.glyphs import compose, glyph_layer, load_glyphs

SPLITS = ("train", "seen", "held_out")
LANGUAGES = ("zh", "en")


@dataclass(frozen=True)
class Background:
    """A named colour, RGB 0..255."""

    zh: str
    en: str
    rgb: tuple[int, int, int]


# In stable order: `num_backgrounds` takes the first ones. No two lie within 58 levels of each other (Euclidean), so
# that a tint of up to 16 in each channel (28 levels together) leaves every background nearest to its own name.
BACKGROUNDS = (
    Background("白色", "white", (244, 244, 244)),
    Background("黑色", "black", (22, 22, 26)),
    Background("红色", "red", (206, 40, 46)),
    Background("蓝色", "blue", (46, 92, 214)),
    Background("黄色", "yellow", (244, 214, 48)),
    Background("绿色", "green", (44, 150, 66)),
    Background("紫色", "purple", (128, 56, 176)),
    Background("橙色", "orange", (240, 138, 28)),
    Background("粉色", "pink", (244, 160, 200)),
    Background("灰色", "gray", (136, 140, 148)),
    Background("青色", "cyan", (62, 204, 214)),
    Background("棕色", "brown", (118, 74, 44)),
    Background("深蓝色", "navy blue", (18, 36, 100)),
    Background("浅绿色", "light green", (166, 226, 118)),
    Background("米色", "beige", (232, 214, 180)),
    Background("酒红色", "maroon", (104, 16, 48)),
)


class SceneConfig(BaseModel):
    """What the demo data looks like. Lengths are pixels, colours 0..255."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(0, ge=0, description="Seed of everything drawn: combinations held out, places, sizes, tints.")
    num_glyphs: int = Field(64, ge=2, description="Glyphs in use, the first ones of the shipped list.")
    num_backgrounds: int = Field(12, ge=2, le=len(BACKGROUNDS), description="Named background colours in use.")
    image_size: Literal[32, 48, 64] = Field(32, description="Side of the square picture, pixels.")
    sizes: tuple[int, ...] = Field((20, 24, 28), min_length=1, description="Sides a glyph may be drawn at, pixels.")
    place_steps: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (4,), description="Grid of a glyph's corner, pixels, one for all or one for each of `sizes`; 0 centres it."
    )
    tint: int = Field(8, ge=0, le=16, description="Largest shift of each background channel, levels of 255.")
    two_objects: bool = Field(False, description="Two glyphs, one in each half of the picture, instead of one.")
    held_out_fraction: float = Field(0.25, ge=0, lt=0.5, description="Share of each glyph's backgrounds held out.")
    num_train: int = Field(12_000, ge=1, description="Training scenes.")
    num_seen: int = Field(256, ge=0, description="Evaluation scenes from trained combinations.")
    num_held_out: int = Field(256, ge=0, description="Evaluation scenes from held-out combinations.")

    @model_validator(mode="after")
    def _check(self) -> SceneConfig:
        problems = []
        if self.num_glyphs > len(load_glyphs()):
            problems.append(f"num_glyphs={self.num_glyphs}, but {len(load_glyphs())} are shipped")
        if min(self.sizes) < 8 or max(self.sizes) > self.frame_width:
            problems.append(
                f"sizes={list(self.sizes)}: a glyph is 8 to {self.frame_width} pixels here "
                f"(image_size={self.image_size}, two_objects={str(self.two_objects).lower()})"
            )
        if len(self.place_steps) not in (1, len(self.sizes)):
            problems.append(f"place_steps={list(self.place_steps)}: give one for all or one for each of sizes={list(self.sizes)}")
        if len(set(self.sizes)) != len(self.sizes):
            problems.append(f"sizes={list(self.sizes)} names a size twice")
        if self.num_held_out and not self.backgrounds_held_out:
            problems.append(
                f"held_out_fraction={self.held_out_fraction} of {self.num_backgrounds} backgrounds is none, so there "
                "are no held-out scenes: raise it, or set num_held_out=0"
            )
        # Balanced dealing gives every background at least this many held-out glyphs; a pair needs two.
        elif self.two_objects and self.num_held_out and self._glyphs_per_background < 2:
            problems.append(f"num_glyphs={self.num_glyphs} is too few for held-out pairs; use more glyphs")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def frame_width(self) -> int:
        """Width of the frame that one glyph has to itself: the picture's, or half of it with two objects."""
        return self.image_size // 2 if self.two_objects else self.image_size

    @property
    def backgrounds_held_out(self) -> int:
        """Backgrounds held out from each glyph."""
        return round(self.held_out_fraction * self.num_backgrounds)

    @property
    def _glyphs_per_background(self) -> int:
        return self.num_glyphs * self.backgrounds_held_out // self.num_backgrounds

    def count(self, split: str) -> int:
        """Number of scenes of a split."""
        return {"train": self.num_train, "seen": self.num_seen, "held_out": self.num_held_out}[split]


@dataclass(frozen=True)
class Scene:
    """One scene: `glyphs`, `sizes` and `places` hold one entry, or two (left, right). Places are (x, y) of the corner
    within the glyph's own frame, pixels; `color` is the background after its tint."""

    split: str
    index: int
    language: str
    glyphs: tuple[int, ...]
    background: int
    color: tuple[int, int, int]
    sizes: tuple[int, ...]
    places: tuple[tuple[int, int], ...]

    def caption(self, language: str | None = None) -> str:
        """The caption in `language` ("zh" or "en"); without it, in the language drawn for this scene."""
        return caption_for(self.glyphs, self.background, language or self.language)


class Draws:
    """A stream of random integers that is a pure function of its key, on every platform and library version.

    The n-th draw is BLAKE2b(key, n); numpy's and Python's generators promise no stable integers across versions.
    """

    def __init__(self, *key: object) -> None:
        self._state = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8)
        self._count = 0

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        state = self._state.copy()
        state.update(self._count.to_bytes(8, "little"))
        self._count += 1
        return int.from_bytes(state.digest(), "little") % bound  # bias below 2^-50 for the bounds used here

    def choice(self, items):
        """One item of a non-empty sequence."""
        return items[self.below(len(items))]

    def permutation(self, length: int) -> list[int]:
        """A permutation of range(length) (Fisher and Yates)."""
        order = list(range(length))
        for i in range(length - 1, 0, -1):
            j = self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order


def caption_for(glyphs: tuple[int, ...], background: int, language: str) -> str:
    """Caption of one glyph, or of two (left, right), on a background; `language` is "zh" or "en"."""
    color, names = BACKGROUNDS[background], [load_glyphs()[glyph] for glyph in glyphs]
    if language == "zh":
        if len(names) == 1:
            return f"{color.zh}背景上的{names[0].zh}"
        return f"左边是{names[0].zh}，右边是{names[1].zh}，{color.zh}背景"
    if language == "en":
        article = "an" if color.en[0] in "aeiou" else "a"
        things = [name.en_with_article for name in names]
        what = things[0] if len(things) == 1 else f"{things[0]} on the left and {things[1]} on the right"
        return f"{what} on {article} {color.en} background"
    raise ValueError(f"language={language!r}; use one of {', '.join(LANGUAGES)}")


def caption_characters() -> str:
    """Every Chinese character a caption can hold besides the glyphs' names; the sheet font is cut to these."""
    return "背景上的左边是，右。" + "".join(background.zh for background in BACKGROUNDS)


@functools.lru_cache(maxsize=16)
def _held_out_table(seed: int, num_glyphs: int, num_backgrounds: int, per_glyph: int) -> np.ndarray:
    counts = [0] * num_backgrounds
    table = np.zeros((num_glyphs, num_backgrounds), dtype=bool)
    for glyph in range(num_glyphs):
        # The backgrounds least often held out so far, ties broken by the seed: all stay within one of each other.
        order = Draws(seed, "held-out", glyph).permutation(num_backgrounds)
        for background in sorted(order, key=lambda b: counts[b])[:per_glyph]:
            counts[background] += 1
            table[glyph, background] = True
    table.setflags(write=False)
    return table


def held_out_table(config: SceneConfig) -> np.ndarray:
    """bool [num_glyphs, num_backgrounds]: the combinations that training never shows.

    A function of seed, num_backgrounds and held_out_fraction; adding glyphs leaves the earlier rows as they are. Every
    glyph keeps the same number of backgrounds, and backgrounds differ by at most one glyph.
    """
    return _held_out_table(config.seed, config.num_glyphs, config.num_backgrounds, config.backgrounds_held_out)


@functools.lru_cache(maxsize=256)
def _round(config: SceneConfig, split: str, number: int) -> tuple[tuple[int, int], ...]:
    """All (glyph, background) combinations of a split in the order of round `number`: each comes once a round."""
    table = held_out_table(config)
    pairs = np.argwhere(table if split == "held_out" else ~table).tolist()
    order = Draws(config.seed, split, "round", number).permutation(len(pairs))
    return tuple((pairs[i][0], pairs[i][1]) for i in order)


def places_for(config: SceneConfig, size: int) -> list[tuple[int, int]]:
    """Corners (x, y) within its frame that a glyph of side `size` may take: multiples of its step, or centred."""
    step = config.place_steps[config.sizes.index(size) if len(config.place_steps) > 1 else 0]
    free = (config.frame_width - size, config.image_size - size)
    if step == 0:
        return [(free[0] // 2, free[1] // 2)]
    columns, rows = (range(0, room + 1, step) for room in free)
    return [(x, y) for y in rows for x in columns]


def make_scene(config: SceneConfig, split: str, index: int) -> Scene:
    """Scene `index` of `split`; any index >= 0 is valid, beyond the configured number too."""
    if split not in SPLITS or index < 0:
        raise ValueError(f"split={split!r}, index={index}: use one of {', '.join(SPLITS)} and an index >= 0")
    per_round = len(_round(config, split, 0))
    glyph, background = _round(config, split, index // per_round)[index % per_round]
    draws = Draws(config.seed, split, "scene", index)
    language = draws.choice(LANGUAGES)
    tint = [draws.below(2 * config.tint + 1) - config.tint for _ in range(3)]
    color = tuple(min(255, max(0, value + shift)) for value, shift in zip(BACKGROUNDS[background].rgb, tint))
    glyphs = [glyph]
    if config.two_objects:
        held = held_out_table(config)[:, background]
        others = np.flatnonzero(held if split == "held_out" else ~held).tolist()
        others.remove(glyph)
        glyphs.append(draws.choice(others))
    sizes = tuple(draws.choice(config.sizes) for _ in glyphs)
    places = tuple(draws.choice(places_for(config, size)) for size in sizes)
    return Scene(split, index, language, tuple(glyphs), background, color, sizes, places)


def scenes(config: SceneConfig, split: str) -> Iterator[Scene]:
    """All scenes of a split, in order."""
    return (make_scene(config, split, index) for index in range(config.count(split)))


def render(config: SceneConfig, scene: Scene) -> np.ndarray:
    """The scene's picture: uint8 [image_size, image_size, 3]."""
    image = np.empty((config.image_size, config.image_size, 3), dtype=np.uint8)
    image[:] = scene.color
    for slot, (glyph, size, (x, y)) in enumerate(zip(scene.glyphs, scene.sizes, scene.places)):
        x += slot * config.frame_width
        box = image[y : y + size, x : x + size]
        box[:] = compose(glyph_layer(glyph, size), box)
    return image
