"""One pair on its own: is it readable, and what do the filters say that need no other pair?"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from vilg.config.ingest import CharactersFilter, IngestRecipe, LanguageFilter, NounFilter, WordsFilter
from vilg.data.fields import BadField, decode_captions, decode_meta, decode_questions, describe
from vilg.data.filters import captions as rules
from vilg.data.filters.duplicates import content_hash, perceptual_hash
from vilg.data.shards import IMAGE_FIELDS
from vilg.data.sources import Found, as_caption
from vilg.tokens.vqgan.images import BadImage, decode_image

_PROBE_SIZE = 64  # pixels to which an image is decoded to see whether it can be


@dataclass(frozen=True)
class Verdict:
    """What is known of a pair. reason: why it is dropped, None while nothing speaks against it.

    captions: those that are kept, stripped; lost: reasons of captions that a pair with several lost; several: whether
    the source had a list. measures: values that filters look at, by name. exact, near: hashes for the duplicates.
    """

    reason: str | None = None
    detail: str = ""
    captions: tuple[str, ...] = ()
    several: bool = False
    lost: tuple[str, ...] = ()
    image_field: str = ""
    meta: dict = field(default_factory=dict)
    measures: dict[str, float | str] = field(default_factory=dict)
    exact: int = 0
    near: int = 0

    def dropped(self, reason: str, detail: str) -> "Verdict":
        """The same pair, dropped."""
        return replace(self, reason=reason, detail=detail)


def examine(recipe: IngestRecipe, pairs: list[Found]) -> list[Verdict]:
    """Verdicts in the same order; a pure function, so that it may run in any process."""
    return [_examine(recipe, found) for found in pairs]


def _examine(recipe: IngestRecipe, found: Found) -> Verdict:
    verdict = Verdict()
    try:
        verdict = _read(found)
        verdict = _judge_captions(recipe, verdict)
        if verdict.reason is None:
            verdict = _judge_image(recipe, verdict, found.fields[verdict.image_field])
    except (BadField, BadImage) as error:
        return verdict.dropped(getattr(error, "reason", "bad image"), describe(error))
    return verdict


def _read(found: Found) -> Verdict:
    if found.fault is not None:
        raise BadField(*found.fault)
    image_field = next((name for name in IMAGE_FIELDS if name in found.fields), None)
    if image_field is None:
        raise BadField("no image", "has no image")
    meta = decode_meta(found.fields.get("json"))
    captions = decode_captions(found.fields.get("txt"), meta)
    decode_questions(meta)
    unique = tuple(dict.fromkeys(caption.strip() for caption in captions))
    return Verdict(captions=unique, several="captions" in meta, image_field=image_field, meta=meta)


def _judge_captions(recipe: IngestRecipe, verdict: Verdict) -> Verdict:
    """Each caption by itself; the pair goes if none is left, for the reason of the first."""
    measures: dict[str, float | str] = {"language": rules.language(verdict.captions[0])}
    kept, lost = [], []
    for number, caption in enumerate(verdict.captions):
        fault = _caption_fault(recipe, caption, measures if number == 0 else {})
        if fault is None:
            kept.append(caption)
        else:
            lost.append(fault)
    verdict = replace(verdict, measures=measures)
    if not kept:
        return verdict.dropped(*lost[0])
    fell, meta = set(verdict.captions) - set(kept), verdict.meta
    if fell and "questions" in meta:  # a question of a table goes with the caption that it counts as
        meta = meta | {"questions": [each for each in meta["questions"] if as_caption(each).strip() not in fell]}
    return replace(verdict, captions=tuple(kept), lost=tuple(reason for reason, _ in lost), meta=meta)


def _caption_fault(recipe: IngestRecipe, caption: str, measures: dict[str, float | str]) -> tuple[str, str] | None:
    """(reason, detail) of the first filter that a caption does not pass."""
    for name, check in _CAPTION_FILTERS.items():
        settings = recipe.active(name)
        fault = check(settings, caption, measures) if settings is not None else None
        if fault is not None:
            return fault
    return None


def _language(settings: LanguageFilter, caption: str, measures: dict) -> tuple[str, str] | None:
    found = rules.language(caption)
    return None if found in settings.keep else ("language", f"is {found}, not {' or '.join(settings.keep)}")


def _characters(settings: CharactersFilter, caption: str, measures: dict) -> tuple[str, str] | None:
    special = rules.special_characters(caption, settings.allowed)
    return ("special characters", f"holds {special[:20]!r}") if special else None


def _words(settings: WordsFilter, caption: str, measures: dict) -> tuple[str, str] | None:
    count = measures["words"] = rules.count_words(caption)
    if count >= settings.below:
        return "too many words", f"{count} words, allowed are fewer than {settings.below}"
    if count < settings.at_least:
        return "too few words", f"{count} words, needed are {settings.at_least}"
    return None


def _noun(settings: NounFilter, caption: str, measures: dict) -> tuple[str, str] | None:
    return None if rules.has_noun(caption) else ("no noun", "no noun was found")


_CAPTION_FILTERS: dict[str, Callable[..., tuple[str, str] | None]] = {
    "language": _language,
    "characters": _characters,
    "words": _words,
    "noun": _noun,
}


def _judge_image(recipe: IngestRecipe, verdict: Verdict, image: bytes) -> Verdict:
    width, height = _size(image)
    if width * height > recipe.max_pixels:
        raise BadImage(f"{width} x {height} pixels are more than max_pixels={recipe.max_pixels}")
    side, aspect = min(width, height), max(width, height) / max(1, min(width, height))
    measures = verdict.measures | {"side": side, "aspect": aspect}
    verdict = replace(verdict, measures=measures, meta={"width": width, "height": height} | verdict.meta)
    smallest, widest = recipe.active("side"), recipe.active("aspect")
    if smallest is not None and side < smallest.at_least:
        return verdict.dropped("too small", f"{width} x {height} pixels, the shorter side needs {smallest.at_least}")
    if widest is not None and aspect > widest.at_most:
        return verdict.dropped("too long a shape", f"{width} x {height} pixels, at most {widest.at_most:g} to 1")
    pixels = decode_image(image, _PROBE_SIZE)
    return replace(verdict, **_hashes(recipe, verdict, image, pixels))


def _size(image: bytes) -> tuple[int, int]:
    """(width, height) from the header alone; BadImage if there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded yet
            with Image.open(io.BytesIO(image), formats=("JPEG", "PNG", "WEBP")) as header:
                return header.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"not a readable JPEG, PNG or WebP image: {error}") from error


def _hashes(recipe: IngestRecipe, verdict: Verdict, image: bytes, pixels: np.ndarray) -> dict[str, int]:
    exact, found = recipe.active("exact_duplicates"), {}
    if exact is not None:
        texts = [caption.encode("utf-8", "replace") for caption in verdict.captions] if exact.of == "pair" else []
        found["exact"] = content_hash(image, *texts)
    if recipe.active("near_duplicates") is not None:
        found["near"] = perceptual_hash(pixels)
    return found
