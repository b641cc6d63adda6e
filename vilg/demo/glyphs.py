"""The emoji pictures that the demo composes scenes from, with their names (`make_assets.py` says where they come from).

Shapes: G glyphs, S side of a drawn glyph in pixels.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vilg.errors import UserError

ASSETS = Path(__file__).parent / "assets"
FORMAT_VERSION = 1
CELL = 64  # side of a stored glyph, pixels
SHEET_COLUMNS = 16

# Names that English leaves without an article: plurals and masses, by their last word.
_NO_ARTICLE = frozenset(
    "grapes cherries blueberries peanuts beans pancakes fries noodles chopsticks glasses sunglasses goggles jeans "
    "gloves socks shorts scissors bubbles books chains skis fireworks sparkles stars shoes bags dolls notes headphones "
    "bread baguette flatbread garlic bacon popcorn salt sushi rice spaghetti oden honey custard cheese chocolate candy "
    "sake ice soap yarn thread mail money broccoli food butter milk tea corn falafel bento mate lacrosse hockey tennis "
    "bowling badminton pong coral fog fire confetti luggage prints tickets beads knobs".split()
)
# Words whose first letter misleads: the article follows the sound.
_VOWEL_SOUND = ("hour", "heir", "honest", "herb", "x-ray")
_CONSONANT_SOUND = ("uni", "use", "uti", "eu", "ewe", "one", "ufo")


def article_for(name: str) -> str:
    """The English indefinite article of a name: "a", "an", or "" for plurals and masses ("grapes", "bread")."""
    words = name.lower().split()
    if words[-1] in _NO_ARTICLE:
        return ""
    if words[0].startswith(_VOWEL_SOUND):
        return "an"
    return "an" if words[0][0] in "aeiou" and not words[0].startswith(_CONSONANT_SOUND) else "a"


@dataclass(frozen=True)
class Glyph:
    """One emoji: its character, its short names and where its picture lies."""

    char: str
    zh: str
    en: str
    article: str
    category: str
    subgroup: str
    core: bool
    cell: int

    @property
    def en_with_article(self) -> str:
        """The English name as it stands in a sentence: "an owl", "grapes"."""
        return f"{self.article} {self.en}".strip()


@functools.lru_cache(maxsize=1)
def _index() -> dict:
    path = ASSETS / "glyphs.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    version = index.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version!r} is unknown; this vilg reads version {FORMAT_VERSION}. Reinstall "
            "vilg, or run `python -m vilg.demo.make_assets`."
        )
    return index


@functools.lru_cache(maxsize=1)
def load_glyphs() -> tuple[Glyph, ...]:
    """All shipped glyphs in their stable order, the hand-picked core of animals and foods first."""
    return tuple(Glyph(**entry) for entry in _index()["glyphs"])


@functools.lru_cache(maxsize=None)
def _sheet(category: str) -> Image.Image:
    path = ASSETS / f"glyphs_{category}.png"
    with Image.open(path) as file:
        sheet = file.convert("RGBA")
    if hashlib.sha256(sheet.tobytes()).hexdigest() != _index()["pixels_sha256"][category]:
        raise UserError(f"{path}: the pixels are not those listed in glyphs.json; reinstall vilg.")
    return sheet


@functools.lru_cache(maxsize=4096)
def glyph_layer(index: int, size: int) -> np.ndarray:
    """Glyph `index` drawn `size` pixels wide and high: uint8 [S, S, 4], colour premultiplied by alpha.

    Premultiplied, so that a scene is exactly `layer + (1 - alpha) * background`: linear in the background, which the
    nearest-scene measure relies on. Resampled with Pillow's box filter. The array is shared: do not write to it.
    """
    glyph = load_glyphs()[index]
    left, top = glyph.cell % SHEET_COLUMNS * CELL, glyph.cell // SHEET_COLUMNS * CELL
    cell = _sheet(glyph.category).crop((left, top, left + CELL, top + CELL)).convert("RGBa")
    layer = np.array(cell.resize((size, size), Image.Resampling.BOX))
    layer.setflags(write=False)
    return layer


def glyph_picture(index: int, size: int = CELL, color: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Glyph `index` alone on a plain `color`: uint8 [S, S, 3]."""
    return compose(glyph_layer(index, size), np.asarray(color, dtype=np.uint8))


def compose(layer: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Lay a premultiplied uint8 layer [..., 4] over a uint8 colour or picture [..., 3]; exact integer arithmetic."""
    transparency = 255 - layer[..., 3:].astype(np.int32)
    under = (background.astype(np.int32) * transparency + 127) // 255
    return np.minimum(layer[..., :3] + under, 255).astype(np.uint8)
