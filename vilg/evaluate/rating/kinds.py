"""What people are asked, by kind of output: the criteria and scales of ERNIE-ViLG (arXiv 2112.15283, section 4).

Pictures: clarity, texture and relevance from 1 to 5 on 500 texts in nine categories; that list is not public, and its
categories are known to us by size alone, so an item's category is a free text. Captions: fluency, relevance and richness
from 0 to 2. Answers: whether a person wrote them (the Turing test) and how good they are from 0 to 2, as Gao et al. ask
of FM-IQA (arXiv 1505.05612). The wording of the questions is ours.
"""

from dataclasses import dataclass
from typing import Literal

Level = Literal["interval", "nominal"]


@dataclass(frozen=True)
class Criterion:
    """A question and its scale of whole numbers; `labels`: what each of them, or the two ends, means."""

    name: str
    question: str
    least: int
    most: int
    labels: tuple[str, ...]
    level: Level = "interval"


@dataclass(frozen=True)
class Kind:
    """key: the fields that name what all systems were given; shown: fields a rater reads; criteria: what is asked."""

    key: tuple[str, ...]
    shown: tuple[str, ...]
    criteria: tuple[Criterion, ...]


KINDS: dict[str, Kind] = {
    "pictures": Kind(
        key=("prompt",),
        shown=("prompt",),
        criteria=(
            Criterion("clarity", "Is the picture sharp, with outlines you can tell apart?", 1, 5, ("not at all", "fully")),
            Criterion("texture", "Do surfaces and details look as they should?", 1, 5, ("not at all", "fully")),
            Criterion("relevance", "Does it show what the text says?", 1, 5, ("nothing of it", "all of it")),
        ),
    ),
    "captions": Kind(
        key=("image",),
        shown=("caption",),
        criteria=(
            Criterion("fluency", "Is the sentence well formed?", 0, 2, ("no", "partly", "yes")),
            Criterion("relevance", "Is what it says true of the picture?", 0, 2, ("no", "partly", "yes")),
            Criterion("richness", "Does it say what matters in the picture?", 0, 2, ("little", "some", "all")),
        ),
    ),
    "answers": Kind(
        key=("image", "question"),
        shown=("question", "answer"),
        criteria=(
            Criterion("human", "Who wrote the answer?", 0, 1, ("a machine", "a person"), "nominal"),
            Criterion("quality", "How good is it?", 0, 2, ("wrong", "partly right", "right")),
        ),
    ),
}
