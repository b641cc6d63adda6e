"""The fields of a token-shard sample: codes, captions, JSON, pixels. Bytes in, checked values out; nothing is unpickled."""

import io
import json
import re
from functools import lru_cache

import numpy as np
from PIL import Image

from vilg.tokens.vqgan.images import BadImage, decode_image


class BadField(ValueError):
    """A field that cannot be used; `reason` is a short class for counting."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def describe(error: Exception) -> str:
    """An error's text without memory addresses (Pillow prints one), so that equal faults give equal records."""
    return re.sub(r" <[^<>]* at 0x[0-9a-f]+>", "", str(error))


@lru_cache(maxsize=8)
def _usual_npy_header(num: int) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.empty(num, "<u2"), version=(1, 0), allow_pickle=False)
    return file.getvalue()[: -2 * num]


def encode_codes(codes: np.ndarray) -> bytes:
    """`.npy` bytes of uint16 codes [N]."""
    return _usual_npy_header(codes.size) + np.ascontiguousarray(codes, "<u2").tobytes()


def decode_codes(data: bytes | None, num: int, vocab_size: int) -> np.ndarray:
    """uint16 codes [num] from `.npy` bytes; raises BadField if they are anything else.

    Nothing is unpickled, and nothing is allocated by what a header claims.
    """
    if data is None:
        raise BadField("no codes", "has no img.npy")
    header = _usual_npy_header(num)
    if len(data) == len(header) + 2 * num and data.startswith(header):
        codes = np.frombuffer(data, "<u2", num, len(header))
    else:
        codes = _unusual_codes(data, num)
    if codes.max() >= vocab_size:
        raise BadField("code out of range", f"img.npy holds code {codes.max()}, outside 0..{vocab_size - 1}")
    return codes


def _unusual_codes(data: bytes, num: int) -> np.ndarray:
    """Codes behind a header that numpy accepts but we do not write (another version or padding)."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"npy version {version}")
    except ValueError as error:
        raise BadField("undecodable codes", f"img.npy is no array: {error}") from None
    if dtype != np.dtype("<u2") or shape != (num,):
        raise BadField("codes of wrong shape or type", f"img.npy is {dtype} {list(shape)}, expected uint16 [{num}]")
    if len(data) - file.tell() != 2 * num:
        raise BadField("undecodable codes", f"img.npy has {len(data) - file.tell()} bytes of data, not {2 * num}")
    return np.frombuffer(data, "<u2", num, file.tell())


def encode_pixels(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 [S, S, 3]: no loss, and what every reader of web datasets knows."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def decode_pixels(data: bytes | None, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of such a PNG. Raises BadField if there is none, or it is anything else."""
    if data is None:
        raise BadField("no image", "has no png, which the manifest promises")
    try:
        return decode_image(data, size)
    except BadImage as error:
        raise BadField("bad image", describe(error)) from None


def decode_meta(data: bytes | None) -> dict:
    """The JSON object of a sample, {} if it has none; raises BadField if it is no JSON object."""
    if data is None:
        return {}
    try:
        meta = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadField("bad json", f"json cannot be read: {error}") from None
    if not isinstance(meta, dict):
        raise BadField("bad json", f"json holds {type(meta).__name__}, not an object")
    return meta


def decode_questions(meta: dict) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs of the JSON's `questions`, a list of objects with both; () if it has none. Raises BadField
    for anything else, or a blank one."""
    listed = meta.get("questions", [])
    try:
        pairs = tuple((each["question"], each["answer"]) for each in listed)
    except (KeyError, TypeError):
        pairs = ((None, None),)
    if not all(isinstance(text, str) and text.strip() for pair in pairs for text in pair):
        raise BadField("bad json", "json holds `questions`, but not as a list of objects with question and answer")
    return pairs


def decode_captions(data: bytes | None, meta: dict) -> tuple[str, ...]:
    """`captions` of the JSON if it has them, else the text; without blank ones. Raises BadField if none is left."""
    if "captions" in meta:
        listed = meta["captions"]
        if not isinstance(listed, list) or not listed or not all(isinstance(c, str) for c in listed):
            raise BadField("bad json", "json holds `captions`, but not as a list of strings")
        captions = tuple(caption for caption in listed if caption.strip())
    elif data is None:
        raise BadField("no caption", "has no txt")
    else:
        try:
            caption = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadField("caption not UTF-8", f"the caption is not UTF-8: {error}") from None
        captions = (caption,) if caption.strip() else ()
    if not captions:
        raise BadField("empty caption", "the caption is empty")
    return captions
