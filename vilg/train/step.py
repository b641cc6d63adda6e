"""What one optimizer step is asked to do, and the loss of one micro-batch: shared by both engines."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vilg.config.schema import Recipe
from vilg.model.loss import LOSS_SUMS, loss_sums, nan_unless_finite
from vilg.parallel.grid import Grid
from vilg.parallel.rng import sequence_seeds
from vilg.tokens.sequence import SequenceBatch
from vilg.train.optim import learning_rate


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step. Target counts are of the global batch; a scale turns a sum of cross entropies into its part
    of the loss, so the loss is the same number however the batch is split. z_loss: coefficient of log^2 Z, summed as the
    cross entropies are. loss_limit: above it the step is left out."""

    step: int
    lr: float
    text_targets: int
    image_targets: int
    text_scale: float
    image_scale: float
    z_loss: float = 0.0
    loss_limit: float = math.inf

    @property
    def scales(self) -> tuple[float, float, float, float]:
        """Factors of `model.loss.loss_sums`, whose products add up to the loss."""
        return self.text_scale, self.image_scale, self.z_loss * self.text_scale, self.z_loss * self.image_scale

    def total(self, sums: Tensor) -> Tensor:
        """The loss of sums [4]."""
        return sum(part * scale for part, scale in zip(sums.unbind(), self.scales))


@dataclass(frozen=True)
class StepResult:
    """What happened, over the global batch. loss is what was minimised; text_loss and image_loss are means in nats per
    target token, NaN without targets. Tensors are scalars on the device, so that reading them is left to the logger.

    skipped: the step was left out, weights and optimizer state are unchanged. grad_norm: before clipping. z_loss: the
    part of `loss` that is not cross entropy.
    """

    loss: Tensor
    text_loss: Tensor
    image_loss: Tensor
    grad_norm: Tensor | float
    skipped: bool
    lr: float
    z_loss: Tensor | float = 0.0


def plan_step(
    recipe: Recipe, step: int, *, text_targets: int, image_targets: int, loss_limit: float = math.inf
) -> StepPlan:
    """Scales by `loss.reduction`: `mean` divides by the direction's target tokens in the global batch, `sum` (the
    paper's eq. 3-5) by the pairs in it."""
    loss, pairs = recipe.loss, recipe.batch.global_size
    text_unit, image_unit = (text_targets, image_targets) if loss.reduction == "mean" else (pairs, pairs)
    return StepPlan(
        step=step,
        lr=learning_rate(step, recipe.optimizer, recipe.schedule),
        text_targets=text_targets,
        image_targets=image_targets,
        text_scale=loss.text_weight / max(1, text_unit),
        image_scale=loss.image_weight / max(1, image_unit),
        z_loss=loss.z_loss,
        loss_limit=loss_limit,
    )


def micro_batch_loss(
    forward: Callable[..., tuple[Tensor, Tensor]], batch: SequenceBatch, plan: StepPlan, seeds: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The micro-batch's share of the loss (scalar with gradient), and its `loss_sums` in float64."""
    logits = forward(*batch.inputs(), dropout_seeds=seeds)
    sums = loss_sums(
        *logits, batch.text_target, batch.image_target, z_loss=plan.z_loss > 0, group=grid.tensor_group
    )
    return nan_unless_finite(plan.total(sums)), sums.detach().double()


def no_sums(device: torch.device | None = None) -> Tensor:
    """Where the sums of micro-batches are added up: float64 [4]."""
    return torch.zeros(len(LOSS_SUMS), dtype=torch.float64, device=device)


def spoil_spike(loss: Tensor, sums: Tensor, plan: StepPlan, grid: Grid) -> Tensor:
    """The last micro-batch's loss; NaN if that of the whole global batch is above the plan's limit.

    sums: of all this rank's micro-batches, float64 [4]. So a spike is known before its last backward pass, and
    is left out as every non-finite step is: by all ranks together, without asking the device.
    """
    if plan.loss_limit == math.inf:
        return loss
    total = sums.clone()
    if grid.data_group is not None:
        dist.all_reduce(total, group=grid.data_group)
    return loss * torch.where(plan.total(total) > plan.loss_limit, math.nan, 1.0)


def dropout_seeds(recipe: Recipe, grid: Grid, plan: StepPlan, index: int, batch: SequenceBatch) -> Tensor:
    """Seeds of this rank's micro-batch number `index`: they follow the sequences' places in the global batch."""
    first = (index * grid.data_size + grid.data_rank) * len(batch)
    return sequence_seeds(recipe.seed, plan.step, first, len(batch))


def step_result(sums: Tensor, plan: StepPlan, *, grad_norm: Tensor | float, skipped: bool) -> StepResult:
    """From `loss_sums` over the global batch, float64 [4]."""
    text, image, *_ = sums.unbind()
    loss = plan.total(sums)
    return StepResult(
        loss=loss,
        text_loss=text / plan.text_targets if plan.text_targets else text + math.nan,
        image_loss=image / plan.image_targets if plan.image_targets else image + math.nan,
        grad_norm=grad_norm,
        skipped=skipped,
        lr=plan.lr,
        z_loss=loss - text * plan.text_scale - image * plan.image_scale,
    )


def count(batches: Sequence[SequenceBatch]) -> tuple[int, int, int]:
    """Text targets, image targets and filled slots of this rank's micro-batches; counted on the host."""
    counts = [batch.target_counts() for batch in batches]
    filled = sum(int(b.text_len.sum()) + b.image_input.numel() for b in batches)
    return sum(text for text, _ in counts), sum(image for _, image in counts), filled
