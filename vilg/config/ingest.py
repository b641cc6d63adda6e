"""The recipe of `vilg data ingest`: a section a filter, off if it is not written or says `enabled: false`.

ERNIE-ViLG (arXiv 2112.15283, section 3.2.1) keeps alt-texts of fewer than 15 words, with a noun and without special
characters, and pairs above a similarity of 0.5; about sizes and duplicates it says nothing.
"""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from vilg.config.schema import PositiveInt, Section

Language = Literal["zh", "en", "ja", "ko", "other"]
LANGUAGES: tuple[str, ...] = get_args(Language)
# Pillow warns of a decompression bomb above this, and `decode_image` takes the warning for an error.
MOST_PIXELS = 89_478_485
PLAIN_PUNCTUATION = " .,;:!?'\"()-&%/" + "。，、；：！？…—·“”‘’（）《》"


class Filter(Section):
    """What every filter has."""

    enabled: bool = Field(True, description="false leaves the filter out and its settings in place.")


class LanguageFilter(Filter):
    """By script, which is what short captions allow: see `vilg.data.filters.captions.language`."""

    keep: tuple[Language, ...] = Field(("zh", "en"), description="Languages that are kept.")


class WordsFilter(Filter):
    """Length in words; Chinese is cut into words by jieba."""

    below: PositiveInt = Field(15, description="Captions of this many words or more are dropped (the paper: 15).")
    at_least: PositiveInt = Field(1, description="Captions of fewer words are dropped.")


class CharactersFilter(Filter):
    """Letters, digits and marks of every script are always allowed."""

    allowed: str = Field(PLAIN_PUNCTUATION, description="All other characters that a caption may hold.")


class NounFilter(Filter):
    """At least one noun: jieba's tags for Chinese; for other text a word that no closed list of other words holds."""


class SideFilter(Filter):
    """Size of the image."""

    at_least: PositiveInt = Field(256, description="Shorter side in pixels below which an image is dropped.")


class AspectFilter(Filter):
    """Shape of the image; the centre crop shows 1 / aspect of it."""

    at_most: float = Field(3.0, ge=1, description="Longer by shorter side above which an image is dropped.")


class ExactFilter(Filter):
    """Of equal ones the first is kept. 12 bytes of memory a kept pair."""

    of: Literal["image", "pair"] = Field("image", description="image: equal image files; pair: caption equal as well.")


class NearFilter(Filter):
    """Images that look alike (perceptual hash of 64 bits); the first is kept. 12 * (distance + 1) bytes a kept pair."""

    distance: Annotated[int, Field(ge=0, le=7)] = Field(3, description="Differing bits up to which images are alike.")


class SimilarityFilter(Filter):
    """Image and caption compared by a CLIP or Chinese-CLIP model (cosine, from -1 to 1)."""

    model: Path | None = Field(None, description="Folder of the model as transformers saves it, with its processor.")
    above: float = Field(
        0.5, ge=-1, le=1, description="Scores up to this are dropped (0.5: the paper's own model; CLIP's lie near 0.3)."
    )
    batch_size: PositiveInt = Field(64, description="Pairs scored at once.")
    device: str | None = Field(None, description="cpu, cuda, cuda:1 ...; without it cuda if there is one.")


class IngestRecipe(Section):
    """Filters in the order in which they are asked; the first that says no is the one that is counted."""

    samples_per_shard: PositiveInt = Field(10_000, description="Pairs in a raw shard.")
    max_pixels: Annotated[int, Field(gt=0, le=MOST_PIXELS)] = Field(
        MOST_PIXELS, description="Images with more are not decoded (decompression bombs) and count as bad."
    )
    language: LanguageFilter | None = Field(None, description="Which languages are kept.")
    characters: CharactersFilter | None = Field(None, description="No special characters.")
    words: WordsFilter | None = Field(None, description="Caption length in words.")
    noun: NounFilter | None = Field(None, description="At least one noun.")
    side: SideFilter | None = Field(None, description="Minimum side.")
    aspect: AspectFilter | None = Field(None, description="Maximum aspect ratio.")
    exact_duplicates: ExactFilter | None = Field(None, description="Equal files once.")
    near_duplicates: NearFilter | None = Field(None, description="Images that look alike once.")
    similarity: SimilarityFilter | None = Field(None, description="Image and caption belong together.")

    def active(self, name: str) -> Filter | None:
        """A filter's settings, None if it is off."""
        settings = getattr(self, name)
        return settings if settings is not None and settings.enabled else None
