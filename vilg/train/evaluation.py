"""Losses of held-out pairs while a run trains: the same pairs each time, under every layout and in every run.

They are read once, when the run starts: the first `evaluation.pairs` of the data set's order under a seed of its own, in
both directions, unless only one of them is trained; every caption is there, nothing is dropped. A loss is a mean over the
target tokens of all of them, so the number of ranks does not matter: where the pairs do not fill the micro-batches of all
ranks evenly, the rest is filled with sequences that have no target.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vilg.config.problems import rounded_up
from vilg.config.schema import DataConfig, Recipe
from vilg.data.loader import Blend, Loader, TokenDataset, open_data, parts_of
from vilg.errors import UserError
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks
from vilg.tokens.sequence import SequenceBatch, without_targets
from vilg.train.log import finite
from vilg.train.step import HELD_OUT, StepPlan, StepResult, count, plan_step

SEED = 0  # of the order, and of which caption a pair has: not the run's, so that runs of other seeds compare


@dataclass(frozen=True)
class Evaluation:
    """batches: this rank's micro-batches, on the host. Counts are of all data ranks together; bad: pairs that cannot be
    used, for which others stand, some of them twice."""

    recipe: Recipe
    batches: Sequence[SequenceBatch]
    pairs: int
    bad: int
    text_targets: int
    image_targets: int

    @classmethod
    def read(
        cls, recipe: Recipe, grid: Grid, ranks: Ranks, trained: "TokenDataset | Blend", **source: Any
    ) -> "Evaluation":
        """All ranks call it. trained, source: as `read_pairs`. Raises SharedError as that does."""
        pairs, batches, bad = ranks.together(lambda: read_pairs(recipe, grid, trained, **source))
        bad, text_targets, image_targets, _ = (n // grid.replicas for n in ranks.sum(bad, *count(batches)))
        return cls(recipe, batches, pairs, bad, text_targets, image_targets)

    def plan(self, step: int) -> StepPlan:
        """Scales of the loss at a step, which is then what training on pairs like these would have."""
        plan = plan_step(self.recipe, step, text_targets=self.text_targets, image_targets=self.image_targets)
        if self.recipe.loss.reduction == "mean":
            return plan
        # `sum` divides by the pairs of a batch, of which training sees a share in each direction; these are others, in both.
        per_pair = self.recipe.batch.global_size / self.pairs
        drawn = self.recipe.data.drawn_share if _is_mixed(self.recipe) else 1.0
        written = 1.0 - drawn if _is_mixed(self.recipe) else 1.0
        return replace(
            plan, text_scale=plan.text_scale * per_pair * written, image_scale=plan.image_scale * per_pair * drawn
        )

    def figures(self, result: StepResult) -> dict[str, float | None]:
        """For a row of metrics.jsonl: the losses of the directions there are, None where one is not finite."""
        wanted = {"loss": True, "text_loss": self.text_targets, "image_loss": self.image_targets}
        wanted["reconstruction_loss"] = self.recipe.model.reconstructor and self.image_targets
        return {HELD_OUT + name: finite(getattr(result, name)) for name, there in wanted.items() if there}


def open_held_out(recipe: Recipe, trained: "TokenDataset | Blend") -> tuple[TokenDataset, int]:
    """`evaluation.data`, and how many of its pairs are evaluated. Raises UserError if it cannot be read, has fewer, or is
    one of the data sets that are trained on."""
    dataset, wanted = open_data(_evaluated_data(recipe)), recipe.evaluation.pairs
    if wanted > dataset.num_samples:
        raise UserError(
            f"evaluation.pairs={wanted}, but {dataset.folder} holds {dataset.num_samples} pairs; use at most so many, or 0 "
            "for all"
        )
    for part in parts_of(trained):
        if part.manifest_hash == dataset.manifest_hash:
            raise UserError(
                f"evaluation.data={recipe.evaluation.data} holds the same shards as {part.folder}, which is trained on; name "
                "others"
            )
    return dataset, wanted or dataset.num_samples


def read_pairs(
    recipe: Recipe, grid: Grid, trained: "TokenDataset | Blend", *, quarantine: Path | None = None, **source: Any
) -> tuple[int, list[SequenceBatch], int]:
    """How many pairs, this rank's micro-batches of them (every rank has so many), and how many of these were bad.

    trained: the data of the run. quarantine: JSONL file for the bad ones. source: what `Loader` is given beside data and
    sizes. Raises UserError for data that do not fit the recipe, hold too few pairs, or too many bad ones.
    """
    dataset, pairs = open_held_out(recipe, trained)
    # A pair in both directions is two sequences where training has one; the forward passes stay as large as there.
    micro = -(-recipe.batch.micro_size // 2) if _is_mixed(recipe) else recipe.batch.micro_size
    filled = rounded_up(pairs, micro * grid.data_size)
    if quarantine is not None:
        quarantine.unlink(missing_ok=True)  # of the start before, which read the same
    loader = Loader(
        dataset, data_config=_evaluated_data(recipe), seed=SEED, global_size=filled, micro_size=micro,
        data_rank=grid.data_rank, data_size=grid.data_size, quarantine=quarantine, **source,
    )  # fmt: skip
    places = np.arange(filled).reshape(-1, grid.data_size, micro)[:, grid.data_rank]  # as the loader deals them out
    batches = [
        without_targets(batch, torch.from_numpy(np.repeat(mine >= pairs, len(batch) // micro)))
        for mine, batch in zip(places, next(iter(loader)), strict=True)
    ]
    bad = quarantine.read_text(encoding="utf-8").splitlines() if quarantine and quarantine.exists() else []
    return pairs, batches, sum(json.loads(line)["global_index"] < pairs for line in bad)


def _evaluated_data(recipe: Recipe) -> DataConfig:
    """How held-out pairs become sequences: as trained, but in all trained directions, without chance or workers."""
    return recipe.data.model_copy(
        update=dict(
            train=recipe.evaluation.data,
            blend=(),
            caption_dropout=0.0,
            workers=0,
            directions="both" if _is_mixed(recipe) else recipe.data.directions,
        )
    )


def _is_mixed(recipe: Recipe) -> bool:
    """Whether a pair gives one sequence in training, of either direction: here it gives both."""
    return recipe.data.directions == "alternate" and 0 < recipe.data.text_to_image_fraction < 1
