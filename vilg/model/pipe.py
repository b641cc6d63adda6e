"""The model's one list of layers as DeepSpeed pipeline stages: the same layers, parameter names and initial weights.

What travels between layers, and so between stages, is a tuple of tensors:

    into Embed      text_input [B, T], image_input [B, N], text_len, text_prefix, image_is_target [B], dropout_seeds [B]
    between blocks  hidden [B, S, C], text_len, text_prefix, image_is_target [B], dropout_seeds [B]
    out of Heads    text_logits [B, T, Vt], image_logits [B, N, Vi]; with a reconstructor states [B, N, C] too
    labels          text_target [B, T], image_target [B, N], scales fp32 [6]; then image_is_target [B], images uint8 too

Only `hidden` is floating, so only its gradient is sent back. Importing this module imports DeepSpeed (seconds); nothing
else does. DeepSpeed runs it with ZeRO 0 or 1 only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from vilg.config.schema import ModelConfig
from vilg.model.attention import SparseAttend
from vilg.model.block import Block
from vilg.model.embed import Embed
from vilg.model.heads import Heads
from vilg.model.loss import LOSS_SUMS, Reconstruct, loss_sums, nan_unless_finite
from vilg.model.size import stage_bounds, stage_costs
from vilg.model.vilg import fill_parameters, layer_list
from vilg.parallel import layout
from vilg.parallel.grid import Grid
from vilg.parallel.ops import Group
from vilg.tokens.sequence import SequenceBatch, SequenceSpec, target_images

Tensors = tuple[Tensor, ...]

# The "pipeline" section of the DeepSpeed config. Reentrant checkpointing fails on integer inputs. Partitioned transfers
# (DeepSpeed's default under tensor parallelism) take `hidden` to be the same on all tensor ranks, which with sequence
# parallelism it is not: the loss would be wrong without an error.
DEEPSPEED_SETTINGS = {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False}


class SharedAttend:
    """One attention plan per micro-batch for all blocks of a stage: the last is kept while its tensors are the same."""

    def __init__(self, grid: tuple[int, int], conv_size: int):
        self.grid, self.conv_size = grid, conv_size
        self.samples: Tensors = ()
        self.attend: SparseAttend | None = None

    def of(self, *samples: Tensor) -> SparseAttend:
        """`SparseAttend` of text_len, text_prefix, image_is_target."""
        if self.attend is None or any(a is not b for a, b in zip(samples, self.samples)):
            self.samples, self.attend = samples, SparseAttend(self.grid, *samples, conv_size=self.conv_size)
        return self.attend


class PipeEmbed(Embed):
    """Embed between tuples."""

    def forward(self, inputs: Tensors) -> Tensors:
        text_input, image_input, text_len, text_prefix, image_is_target, dropout_seeds = inputs
        hidden = super().forward(text_input, image_input, text_prefix, image_is_target)
        return hidden, text_len, text_prefix, image_is_target, dropout_seeds


class PipeBlock(Block):
    """Block between tuples."""

    def __init__(self, *, shared_attend: SharedAttend, **arguments):
        super().__init__(**arguments)
        self.shared_attend = shared_attend

    def forward(self, inputs: Tensors) -> Tensors:
        hidden, *samples, dropout_seeds = inputs
        hidden = super().forward(hidden, self.shared_attend.of(*samples), dropout_seeds)
        return hidden, *samples, dropout_seeds


class PipeHeads(Heads):
    """Heads behind a tuple."""

    def __init__(self, config: ModelConfig, spec: SequenceSpec, **place):
        super().__init__(config, spec, **place)
        self.with_states = config.reconstructor is not None

    def forward(self, inputs: Tensors) -> Tensors:
        return super().forward(inputs[0], with_states=self.with_states)


class PipeLoss:
    """Loss of one micro-batch on the last stage: scales [6] times its sums (`LOSS_SUMS`), added up, times `factor`.

    factor: micro-batches * data size, which undoes DeepSpeed's averaging over both; gradients are then those of the sum
    over the global batch. `sums` adds up these sums, fp64 [6] on this rank, since `begin`; it stays zero on all stages
    but the last. reconstruct: the last two of them, if anybody trains a reconstructor.
    """

    reconstruct: Reconstruct | None = None

    def __init__(self, *, group: Group, factor: int, z_loss: bool):
        self.group, self.factor, self.z_loss = group, factor, z_loss
        self.begin(0, finish=None)

    def begin(self, micro_batches: int, *, finish: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        """A new step of so many micro-batches. finish(loss, sums): what the last one's loss becomes; None: what it is."""
        self.left, self.finish = micro_batches, finish
        self.sums = torch.zeros(len(LOSS_SUMS), dtype=torch.float64)

    def __call__(self, outputs: Tensors, labels: Tensors) -> Tensor:
        text_logits, image_logits, *states = outputs
        text_target, image_target, scales, *pictures = labels
        reconstructed = self.reconstruct(*states, *pictures) if self.reconstruct else None
        sums = loss_sums(
            text_logits, image_logits, text_target, image_target, z_loss=self.z_loss, group=self.group,
            reconstructed=reconstructed,
        )  # fmt: skip
        self.sums = self.sums.to(sums.device) + sums.detach()
        self.left -= 1
        loss = nan_unless_finite((sums * scales).sum())
        return (self.finish(loss, self.sums) if self.finish and self.left == 0 else loss) * self.factor


