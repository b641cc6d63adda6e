"""What one optimizer step is asked to do, and the loss of one micro-batch: shared by both engines."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vilg.config.schema import Recipe
from vilg.model.loss import LOSS_SUMS, Reconstruct, loss_sums, nan_unless_finite
from vilg.parallel.grid import Grid
from vilg.parallel.rng import sequence_seeds
from vilg.tokens.sequence import SequenceBatch, target_images
from vilg.train.optim import learning_rate


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step. Target counts are of the global batch; a scale turns a sum of cross entropies into its part
    of the loss, so the loss is the same number however the batch is split. z_loss: coefficient of log^2 Z, summed as the
    cross entropies are. images: text -> image sequences of the global batch; reconstruction: weight of their decoded pixels'
    mean loss. loss_limit: above it the step is left out."""

    step: int
    lr: float
    text_targets: int
    image_targets: int
    text_scale: float
    image_scale: float
    z_loss: float = 0.0
    images: int = 0
    reconstruction: float = 0.0
    loss_limit: float = math.inf

    @property
    def scales(self) -> tuple[float, ...]:
        """Factors of `model.loss.LOSS_SUMS`, whose products add up to the loss. The adversarial one gives a gradient, but
        no number: it is no distance, and would look like spikes."""
        z_losses = self.z_loss * self.text_scale, self.z_loss * self.image_scale
        return self.text_scale, self.image_scale, *z_losses, self.reconstruction / max(1, self.images), 0.0

    def total(self, sums: Tensor) -> Tensor:
        """The loss of sums [6]."""
        return sum(part * scale for part, scale in zip(sums.unbind(), self.scales))


HELD_OUT = "val_"  # before the name of a loss of `StepResult`, where figures are kept: it is one of held-out pairs


@dataclass(frozen=True)
class StepResult:
    """What happened, over the global batch. loss is what was minimised; text_loss and image_loss are means in nats per
    target token, NaN without targets. Tensors are scalars on the device, so that reading them is left to the logger.

    skipped: the step was left out, weights and optimizer state are unchanged. grad_norm: before clipping. z_loss: the
    part of `loss` that is the z-loss. reconstruction_loss: mean over decoded images, unweighted. figures: what end-to-end
    training looks at beside it, for the log.
    """

    loss: Tensor
    text_loss: Tensor
    image_loss: Tensor
    grad_norm: Tensor | float
    skipped: bool
    lr: float
    z_loss: Tensor | float = 0.0
    reconstruction_loss: Tensor | float = math.nan
    figures: Mapping[str, Tensor | float] = field(default_factory=dict)


def plan_step(
    recipe: Recipe, step: int, *, text_targets: int, image_targets: int, loss_limit: float = math.inf
) -> StepPlan:
    """Scales by `loss.reduction`: `mean` divides by the direction's target tokens in the global batch, `sum` (the
    paper's eq. 3-5) by the pairs in it."""
    loss, pairs, end_to_end = recipe.loss, recipe.batch.global_size, recipe.model.reconstructor
    rows, columns = recipe.tokens.grid
    text_unit, image_unit = (text_targets, image_targets) if loss.reduction == "mean" else (pairs, pairs)
    return StepPlan(
        step=step,
        lr=learning_rate(step, recipe.optimizer, recipe.schedule),
        text_targets=text_targets,
        image_targets=image_targets,
        text_scale=loss.text_weight / max(1, text_unit),
        image_scale=loss.image_weight / max(1, image_unit),
        z_loss=loss.z_loss,
        images=image_targets // (rows * columns),
        reconstruction=end_to_end.weight * ramp(step, end_to_end.ramp_steps) if end_to_end else 0.0,
        loss_limit=loss_limit,
    )


def ramp(step: int, steps: int) -> float:
    """step / steps, at most 1: step 1 is the first to count, step `steps` counts in full."""
    return min(1.0, max(0, step) / max(1, steps))


def micro_batch_loss(
    forward: Callable[..., tuple[Tensor, ...]], batch: SequenceBatch, plan: StepPlan, seeds: Tensor | None, grid: Grid,
    reconstruct: Reconstruct | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The micro-batch's share of the loss (scalar with gradient), and its `loss_sums` in float64.

    seeds: of dropout; None for a model that is not training.
    """
    if reconstruct is None:
        logits, reconstructed = forward(*batch.inputs(), dropout_seeds=seeds), None
    else:
        *logits, states = forward(*batch.inputs(), dropout_seeds=seeds, with_states=True)
        reconstructed = reconstruct(states, batch.image_is_target, target_images(batch))
    sums = loss_sums(
        *logits, batch.text_target, batch.image_target, z_loss=plan.z_loss > 0, group=grid.tensor_group,
        reconstructed=reconstructed,
    )  # fmt: skip
    return nan_unless_finite(plan.total(sums)), sums.detach().double()


@torch.no_grad()
def evaluation_sums(
    model: nn.Module, batches: Sequence[SequenceBatch], plan: StepPlan, grid: Grid, device: torch.device,
    reconstruct: Reconstruct | None = None,
) -> Tensor:  # fmt: skip
    """`loss_sums` of this rank's micro-batches (host tensors) under the weights as they are, float64 [6]; nothing learns.

    model: a `Vilg`, or an engine that behaves as one.
    """
    sums = no_sums(device)
    model.eval()
    for batch in batches:
        sums += micro_batch_loss(model, batch.to(device), plan, None, grid, reconstruct)[1]
    model.train()
    return sums


def no_sums(device: torch.device | None = None) -> Tensor:
    """Where the sums of micro-batches are added up: float64 [6]."""
    return torch.zeros(len(LOSS_SUMS), dtype=torch.float64, device=device)


def spoil_spike(loss: Tensor, sums: Tensor, plan: StepPlan, grid: Grid) -> Tensor:
    """The last micro-batch's loss; NaN if that of the whole global batch is above the plan's limit.

    sums: of all this rank's micro-batches, float64 [6]. So a spike is known before its last backward pass, and
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


def step_result(
    sums: Tensor, plan: StepPlan, *, grad_norm: Tensor | float = math.nan, skipped: bool = False,
    figures: Mapping[str, Tensor | float] | None = None,
) -> StepResult:  # fmt: skip
    """From `loss_sums` over the global batch, float64 [6]."""
    text, image, text_z, image_z, reconstruction, _ = sums.unbind()
    loss, z_scales = plan.total(sums), plan.scales[2:4]
    return StepResult(
        loss=loss,
        text_loss=text / plan.text_targets if plan.text_targets else text + math.nan,
        image_loss=image / plan.image_targets if plan.image_targets else image + math.nan,
        grad_norm=grad_norm,
        skipped=skipped,
        lr=plan.lr,
        z_loss=text_z * z_scales[0] + image_z * z_scales[1],
        reconstruction_loss=reconstruction / plan.images if plan.images else math.nan,
        figures=figures or {},
    )


def count(batches: Sequence[SequenceBatch]) -> tuple[int, int, int]:
    """Text targets, image targets and filled slots of this rank's micro-batches; counted on the host."""
    counts = [batch.target_counts() for batch in batches]
    filled = sum(int(b.text_len.sum()) + b.image_input.numel() for b in batches)
    return sum(text for text, _ in counts), sum(image for _, image in counts), filled
