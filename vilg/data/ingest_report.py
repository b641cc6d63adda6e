"""What an ingest left out and why: report.json for programs, report.html for people, with pictures."""

import base64
import heapq
import io
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from vilg.config.ingest import IngestRecipe
from vilg.data.filters.duplicates import content_hash
from vilg.data.filters.examine import Verdict
from vilg.data.manifest import write_json
from vilg.data.sources import Found
from vilg.pictures.ingest_charts import histogram_png
from vilg.tokens.files import write_atomically
from vilg.tokens.vqgan.images import BadImage, decode_image

FORMAT_VERSION = 2
REPORT, PAGE = "report.json", "report.html"
KEPT = "kept"
_EXAMPLES = 24  # pairs shown per reason
_THUMBNAIL = 112  # pixels
_FATES = (KEPT, "dropped_here", "dropped_elsewhere")
_MOST_CAPTION = 200  # characters of a caption in the report


@dataclass(frozen=True)
class Measure:
    """A value that a filter looks at. width: of a bin, in octaves if `octaves`; most: everything above lies in the last
    bin; reasons: of the drops that it decides; settings: (section, field) of the thresholds in the recipe."""

    title: str
    unit: str
    width: float
    most: float
    reasons: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    octaves: bool = False

    def bin(self, value: float) -> int:
        """Number of the bin of a value; the bin reaches from `edge(n)` to `edge(n + 1)`."""
        value = min(value, self.most)
        return math.floor((math.log2(max(1, value)) if self.octaves else value) / self.width + 1e-9)

    def edge(self, number: int) -> float:
        """Lower edge of a bin."""
        return round(2 ** (number * self.width) if self.octaves else number * self.width, 6)


MEASURES = {
    "words": Measure(
        "Caption length",
        "words",
        1,
        60,
        ("too many words", "too few words"),
        (("words", "below"), ("words", "at_least")),
    ),
    "side": Measure("Shorter side", "pixels", 0.25, 8192, ("too small",), (("side", "at_least"),), octaves=True),
    "aspect": Measure("Aspect", "longer by shorter side", 0.1, 8, ("too long a shape",), (("aspect", "at_most"),)),
    "similarity": Measure("Similarity", "score", 0.02, 1, ("not similar",), (("similarity", "above"),)),
}


class Tally:
    """Counts of one ingest: reasons, values, and an even sample of pairs for each reason, the same in every run."""

    def __init__(self, recipe: IngestRecipe):
        self.recipe = recipe
        self.seen = self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.lost_captions: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self._bins: dict[str, dict[str, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))
        self._samples: dict[str, list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)

    def add(self, found: Found, verdict: Verdict) -> None:
        """Count a pair."""
        self.seen += 1
        if verdict.reason is None:
            self.kept += 1
            self.lost_captions.update(verdict.lost)
        else:
            self.dropped[verdict.reason] += 1
        for name, value in verdict.measures.items():
            if name == "language":
                self.languages[value] += 1
            else:
                self._bins[name][_fate(name, verdict)][MEASURES[name].bin(value)] += 1
        self._sample(found, verdict)

    def reasons(self) -> str:
        """The drops in words."""
        return ", ".join(f"{count} x {reason}" for reason, count in self.dropped.most_common())

    def histograms(self) -> dict[str, dict[str, Any]]:
        """Per measure: edges of the bins, counts of the kept, of those dropped by its filter, and by another one."""
        found = {}
        for name, bins in sorted(self._bins.items()):
            numbers = [number for counter in bins.values() for number in counter]
            span = range(min(numbers), max(numbers) + 1)
            measure = MEASURES[name]
            limits = [(section, field) for section, field in measure.settings if self.recipe.active(section)]
            found[name] = {
                "title": measure.title,
                "unit": measure.unit,
                "logarithmic": measure.octaves,
                "edges": [measure.edge(number) for number in [*span, span.stop]],
                "thresholds": [getattr(self.recipe.active(section), field) for section, field in limits],
                **{fate: [bins[fate][number] for number in span] for fate in _FATES},
            }
        return found

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Per reason (and for the kept) the sampled pairs in the order of their keys; with thumbnails as JPEG bytes."""
        listed = {reason: [sample for _, _, sample in heap] for reason, heap in self._samples.items()}
        return {reason: sorted(each, key=lambda pair: (pair["shard"], pair["key"])) for reason, each in listed.items()}

    def _sample(self, found: Found, verdict: Verdict) -> None:
        """Keep the pairs with the smallest hashes: which they are depends on nothing but the data."""
        rank = -content_hash(found.shard.encode(), found.key.encode("utf-8", "replace"))
        heap = self._samples[verdict.reason or KEPT]
        if len(heap) == _EXAMPLES and rank <= heap[0][0]:
            return
        sample = {"shard": found.shard, "key": found.key, "detail": verdict.detail, "caption": _caption(found, verdict)}
        sample["thumbnail"] = _thumbnail(found, verdict)
        push = heapq.heappush if len(heap) < _EXAMPLES else heapq.heapreplace
        push(heap, (rank, self.seen, sample))


def write_report(
    out: Path, tally: Tally, sources: list[str], notes: list[str], shards: list[dict[str, object]]
) -> dict[str, Any]:
    """Write both files, the JSON last, for it says that the ingest is finished: without a kept pair it is not written.

    Returns what it holds.
    """
    samples = tally.samples()
    report = {
        "format_version": FORMAT_VERSION,
        "sources": sources,
        "recipe": tally.recipe.model_dump(mode="json"),
        "seen": tally.seen,
        "kept": tally.kept,
        "dropped": dict(tally.dropped.most_common()),
        "captions_dropped_of_kept_pairs": dict(tally.lost_captions.most_common()),
        "languages": dict(tally.languages.most_common()),
        "notes": notes,
        "examples": {
            reason: [{key: pair[key] for key in ("shard", "key", "detail", "caption")} for pair in samples[reason]]
            for reason in tally.dropped
        },
        "histograms": tally.histograms(),
        "shards": shards,
    }
    write_atomically(out / PAGE, _page(report, samples).encode("utf-8", "replace"))
    if tally.kept:
        write_json(out / REPORT, report)
    return report


def _page(report: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> str:
    environment = Environment(
        loader=PackageLoader("vilg.pictures", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    shown = {
        reason: [pair | {"thumbnail": _base64(pair["thumbnail"])} for pair in samples[reason]]
        for reason in [*report["dropped"], KEPT]
        if samples.get(reason)
    }
    charts = [
        {"title": histogram["title"], "data": _base64(histogram_png(histogram))}
        for histogram in report["histograms"].values()
    ]
    return environment.get_template("ingest.html").render(report=report, samples=shown, charts=charts, kept=KEPT)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _fate(measure: str, verdict: Verdict) -> str:
    if verdict.reason is None:
        return KEPT
    return "dropped_here" if verdict.reason in MEASURES[measure].reasons else "dropped_elsewhere"


def _caption(found: Found, verdict: Verdict) -> str:
    text = verdict.captions[0] if verdict.captions else found.fields.get("txt", b"").decode("utf-8", "replace")
    return text if len(text) <= _MOST_CAPTION else text[: _MOST_CAPTION - 1] + "…"


def _thumbnail(found: Found, verdict: Verdict) -> bytes:
    """A small JPEG of the middle of the image; nothing where it cannot be decoded."""
    try:
        pixels = decode_image(found.fields.get(verdict.image_field, b""), _THUMBNAIL)
    except BadImage:
        return b""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=80)
    return file.getvalue()
