"""Sheets: labelled pictures on one page, for people.

A sheet is a column of sections; a section holds cells, several to a row; a cell holds pictures side by side (say real,
reconstruction, sample) above its captions, whose first line is set larger. Small pictures are enlarged by whole numbers
without smoothing: what the model drew is what one sees.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vilg.errors import UserError
from vilg.pictures.text import DEFAULT_FONT, Color, Face

PAPER: Color = (250, 249, 246)
CARD: Color = (255, 255, 255)
RULE: Color = (224, 221, 214)
INK: Color = (34, 34, 38)
FAINT: Color = (112, 110, 106)
ACCENT: Color = (44, 82, 160)
RIGHT: Color = (40, 150, 84)
WRONG: Color = (206, 62, 58)

_MARGIN, _GAP, _PAD = 36, 14, 12
_MIN_CELL = 172  # a caption of a dozen Chinese characters still takes one line
_PICTURE = 112  # small pictures are enlarged to about this


@dataclass(frozen=True)
class Picture:
    """uint8 [H, W, 3]; `label` stands under it, `right` frames it in green or red and ticks or crosses it."""

    image: np.ndarray
    label: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Cell:
    """Pictures side by side, and the lines under them."""

    pictures: Sequence[Picture]
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A heading, a note under it, and cells in rows of `columns`. `labels` names the pictures of a cell from left to
    right, once at the head of each column."""

    heading: str
    cells: Sequence[Cell]
    note: str = ""
    columns: int = 3
    labels: Sequence[str] = ()


@dataclass
class _Faces:
    font: Path
    title: Face = field(init=False)
    heading: Face = field(init=False)
    body: Face = field(init=False)
    small: Face = field(init=False)

    def __post_init__(self) -> None:
        self.title, self.heading, self.body, self.small = (Face(size, self.font) for size in (30, 21, 16, 13))


@dataclass(frozen=True)
class _Line:
    """One line of text to be drawn at (x, y)."""

    x: float
    y: float
    text: str
    face: Face
    color: Color


class _Page:
    """Collects what is to be drawn and how far down it reaches, so that the canvas is made once, at the right size."""

    def __init__(self) -> None:
        self.bottom = _MARGIN
        self.lines: list[_Line] = []
        self.boxes: list[tuple[tuple[int, int, int, int], Color, Color | None]] = []
        self.pictures: list[tuple[int, int, Image.Image, bool | None]] = []

    def paragraph(self, text: str, face: Face, color: Color, x: int, width: int, max_lines: int = 4) -> None:
        for line in face.wrap(text, width, max_lines):
            self.lines.append(_Line(x, self.bottom, line, face, color))
            self.bottom += face.line_height


def sample_sheet(
    sections: Sequence[Section],
    path: str | Path,
    *,
    title: str = "",
    subtitle: str = "",
    scale: int | None = None,
    font: Path = DEFAULT_FONT,
) -> Path:
    """Draw `sections` one below the other and write them to `path` as PNG, by way of a temporary file.

    Args:
        scale: enlargement of every picture; without it the whole number that brings the largest near 112 pixels.
        font: a font file with the captions' characters; one it lacks is drawn as a box with its code point.

    Raises:
        ValueError: no picture at all, or one that is not uint8 [H, W, 3].
        UserError: `font` cannot be read, or `path` cannot be written.
    """
    pictures = [picture for section in sections for cell in section.cells for picture in cell.pictures]
    if not pictures:
        raise ValueError("a sheet without a picture: give at least one section with a cell that has one")
    for picture in pictures:
        if picture.image.dtype != np.uint8 or picture.image.ndim != 3 or picture.image.shape[2] != 3:
            raise ValueError(f"picture is {picture.image.dtype} {picture.image.shape}; expected uint8 [H, W, 3]")
    if scale is None:
        scale = max(1, round(_PICTURE / max(max(picture.image.shape[:2]) for picture in pictures)))
    faces, page = _Faces(Path(font)), _Page()
    width = max(_section_width(section, scale) for section in sections)
    page.paragraph(title, faces.title, INK, _MARGIN, width)
    page.paragraph(subtitle, faces.body, FAINT, _MARGIN, width, max_lines=8)
    for section in sections:
        _lay_out_section(page, faces, section, scale, width)
    return _write(_paint(page, width + 2 * _MARGIN), Path(path))


def grid_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[str | Sequence[str]],
    path: str | Path,
    *,
    title: str = "",
    subtitle: str = "",
    columns: int = 6,
    scale: int | None = None,
    font: Path = DEFAULT_FONT,
) -> Path:
    """One picture (uint8 [H, W, 3]) to a caption, in rows of `columns`: the fixed prompts of a training run."""
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images for {len(captions)} captions; give one for each")
    cells = [
        Cell([Picture(image)], [lines] if isinstance(lines, str) else lines) for image, lines in zip(images, captions)
    ]
    section = Section("", cells, columns=min(columns, max(1, len(cells))))
    return sample_sheet([section], path, title=title, subtitle=subtitle, scale=scale, font=font)


def _cell_width(section: Section, scale: int) -> int:
    """Width of the section's cells without padding: the widest row of pictures, and room for captions."""
    rows = [
        sum(picture.image.shape[1] * scale for picture in cell.pictures) + _PAD * (len(cell.pictures) - 1)
        for cell in section.cells
    ]
    return max([_MIN_CELL - 2 * _PAD, *rows])


