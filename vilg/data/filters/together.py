"""The filters that need other pairs or a model: duplicates, similarity. One process asks them, in the data's order."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vilg.config.ingest import IngestRecipe
from vilg.data.filters.duplicates import HashIndex
from vilg.data.filters.examine import Verdict
from vilg.data.filters.similarity import ClipScorer, Scorer
from vilg.data.sources import Found
from vilg.errors import UserError
from vilg.tokens.vqgan.images import decode_image


class Judge:
    """Remembers the kept pairs. scorer: for the similarity filter; without it the model that the recipe names."""

    def __init__(self, recipe: IngestRecipe, scorer: Scorer | None = None):
        exact, near = recipe.active("exact_duplicates"), recipe.active("near_duplicates")
        self._similarity = recipe.active("similarity")
        if scorer is not None and self._similarity is None:
            raise UserError("a scorer was given, but the recipe's similarity filter is off; write similarity.above")
        self._exact = HashIndex() if exact is not None else None
        self._near = HashIndex(near.distance) if near is not None else None
        if self._similarity is not None and scorer is None:
            scorer = ClipScorer(self._similarity.model, device=self._similarity.device)
        self._scorer = scorer

    @property
    def batch_size(self) -> int:
        """Pairs to be given at once."""
        return self._similarity.batch_size if self._similarity is not None else 1

    def judge(self, pairs: Sequence[tuple[Found, Verdict]]) -> list[Verdict]:
        """Final verdicts, in the order of the pairs. A duplicate repeats a pair that is kept, not a dropped one."""
        # Asked before the scores, which cost most, and again after, since a pair may repeat one of its own batch.
        verdicts = self._scored([(found, self._duplicate(verdict)) for found, verdict in pairs])
        final = []
        for verdict in verdicts:
            verdict = self._duplicate(verdict)
            if verdict.reason is None:
                if self._exact is not None:
                    self._exact.add(verdict.exact)
                if self._near is not None:
                    self._near.add(verdict.near)
            final.append(verdict)
        return final

    def _duplicate(self, verdict: Verdict) -> Verdict:
        if verdict.reason is not None:
            return verdict
        if self._exact is not None and verdict.exact in self._exact:
            return verdict.dropped("exact duplicate", "an equal one was kept before")
        if self._near is not None and verdict.near in self._near:
            return verdict.dropped("near duplicate", f"at most {self._near.distance} of 64 bits from one kept before")
        return verdict

    def _scored(self, pairs: list[tuple[Found, Verdict]]) -> list[Verdict]:
        verdicts = [verdict for _, verdict in pairs]
        wanted = [(i, caption) for i, v in enumerate(verdicts) if v.reason is None for caption in v.captions]
        if self._scorer is None or not wanted:
            return verdicts
        images = {
            i: decode_image(pairs[i][0].fields[verdicts[i].image_field], self._scorer.image_size)
            for i in dict.fromkeys(i for i, _ in wanted)
        }
        scores: dict[int, list[float]] = {}
        for first in range(0, len(wanted), self.batch_size):
            part = wanted[first : first + self.batch_size]
            found = self._scorer.score(np.stack([images[i] for i, _ in part]), [caption for _, caption in part])
            for (i, _), score in zip(part, found, strict=True):
                scores.setdefault(i, []).append(float(score))
        for i, values in scores.items():
            verdicts[i] = self._above(verdicts[i], values)
        return verdicts

    def _above(self, verdict: Verdict, scores: list[float]) -> Verdict:
        above = self._similarity.above
        kept = tuple(c for c, score in zip(verdict.captions, scores, strict=True) if score > above)
        measured = replace(verdict, measures=verdict.measures | {"similarity": max(scores)})
        if not kept:
            return measured.dropped("not similar", f"scores {max(scores):.3f}, needed is more than {above:g}")
        lost = ("not similar",) * (len(scores) - len(kept))
        return replace(measured, captions=kept, lost=verdict.lost + lost)
