"""Pictures in and out: the one preprocessing that training, tokenising and evaluation share.

Shapes: B batch, S side in pixels. Stored images are uint8 [S, S, 3] RGB, the network's are float [B, 3, S, S] in
[-1, 1].
"""

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vilg.tokens.files import write_atomically

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_FORMATS = ("JPEG", "PNG", "WEBP")
_OTHERS = (
    (re.compile(rb"GIF8[79]a"), "a GIF"),
    (re.compile(rb"II\*\0|MM\0\*"), "a TIFF"),
    (re.compile(rb"BM"), "a BMP"),
    (re.compile(rb".{4}ftyp(avif|heic|mif1)", re.DOTALL), "an AVIF or HEIC"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"\s*<(\?xml|svg)"), "an SVG or other XML"),
    (re.compile(rb"\xff\xd8|\x89PNG|RIFF.{4}WEBP", re.DOTALL), "the beginning of a damaged one"),
)
_BACKGROUND = (255, 255, 255)  # what shines through transparent pixels
_SHEET_COLUMNS = 8


class BadImage(ValueError):
    """Bytes that are no readable image."""


@dataclass(frozen=True)
class Crop:
    """A square of an image. share: of the shorter side, at least 0.5; x, y: place, 0 left or top, 1 right or bottom."""

    share: float
    x: float
    y: float

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels of an image of that size."""
        side = self.share * min(width, height)
        left, top = self.x * (width - side), self.y * (height - side)
        return left, top, min(left + side, width), min(top + side, height)


def decode_image(data: bytes, size: int, *, crop: Crop | None = None) -> np.ndarray:
    """JPEG, PNG or WebP -> uint8 [size, size, 3].

    Turned as its EXIF data say, transparency laid on white, scaled (bicubic) until the shorter side is `size`, the
    middle cut out; with `crop`, that square of it is scaled instead. An image of that size comes out unchanged without
    one. Raises BadImage for damaged, empty, huge (decompression bomb) or other content.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return prepare_image(image, size, crop=crop)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = _what_it_is(data) if isinstance(error, UnidentifiedImageError) else error
        raise BadImage(f"not a readable JPEG, PNG or WebP image of at least one pixel: {reason}") from error


def _what_it_is(data: bytes) -> str:
    """What bytes are that none of the formats opens: by how they begin, since other decoders are no business of ours."""
    if not data:
        return "it is empty"
    for begins, name in _OTHERS:
        if begins.match(data):
            return f"it is {name}"
    return f"it begins with {data[:8]!r}"


def prepare_image(image: Image.Image, size: int, *, crop: Crop | None = None) -> np.ndarray:
    """The same for an opened picture -> uint8 [size, size, 3]."""
    image.draft("RGB", (2 * size, 2 * size))  # JPEG alone: decode at a fraction of the size where that suffices
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 rather than scale
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*_BACKGROUND, 255)), image)
    image = image.convert("RGB")
    if crop is not None:
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=crop.box(*image.size))
    elif image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.array(image)


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [-1, 1], on the same device."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """float [B, 3, S, S] in [-1, 1] (clamped) -> uint8 [B, S, S, 3], rounded to the nearest level."""
    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous().numpy()


def write_sheet(real: np.ndarray, reconstructed: np.ndarray, path: Path) -> None:
    """Write a PNG with each real image above its reconstruction, eight pairs a row. Both uint8 [B, S, S, 3]."""
    count, side = real.shape[:2]
    scale = max(1, 96 // side)
    gap, cell = 4, side * scale
    rows = -(-count // _SHEET_COLUMNS)
    width = _SHEET_COLUMNS * (cell + gap) + gap
    sheet = np.full((rows * (2 * cell + 3 * gap) + gap, width, 3), 255, np.uint8)
    for index, pair in enumerate(zip(real, reconstructed, strict=True)):
        row, column = divmod(index, _SHEET_COLUMNS)
        left = gap + column * (cell + gap)
        for line, image in enumerate(pair):
            top = gap + row * (2 * cell + 3 * gap) + line * (cell + gap)
            sheet[top : top + cell, left : left + cell] = image.repeat(scale, axis=0).repeat(scale, axis=1)
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, format="PNG")
    write_atomically(path, content.getvalue())