def _section_width(section: Section, scale: int) -> int:
    return section.columns * (_cell_width(section, scale) + 2 * _PAD + _GAP) - _GAP


def _lay_out_section(page: _Page, faces: _Faces, section: Section, scale: int, width: int) -> None:
    page.bottom += 18
    if section.heading:
        bar = (_MARGIN, page.bottom + 3, _MARGIN + 4, page.bottom + faces.heading.size + 6)
        page.boxes.append((bar, ACCENT, None))
        page.paragraph(section.heading, faces.heading, INK, _MARGIN + 14, width - 14)
    page.paragraph(section.note, faces.small, FAINT, _MARGIN + (14 if section.heading else 0), width - 14)
    page.bottom += 6
    inner = _cell_width(section, scale)
    step = inner + 2 * _PAD + _GAP
    lefts = [_MARGIN + column * step for column in range(section.columns)]
    if section.labels:
        _lay_out_labels(page, faces, section, scale, lefts)
    for first in range(0, len(section.cells), section.columns):
        row = section.cells[first : first + section.columns]
        top, bottoms = page.bottom, []
        for left, cell in zip(lefts, row):
            page.bottom = top
            _lay_out_cell(page, faces, cell, scale, left, inner)
            bottoms.append(page.bottom)
        page.bottom = max(bottoms)
        for left, _ in zip(lefts, row):
            page.boxes.append(((left, top, left + inner + 2 * _PAD, page.bottom), CARD, RULE))
        page.bottom += _GAP


def _lay_out_labels(page: _Page, faces: _Faces, section: Section, scale: int, lefts: list[int]) -> None:
    """Name the pictures of a cell above each column that holds cells."""
    tallest = 0
    for left, cell in zip(lefts, section.cells):
        x = left + _PAD
        for picture, label in zip(cell.pictures, section.labels):
            side = picture.image.shape[1] * scale
            lines = faces.small.wrap(label, side, max_lines=2)
            for number, line in enumerate(lines):
                offset = (side - faces.small.width(line)) / 2
                y = page.bottom + number * faces.small.line_height
                page.lines.append(_Line(x + offset, y, line, faces.small, ACCENT))
            tallest = max(tallest, len(lines) * faces.small.line_height)
            x += side + _PAD
    page.bottom += tallest + 4


def _lay_out_cell(page: _Page, faces: _Faces, cell: Cell, scale: int, left: int, inner: int) -> None:
    top = page.bottom + _PAD
    widths = [picture.image.shape[1] * scale for picture in cell.pictures]
    x = left + _PAD + (inner - sum(widths) - _PAD * (len(widths) - 1)) // 2
    bottoms = [top]
    for picture, width in zip(cell.pictures, widths):
        height = picture.image.shape[0] * scale
        enlarged = Image.fromarray(picture.image).resize((width, height), Image.Resampling.NEAREST)
        page.pictures.append((x, top, enlarged, picture.right))
        page.bottom = top + height + 4
        for line in faces.small.wrap(picture.label, width, max_lines=2):
            page.lines.append(
                _Line(x + (width - faces.small.width(line)) / 2, page.bottom, line, faces.small, FAINT)
            )
            page.bottom += faces.small.line_height
        bottoms.append(page.bottom)
        x += width + _PAD
    page.bottom = max(bottoms) + 2
    for number, caption in enumerate(cell.captions):
        face, color = (faces.small, FAINT) if number else (faces.body, INK)
        page.paragraph(caption, face, color, left + _PAD, inner)
    page.bottom += _PAD - 4


def _paint(page: _Page, width: int) -> Image.Image:
    sheet = Image.new("RGB", (width, page.bottom + _MARGIN - _GAP), PAPER)
    canvas = ImageDraw.Draw(sheet)
    for box, fill, outline in page.boxes:
        canvas.rounded_rectangle(box, radius=6 if outline else 1, fill=fill, outline=outline)
    for x, y, image, right in page.pictures:
        sheet.paste(image, (x, y))
        frame, thickness = {None: (RULE, 1), True: (RIGHT, 3), False: (WRONG, 3)}[right]
        outside = (x - thickness, y - thickness, x + image.width + thickness - 1, y + image.height + thickness - 1)
        canvas.rectangle(outside, outline=frame, width=thickness)
        if right is not None:
            _draw_badge(canvas, x + image.width, y, right)
    for line in page.lines:
        line.face.draw(canvas, (line.x, line.y), line.text, line.color)
    return sheet


def _draw_badge(canvas: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """A tick or a cross at a picture's corner, so that the verdict does not hang on telling green from red."""
    canvas.ellipse((x - 9, y - 9, x + 9, y + 9), fill=RIGHT if right else WRONG, outline=CARD)
    if right:
        canvas.line((x - 4, y, x - 1, y + 3, x + 4, y - 4), fill=CARD, width=2)
    else:
        canvas.line((x - 3, y - 3, x + 3, y + 3), fill=CARD, width=2)
        canvas.line((x - 3, y + 3, x + 3, y - 3), fill=CARD, width=2)


def _write(sheet: Image.Image, path: Path) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(partial, format="PNG", optimize=True)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from error
    return path
