"""Chinese and English text on a picture with the bundled face; a character it lacks becomes a box with its code point.

The face is a small subset (`assets/README.md`). Any other font file does as well, e.g. a whole Noto Sans CJK for
captions from the open world.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vilg.errors import UserError

DEFAULT_FONT = Path(__file__).parent / "assets" / "captions.otf"
_NO_CHARACTER = "\U0010ffff"  # a noncharacter: no font has it, so it shows what the font draws for lack of a glyph
# A breaking unit: a Latin word with the blanks after it, or one other character with the closing marks after it.
_UNITS = re.compile(r"[!-~]+\s*|\s+|[^\s][，。、；：？！）》”’…]*")

Color = tuple[int, int, int]


class Face:
    """A font at one size, in pixels."""

    def __init__(self, size: int, font: Path = DEFAULT_FONT) -> None:
        try:
            self._font = ImageFont.truetype(str(font), size, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            raise UserError(f"font {font}: cannot be read ({error}); give a TrueType or OpenType file") from error
        self.size = size
        self.line_height = round(size * 1.4)
        self._missing: dict[str, bool] = {}
        self._substitute = self._bitmap(_NO_CHARACTER)

    def _bitmap(self, character: str) -> tuple[tuple[int, int], bytes]:
        mask = self._font.getmask(character)
        return mask.size, bytes(mask)

    def lacks(self, character: str) -> bool:
        """Whether the font has no glyph for `character`."""
        if character.isspace():
            return False
        if character not in self._missing:
            self._missing[character] = self._bitmap(character) == self._substitute
        return self._missing[character]

    def _runs(self, text: str) -> list[tuple[bool, str]]:
        """Split into (missing, text): runs of characters the font has, and single ones it lacks."""
        runs: list[tuple[bool, str]] = []
        for character in text:
            missing = self.lacks(character)
            if runs and not missing and not runs[-1][0]:
                runs[-1] = (False, runs[-1][1] + character)
            else:
                runs.append((missing, character))
        return runs

    def width(self, text: str) -> float:
        """Advance width of one line, pixels."""
        return sum(self.size if missing else self._font.getlength(run) for missing, run in self._runs(text))

    def wrap(self, text: str, width: float, max_lines: int = 4) -> list[str]:
        """Break `text` into lines no wider than `width`; what does not fit `max_lines` ends in "…".

        Chinese breaks between any two characters but not before closing punctuation, Latin text between words; a unit
        wider than a line is cut.
        """
        lines = [""]
        for unit in _UNITS.findall(text.strip()):
            while self.width(lines[-1] + unit.rstrip()) > width:
                if lines[-1]:
                    lines[-1] = lines[-1].rstrip()
                    lines.append("")
                    continue
                fits = 1
                while self.width(unit[: fits + 1]) <= width:
                    fits += 1
                lines[-1], unit = unit[:fits], unit[fits:]
                lines.append("")
            lines[-1] += unit
        lines = [line.rstrip() for line in lines if line.strip()]
        if len(lines) > max_lines:
            last = lines[max_lines - 1]
            while last and self.width(last + "…") > width:
                last = last[:-1]
            lines = [*lines[: max_lines - 1], last + "…"]
        return lines

    def draw(self, canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color: Color) -> None:
        """Draw one line with the top left corner of its em box at `place`."""
        x, y = place
        for missing, run in self._runs(text):
            if missing:
                self._draw_box(canvas, (x, y), run, color)
                x += self.size
            else:
                canvas.text((x, y + self.size), run, font=self._font, fill=color, anchor="ls")
                x += self._font.getlength(run)

    def _draw_box(self, canvas: ImageDraw.ImageDraw, place: tuple[float, float], character: str, color: Color) -> None:
        """A frame of one em that holds the code point in hexadecimal, on two lines."""
        x, y = round(place[0]), round(place[1])
        top, side = y + round(self.size * 0.1), self.size - 2
        canvas.rectangle((x + 1, top, x + side, top + side), outline=color)
        digits = f"{ord(character):04X}"
        half = (len(digits) + 1) // 2
        for row, part in enumerate((digits[:half], digits[half:])):
            strip = _digits(part, max(2, (side - 3) // half), max(3, (side - 3) // 2), color)
            canvas.bitmap((x + 2 + (side - 2 - strip.width) // 2, top + 2 + row * (side - 2) // 2), strip, fill=color)


@functools.lru_cache(maxsize=512)
def _digits(text: str, width: int, height: int, color: Color) -> Image.Image:
    """A mask with `text` in cells of width x height pixels: drawn large, then shrunk, so that it stays even."""
    font = ImageFont.truetype(str(DEFAULT_FONT), 32)
    mask = Image.new("L", (20 * len(text), 26))
    canvas = ImageDraw.Draw(mask)
    for position, character in enumerate(text):
        canvas.text((20 * position + 10, 25), character, font=font, fill=255, anchor="ms")
    return mask.resize((width * len(text), height), Image.Resampling.LANCZOS)
