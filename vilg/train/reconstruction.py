"""End-to-end training beside an engine: decode the image slots' states, judge the pixels, send the gradient back.

    loss = generation + weight(step) * mean over images of (l1 |e| + mse e^2 + perceptual)      e = pixels - image

The adversarial term adds its gradient to the pixels', not its number to the loss. Gradients into the transformer are
multiplied by `balance`, those of the adversarial term by `adaptive`; both are ratios of norms over the global batch,
moving averages up to the step before, so that no layout or micro-batch changes them:

    balance  = |d generation / d states| / |d reconstruction / d states|          where generation and pixels part
    adaptive = |d pixel losses / d pixels| / |d adversarial / d pixels|           VQGAN's equation 7, at the pixels

A quantizer trained jointly (joint_quantizer.py) is called at the beginning of the step, before the model reads codes.

Legend: B sequences of a micro-batch, b of them text -> image, N image slots, C hidden, S side in pixels.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vilg.checkpoint.reconstructor_file import RECONSTRUCTOR_FILE, read_reconstructor_file, write_reconstructor_file
from vilg.checkpoint.save import Files
from vilg.checkpoint.tensors import host_copy
from vilg.config.schema import Recipe
from vilg.inference.format import RECONSTRUCTOR_FOLDER
from vilg.model.heads import Heads
from vilg.model.loss import Reconstruct
from vilg.model.reconstructor import Reconstructor, load_reconstructor
from vilg.parallel.grid import Grid
from vilg.tokens.sequence import SequenceBatch
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.images import to_float
from vilg.train.beside import Beside, sum_over_data
from vilg.train.branch import attach, watched
from vilg.train.joint_quantizer import JointQuantizer
from vilg.train.judge import Judge
from vilg.train.step import StepPlan

# Of `self.sums`: squared norms of the four gradients, discriminator's loss and penalty, adversarial loss, what `attach`
# was told, how often.
_GENERATION, _STATES, _PIXELS, _ADVERSARIAL, _DISCRIMINATOR_LOSS, _R1, _ADVERSARIAL_LOSS, _UPSTREAM, _TOLD = range(9)
_NORM_DECAY = 0.9
_LARGEST_ADAPTIVE = 1e4  # as VQGAN's
FIGURES = (
    "balance", "adaptive", "generation_gradient", "reconstruction_gradient", "reconstructor_grad_norm",
    "discriminator_grad_norm", "discriminator_loss", "r1_penalty", "adversarial_loss", "reconstructor_skipped",
    "discriminator_skipped",
)  # fmt: skip


class Reconstruction:
    """What an engine calls: `begin`, itself once for each micro-batch, `finish`. Ranks of pipeline stages without the
    heads have no `reconstructor`, and take part in `begin` and `finish` only. quantizer: None if it is frozen.

    Whoever calls it must hand the sums to a loss that is scaled by the plan (`StepPlan.scales`).
    """

    def __init__(
        self, recipe: Recipe, reconstructor: Reconstructor | None, heads: Heads | None, *, grid: Grid, device: torch.device,
        quantizer: JointQuantizer | None = None,
    ) -> None:  # fmt: skip
        self.config, self.base_lr, self.grid, self.device = recipe.model.reconstructor, recipe.optimizer.lr, grid, device
        self.sums = torch.zeros(9, device=device)
        self.norms = [0.0] * 4  # moving averages of the first four; 0: never seen
        self.quantizer = quantizer
        self.trained: Beside | None = None
        self.judge: Judge | None = None
        if reconstructor is None:
            return
        config = self.config
        self.reconstructor = reconstructor.to(device)
        self.trained = Beside(
            "reconstructor", self.reconstructor, betas=config.betas, grad_clip=config.grad_clip, ema=config.ema
        )
        self.judge = Judge(config, seed=recipe.seed, device=device)
        if not config.stop_gradient:
            heads.watch = self._watch

    def begin(self, plan: StepPlan, batches: Sequence[SequenceBatch]) -> Sequence[SequenceBatch]:
        """A new optimizer step over this rank's micro-batches; what the model is to read of them. All ranks call it."""
        self.plan = plan
        self.sums.zero_()
        generation, states, pixels, adversarial = self.norms
        self.balance = self.adaptive = 1.0
        if self.config.balance:
            self.balance = min(self.config.largest_balance, _ratio(generation, states))
        if self.config.adversarial.adaptive:
            self.adaptive = min(_LARGEST_ADAPTIVE, _ratio(pixels, adversarial))
        if self.config.stop_gradient:
            self.balance = 0.0
        if self.trained:
            self.trained.begin()
            self.judge.begin(plan.step)
        return self.quantizer(plan, batches) if self.quantizer else batches

    def __call__(self, states: Tensor, image_is_target: Tensor, images: Tensor) -> Tensor:
        """Sums over a micro-batch's decoded images, fp32 [2]: pixel losses, with their gradient at `states`, and the
        adversarial loss, without. Gradients of reconstructor and discriminator are added up.

        states [B, N, C]; image_is_target [B]; images uint8 [b, S, S, 3] of the sequences where that is 1.
        """
        count = len(images)
        if count == 0:
            return torch.stack([self._attached(states, states.new_zeros(()).float()), states.new_zeros(()).float()])
        rows = _drawn_rows(image_is_target, count)
        with torch.enable_grad():
            inputs = states.detach()[rows].float().requires_grad_()
            pixels = self.reconstructor(inputs)
            verdict = self.judge(pixels.detach(), to_float(images).to(pixels.device), share=1 / self.plan.images)
            weight = self.judge.adversarial_weight * self.adaptive
            gradient = verdict.pixel_gradient
            if verdict.adversarial_gradient is not None:
                gradient = gradient + weight * verdict.adversarial_gradient
            # Scaled to the global batch's mean here, and back below: the parameters' gradients are then the mean's.
            pixels.backward(gradient / self.plan.images)
        at_states = inputs.grad * self.plan.images
        self.sums[_STATES] += at_states.square().sum()
        self.sums[_PIXELS] += verdict.pixel_gradient.square().sum()
        if verdict.adversarial_gradient is not None:
            self.sums[_ADVERSARIAL] += verdict.adversarial_gradient.square().sum()
        self.sums[_DISCRIMINATOR_LOSS] += verdict.discriminator_loss
        self.sums[_R1] += verdict.r1_penalty
        self.sums[_ADVERSARIAL_LOSS] += verdict.adversarial_loss
        value = self._attached(states, verdict.pixel_loss, at_states * self.balance, rows)
        return torch.stack([value, verdict.adversarial_loss])

    def _attached(
        self, states: Tensor, value: Tensor, gradient: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """The value with its gradient at the states. Without pixels it is zero, but there: under ZeRO 3 ranks wait for
        each other in a backward that runs through other modules on some of them."""
        if self.config.stop_gradient:
            return value
        if gradient is None:
            gradient, rows = states.detach()[:0].float(), torch.zeros(0, dtype=torch.long, device=states.device)
        return attach(states, value, gradient, rows, self._note_upstream)

    @torch.no_grad()
    def evaluate(self, states: Tensor, image_is_target: Tensor, images: Tensor) -> Tensor:
        """The pixel losses as itself called gives them, fp32 [2] with 0 for the adversarial one; nothing learns."""
        none = states.new_zeros((), dtype=torch.float32)
        if len(images) == 0:
            return torch.stack([none, none])
        pixels = self.reconstructor(states[_drawn_rows(image_is_target, len(images))].float())
        return torch.stack([self.judge.pixel_loss(pixels, to_float(images).to(pixels.device)), none])

    def finish(self, *, skipped: bool) -> dict[str, float]:
        """Update reconstructor and discriminator, unless the engine left its step out; `FIGURES` of the step, the same on
        all ranks. All ranks call it."""
        found = dict.fromkeys(FIGURES, 0.0)
        if self.trained:
            found |= self._update(skipped)
        if self.grid.pipeline_group is not None:
            shared = torch.tensor([found[name] for name in FIGURES], dtype=torch.float64, device=self.device)
            dist.all_reduce(shared, group=self.grid.pipeline_group)
            found = dict(zip(FIGURES, shared.tolist()))
        return found | (self.quantizer.finish(skipped=skipped) if self.quantizer else {})

    def _update(self, skipped: bool) -> dict[str, float]:
        if self.grid.sequence_parallel:  # each rank has seen its own slots
            dist.all_reduce(self.sums[_GENERATION], group=self.grid.tensor_group)
        players = [self.trained, *([self.judge.trained] if self.judge.active else [])]
        sum_over_data([*(g for player in players for g in player.gradients), self.sums], self.grid)
        lr_share = self.plan.lr / self.base_lr
        rates = (self.config.lr, self.config.adversarial.lr)
        steps = [(0.0, False) if skipped else p.step(lr * lr_share) for p, lr in zip(players, rates)]
        (norm, done), (judge_norm, judged) = (*steps, (0.0, True))[:2]
        sums, images = self.sums.tolist(), max(1, self.plan.images)
        # The engine's backward is scaled, by the data size and perhaps by fp16's loss scale: `attach` was told by how much.
        scale = sums[_UPSTREAM] / sums[_TOLD] / self.plan.scales[4] if sums[_TOLD] else math.inf
        norms = [math.sqrt(sums[_GENERATION]) / scale, *(math.sqrt(sums[i]) / images for i in (1, 2, 3))]
        if not skipped and all(map(math.isfinite, norms)):
            self.norms = [
                _NORM_DECAY * old + (1 - _NORM_DECAY) * new if old else new for old, new in zip(self.norms, norms)
            ]
        return {
            "balance": self.balance,
            "adaptive": self.adaptive if self.judge.active else 0.0,
            "generation_gradient": norms[_GENERATION],
            "reconstruction_gradient": norms[_STATES],
            "reconstructor_grad_norm": norm,
            "discriminator_grad_norm": judge_norm,
            "discriminator_loss": sums[_DISCRIMINATOR_LOSS] / images,
            "r1_penalty": sums[_R1] / images,
            "adversarial_loss": sums[_ADVERSARIAL_LOSS] / images,
            "reconstructor_skipped": float(not done),
            "discriminator_skipped": float(not judged),
        }

    def _watch(self, states: Tensor, first: int) -> Tensor:
        """For `Heads.watch`. Outside a step (probes, samples) nothing has a gradient, and nothing is noted."""

        def note(squared: Tensor) -> None:
            self.sums[_GENERATION] += squared

        return watched(states, first, note) if torch.is_grad_enabled() else states

    def _note_upstream(self, upstream: Tensor) -> None:
        self.sums[_UPSTREAM] += upstream
        self.sums[_TOLD] += 1

    def files(self, *, copy: bool) -> Files:
        """What this rank writes into a checkpoint: one rank everything, the others nothing."""
        if not self.trained or self.grid.data_rank or self.grid.tensor_rank:
            return {}
        tensors = {**self.trained.state(), **self.judge.state(), **(self.quantizer.state() if self.quantizer else {})}
        tensors["norms"] = torch.tensor(self.norms, dtype=torch.float64)
        tensors = host_copy(tensors) if copy else tensors
        return {RECONSTRUCTOR_FILE: partial(write_reconstructor_file, tensors)}

    def load(self, checkpoint: Path) -> None:
        """Continue exactly from a checkpoint of any layout. Raises UserError."""
        if not (self.trained or self.quantizer):
            return
        tensors = read_reconstructor_file(checkpoint)
        if self.quantizer:
            self.quantizer.load(tensors, checkpoint / RECONSTRUCTOR_FILE)
        if not self.trained:
            return
        self.trained.load(tensors, checkpoint / RECONSTRUCTOR_FILE)
        self.judge.load(tensors, checkpoint / RECONSTRUCTOR_FILE)
        self.norms = tensors["norms"].tolist()


def build_reconstruction(
    recipe: Recipe, grid: Grid, model: nn.Module, image: ImageTokenizer, device: torch.device, *, fresh: bool
) -> Reconstruction | None:
    """What trains the recipe's reconstructor on this rank; its weights are those of a new run if `fresh`.

    image: is trained in place with `joint_quantizer`, so whoever holds it has the present one. Raises UserError.
    """
    if recipe.model.reconstructor is None:
        return None

    def quantizer() -> JointQuantizer | None:
        joint = recipe.model.reconstructor.joint_quantizer
        return JointQuantizer(recipe, image, model.spec, grid=grid, device=device) if joint else None

    heads = next((module for module in model.modules() if isinstance(module, Heads)), None)
    if heads is None:  # an earlier stage of a pipeline
        return Reconstruction(recipe, None, None, grid=grid, device=device, quantizer=quantizer())
    reconstructor = Reconstructor(recipe.model, image, recipe.tokens.grid)
    if fresh:
        reconstructor.reset_mapping(image, recipe.seed)
        if recipe.init_from is not None and (recipe.init_from / RECONSTRUCTOR_FOLDER).is_dir():
            reconstructor = load_reconstructor(
                recipe.init_from / RECONSTRUCTOR_FOLDER, recipe.model, image, recipe.tokens.grid, "cpu"
            ).requires_grad_(True)
    return Reconstruction(recipe, reconstructor.train(), heads, grid=grid, device=device, quantizer=quantizer())


def begin_step(
    reconstruction: Reconstruction | None, plan: StepPlan, batches: Sequence[SequenceBatch]
) -> Sequence[SequenceBatch]:
    """`begin`, where there is one; else the same batches."""
    return reconstruction.begin(plan, batches) if reconstruction else batches


def finish_step(reconstruction: Reconstruction | None, *, skipped: bool) -> dict[str, float]:
    """`finish`, where there is one; else nothing."""
    return reconstruction.finish(skipped=skipped) if reconstruction else {}


def begin_evaluation(
    reconstruction: Reconstruction | None, batches: Sequence[SequenceBatch]
) -> tuple[Sequence[SequenceBatch], Reconstruct | None]:
    """What the model is to read of this rank's micro-batches: under the codes of now, where an image tokenizer is trained;
    and what judges the pixels. All ranks call it."""
    if reconstruction is None:
        return batches, None
    quantizer = reconstruction.quantizer
    return [quantizer.recode(batch) for batch in batches] if quantizer else batches, reconstruction.evaluate


def _drawn_rows(image_is_target: Tensor, count: int) -> Tensor:
    """Places of the `count` sequences of a micro-batch whose image is the target, in their order, int64 [count]."""
    return image_is_target.argsort(descending=True, stable=True)[:count]


def _ratio(wanted: float, found: float) -> float:
    """wanted / found of two norms; 0 as long as one was never seen, so that nothing unmeasured counts."""
    return wanted / found if found else 0.0