class VilgPipe(PipelineModule):
    """This rank's stage, for `deepspeed.initialize` with `DEEPSPEED_SETTINGS`. Parameters have the names of `Vilg` and
    are NaN until filled. Stages are cut by `size.stage_costs`.

    factor, z_loss: see `PipeLoss`, which is `self.loss_fn`. `torch.distributed` must be initialised, `grid` built with
    `pipeline` > 1, LOCAL_RANK set.
    """

    def __init__(
        self, config: ModelConfig, spec: SequenceSpec, *, grid: Grid, factor: int, z_loss: bool = False,
        device=None, dtype=None,
    ):  # fmt: skip
        # Attributes that the base class needs while it builds; modules may only be set after nn.Module.__init__.
        object.__setattr__(self, "bounds", stage_bounds(stage_costs(config, spec), grid.pipeline_size))
        super().__init__(
            layers=layer_specs(config, spec, grid=grid, device=device, dtype=dtype),
            topology=PipeModelDataParallelTopology(
                num_pp=grid.pipeline_size, num_mp=grid.tensor_size, num_dp=grid.data_size
            ),
            loss_fn=PipeLoss(group=grid.tensor_group, factor=factor, z_loss=z_loss),
        )
        self.config, self.spec, self.grid = config, spec, grid
        layout.mark_parameters(self, size=grid.tensor_size)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Layers go under `layers`, so that parameters have the names of `Vilg`."""
        if not name.isdigit():
            return super().add_module(name, module)
        if "layers" not in self._modules:
            super().add_module("layers", nn.ModuleDict())
        self.layers[name] = module

    def _partition_layers(self, method: str = "cost") -> None:
        # DeepSpeed's own methods count layers, or build every layer on every rank to count parameters.
        self.parts = list(self.bounds)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def forward(self, *inputs: Any, dropout_seeds: Tensor | None = None) -> Tensors:
        """With one tuple, as DeepSpeed's engine calls it: this stage's layers, for training.

        With the five inputs of `Vilg.forward`: what that gives, through all stages, on every rank, without gradients;
        all ranks must call it.
        """
        if len(inputs) == 1:
            return super().forward(*inputs)
        with torch.no_grad():
            return self._through_stages(inputs, dropout_seeds)

    def _through_stages(self, inputs: Tensors, dropout_seeds: Tensor | None) -> Tensors:
        text_input, image_input = inputs[:2]
        batch, size = len(text_input), self.grid.tensor_size
        slots = self.spec.num_slots // (size if self.grid.sequence_parallel else 1)
        between = [(batch, slots, self.config.hidden_size)]
        logits = [
            (*text_input.shape, self.spec.text_vocab_size // size),
            (*image_input.shape, self.spec.image_vocab_size // size),
        ]
        passed = (*inputs, torch.zeros_like(inputs[2]) if dropout_seeds is None else dropout_seeds)
        weight = next(self.parameters())
        sources = dist.get_process_group_ranks(self.grid.pipeline_group)
        for stage, source in enumerate(sources):
            shapes = logits if stage + 1 == len(sources) else between
            if stage == self.grid.pipeline_rank:
                passed = super().forward(passed)
                found = [x.contiguous() for x in passed[: len(shapes)]]
            else:
                found = [weight.new_empty(shape) for shape in shapes]
            for x in found:
                dist.broadcast(x, source, group=self.grid.pipeline_group)
            passed = (*found, *inputs[2:], passed[-1])
        return found[0], found[1]

    def reset_parameters(self, seed: int) -> None:
        """Fill this stage's parameters with the initial weights of run seed `seed`: those that `Vilg` would have."""
        fill_parameters(self, self.config, seed, grid=self.grid)


def layer_specs(
    config: ModelConfig, spec: SequenceSpec, *, grid: Grid, device=None, dtype=None
) -> list[LayerSpec]:
    """The one list of layers, each to be built by the stage that holds it."""
    shared_attend = SharedAttend(spec.grid, config.conv_size)
    forms = {Embed: (PipeEmbed, {}), Block: (PipeBlock, dict(shared_attend=shared_attend)), Heads: (PipeHeads, {})}
    specs = []
    for layer, arguments in layer_list(config, spec, grid=grid, device=device, dtype=dtype):
        form, more = forms[layer]
        specs.append(LayerSpec(form, **arguments, **more))
    return specs


def pipe_inputs(
    batch: SequenceBatch, *, dropout_seeds: Tensor, scales: Sequence[float], with_images: bool = False
) -> tuple[Tensors, Tensors]:
    """(inputs, labels) of one micro-batch for DeepSpeed's data iterator; scales [6] as in `PipeLoss`."""
    labels = (batch.text_target, batch.image_target, torch.tensor(scales, dtype=torch.float32))
    if with_images:
        labels = (*labels, batch.image_is_target, target_images(batch))
    return (*batch.inputs(), dropout_seeds), labels
