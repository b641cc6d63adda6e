"""Drawn pictures as PNG files that say how they were drawn."""

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def png_bytes(image: np.ndarray, facts: Mapping[str, object]) -> bytes:
    """A PNG of uint8 [height, width, 3] with each fact as a text chunk."""
    text = PngInfo()
    for key, value in facts.items():
        text.add_itxt(key, str(value))
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG", pnginfo=text)
    return content.getvalue()
