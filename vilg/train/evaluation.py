"""Losses of held-out pairs while a run trains: the same pairs each time, under every layout and in every run.

They are read once, when the run starts: the first `evaluation.pairs` of the data set's order under a seed of its own, in
both directions, unless only one of them is trained; every caption is there, nothing is dropped. A loss is a mean over the
target tokens of all of them, so the number of ranks does not matter: where the pairs do not fill the micro-batches of all
ranks evenly, the rest is filled with sequences that have no target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vilg.config.problems import rounded_up
from vilg.config.schema import DataConfig, Recipe
from vilg.data.loader import Loader, TokenDataset, open_data
from vilg.errors import UserError
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks
from vilg.tokens.sequence import SequenceBatch, without_targets
from vilg.train.sinks import HELD_OUT
from vilg.train.step import StepPlan, StepResult, count, plan_step

SEED = 0  # of the order, of which caption a pair has: not the run's, so that runs of other seeds compare


@dataclass(frozen=True)
class Evaluation:
    """batches: this rank's micro-batches, on the host. Counts are of all data ranks together; bad: pairs that could not be
    read, for which the next ones stand."""

    recipe: Recipe
    batches: Sequence[SequenceBatch]
    pairs: int
    bad: int
    text_targets: int
    image_targets: int

    @classmethod
    def read(cls, recipe: Recipe, grid: Grid, ranks: Ranks, **source: Any) -> "Evaluation":
        """All ranks call it. source: as `read_pairs`. Raises SharedError as that does."""
        pairs, batches, bad = ranks.together(lambda: read_pairs(recipe, grid, **source))
        replicas = grid.world_size // grid.data_size  # ranks that read the same data
        bad, text_targets, image_targets, _ = (n // replicas for n in ranks.sum(bad, *count(batches)))
        return cls(recipe, batches, pairs, bad, text_targets, image_targets)

    def plan(self, step: int) -> StepPlan:
        """Scales of the loss at a step, as a training step over these pairs would have them."""
        plan = plan_step(self.recipe, step, text_targets=self.text_targets, image_targets=self.image_targets)
        if self.recipe.loss.reduction == "mean":
            return plan
        share = self.recipe.batch.global_size / self.pairs  # `sum` divides by the pairs of a batch: these are others
        return replace(plan, text_scale=plan.text_scale * share, image_scale=plan.image_scale * share)

    def figures(self, result: StepResult) -> dict[str, float]:
        """For a row of metrics.jsonl: the losses of the directions there are, under the names of the training's."""
        wanted = {"loss": True, "text_loss": self.text_targets, "image_loss": self.image_targets}
        wanted["reconstruction_loss"] = self.recipe.model.reconstructor and self.image_targets
        return {HELD_OUT + name: float(getattr(result, name)) for name, there in wanted.items() if there}


def evaluated_data(recipe: Recipe) -> DataConfig:
    """How held-out pairs become sequences: as trained, but in all trained directions, without chance or workers."""
    data = recipe.data
    mixed = data.directions == "alternate" and 0 < data.text_to_image_fraction < 1
    return data.model_copy(
        update=dict(
            train=recipe.evaluation.data,
            blend=(),
            caption_dropout=0.0,
            workers=0,
            directions="both" if mixed else data.directions,
        )
    )


def open_held_out(recipe: Recipe) -> tuple[TokenDataset, int]:
    """`evaluation.data`, and how many of its pairs are evaluated. Raises UserError if it cannot be read, or has fewer."""
    dataset, wanted = open_data(evaluated_data(recipe)), recipe.evaluation.pairs
    if wanted > dataset.num_samples:
        raise UserError(
            f"evaluation.pairs={wanted}, but {dataset.folder} holds {dataset.num_samples} pairs; use at most so many, or 0 "
            "for all"
        )
    return dataset, wanted or dataset.num_samples


def read_pairs(recipe: Recipe, grid: Grid, **source: Any) -> tuple[int, list[SequenceBatch], int]:
    """How many pairs, this rank's micro-batches of them (every rank has so many), and how many of these were bad.

    source: what `Loader` is given beside data and sizes. Raises UserError for data that do not fit the recipe, hold too few
    pairs, or too many bad ones.
    """
    (dataset, pairs), micro = open_held_out(recipe), recipe.batch.micro_size
    filled = rounded_up(pairs, micro * grid.data_size)
    loader = Loader(
        dataset, data_config=evaluated_data(recipe), seed=SEED, global_size=filled, micro_size=micro, data_rank=grid.data_rank,
        data_size=grid.data_size, **source,
    )  # fmt: skip
    places = np.arange(filled).reshape(-1, grid.data_size, micro)[:, grid.data_rank]  # as the loader deals them out
    batches = [
        without_targets(batch, torch.from_numpy(np.repeat(mine >= pairs, len(batch) // micro)))
        for mine, batch in zip(places, next(iter(loader)), strict=True)
    ]
    return pairs, batches, loader.bad_samples.total()
