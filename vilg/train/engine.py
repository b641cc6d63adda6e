"""The engine: a model and its optimizer behind five calls. Two forms, chosen by `parallel.engine`.

`torch` is one process of plain PyTorch: the reference whose numbers the DeepSpeed form must reproduce.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vilg.checkpoint.load import layout_note
from vilg.checkpoint.reader import Weights, open_weights
from vilg.checkpoint.reader.torch_files import MODEL_FILE, OPTIMIZER_FILE
from vilg.checkpoint.save import Files
from vilg.checkpoint.state import RunState
from vilg.checkpoint.tensors import host_copy, save_safetensors
from vilg.config.schema import Recipe
from vilg.errors import UserError
from vilg.model.block import compile_blocks, set_recompute
from vilg.model.vilg import Vilg
from vilg.parallel.grid import Grid
from vilg.parallel.precision import DTYPES
from vilg.tokens.sequence import SequenceBatch, SequenceSpec
from vilg.train import moved_state, optim
from vilg.train.reconstruction import Reconstruction, begin_evaluation, begin_step, finish_step
from vilg.train.step import (
    StepPlan,
    StepResult,
    dropout_seeds,
    evaluation_sums,
    micro_batch_loss,
    no_sums,
    spoil_spike,
    step_result,
)


class Engine(Protocol):
    """layout: what the checkpoint files depend on, the same keys as `RunState.layout`. optimizer_name: for people.
    reconstruction: what end-to-end training does beside it, None without.
    """

    model: Vilg
    layout: dict[str, Any]
    optimizer_name: str
    reconstruction: Reconstruction | None

    def train_step(self, batches: Sequence[SequenceBatch], plan: StepPlan) -> StepResult:
        """One optimizer step over this rank's micro-batches (host tensors)."""
        ...

    def evaluate(self, batches: Sequence[SequenceBatch], plan: StepPlan) -> StepResult:
        """The losses of the weights as they are, without dropout; nothing learns. plan: of these batches' targets. All
        ranks call it, with the same number of micro-batches."""
        ...

    def files(self, *, copy: bool) -> Files:
        """What this rank writes into a checkpoint. copy: of the state as it is now, on the host, so that training may go
        on; otherwise they must be written before the next step."""
        ...

    def load(self, folder: Path) -> None:
        """Continue from files of the same layout, exactly. Raises UserError naming a file that is missing or refused."""
        ...

    def load_state(self, weights: Weights) -> None:
        """Continue from files of any layout: every rank reads its part of weights and moments. Raises UserError."""
        ...


def load_checkpoint(
    engine: Engine, checkpoint: Path, state: RunState, parameters: dict[str, dict[str, Any]]
) -> str | None:
    """Weights and moments of a checkpoint of any layout; a note for people if the layout is another. Raises UserError.

    parameters: this run's `parameter_table`.
    """
    note = layout_note(state, engine.layout, parameters)
    if engine.reconstruction:
        engine.reconstruction.load(checkpoint)
    if note:
        engine.load_state(open_weights(checkpoint, state))
    else:
        engine.load(checkpoint)
    return note


def build_model(recipe: Recipe, spec: SequenceSpec, grid: Grid, device: torch.device) -> nn.Module:
    """This rank's part of the model, fp32, not filled: a `Vilg`, or a pipeline's stage, which has the same names."""
    if grid.pipeline_size == 1:
        model = Vilg(recipe.model, spec, grid=grid)
    else:
        from vilg.train.pipeline_engine import build_stage  # it takes seconds

        model = build_stage(recipe, spec, grid, device)
    set_recompute(model, recipe.parallel)
    if recipe.parallel.compile:
        compile_blocks(model)
    return model


def build_engine(
    recipe: Recipe, grid: Grid, model: Vilg, device: torch.device, reconstruction: Reconstruction | None = None
) -> Engine:
    """The form that the recipe names, around a model that holds its initial weights in fp32.

    reconstruction: needed with `model.reconstructor`.
    """
    if recipe.parallel.engine == "torch":
        if grid.world_size > 1:
            raise UserError(
                f"parallel.engine=torch is one process, but {grid.world_size} were started; "
                "use parallel.engine=deepspeed"
            )
        return TorchEngine(recipe, model, device, reconstruction)
    # Imported where they are used: it takes seconds.
    if grid.pipeline_size > 1:
        from vilg.train.pipeline_engine import PipelineEngine

        return PipelineEngine(recipe, grid, model, device, reconstruction)
    from vilg.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(recipe, grid, model, device, reconstruction)


class TorchEngine:
    """Plain PyTorch in one process. With bf16 the optimizer holds fp32 master weights, as ZeRO does."""

    def __init__(
        self, recipe: Recipe, model: Vilg, device: torch.device, reconstruction: Reconstruction | None = None
    ) -> None:
        if recipe.precision == "fp16":
            raise UserError("precision=fp16 needs DeepSpeed's loss scaling; use parallel.engine=deepspeed, or bf16")
        self.recipe, self.device, self.grid = recipe, device, Grid.single()
        self.reconstruction = reconstruction
        self.model = model.to(device, DTYPES[recipe.precision]).train()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.weights = list(self.model.parameters())
        masters = recipe.precision != "fp32"
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.weights] if masters else self.weights
        groups = optim.parameter_groups(list(zip(self.names, self.masters)), recipe.optimizer.weight_decay)
        self.optimizer, self.optimizer_name = optim.build_adamw(groups, recipe.optimizer, device)
        self.layout = dict(engine="torch", precision=recipe.precision, zero_stage=0, data=1, tensor=1, pipeline=1)

    def train_step(self, batches: Sequence[SequenceBatch], plan: StepPlan) -> StepResult:
        sums = no_sums(self.device)
        batches = begin_step(self.reconstruction, plan, batches)
        for master in self.masters:
            master.grad = None
        for index, batch in enumerate(batches):
            seeds = dropout_seeds(self.recipe, self.grid, plan, index, batch)
            on_device = batch.to(self.device)
            loss, parts = micro_batch_loss(self.model, on_device, plan, seeds, self.grid, self.reconstruction)
            sums += parts
            if index + 1 == len(batches):
                loss = spoil_spike(loss, sums, plan, self.grid)
            loss.backward()
            self._collect_gradients()
        norm = optim.gradient_norm(self.masters)
        skipped = not bool(norm.isfinite())
        if not skipped:
            optim.clip_gradients(self.masters, norm, self.recipe.optimizer.grad_clip)
            optim.set_learning_rate(self.optimizer, plan.lr)
            self.optimizer.step()
            self._spread_masters()
        figures = finish_step(self.reconstruction, skipped=skipped)
        return step_result(sums, plan, grad_norm=norm, skipped=skipped, figures=figures)

    def evaluate(self, batches: Sequence[SequenceBatch], plan: StepPlan) -> StepResult:
        batches, reconstruct = begin_evaluation(self.reconstruction, batches)
        sums = evaluation_sums(self.model, batches, plan, self.grid, self.device, reconstruct)
        return step_result(sums, plan)

    def files(self, *, copy: bool) -> Files:
        weights = {name: p.detach().contiguous() for name, p in zip(self.names, self.weights)}
        state = {}
        for name, master in zip(self.names, self.masters):
            state |= {f"{key}.{name}": value for key, value in self.optimizer.state[master].items()}
            if master.dtype != DTYPES[self.recipe.precision]:
                state[f"master.{name}"] = master.detach()
        written = {MODEL_FILE: weights, OPTIMIZER_FILE: state}
        if copy:
            written = {file: host_copy(tensors) for file, tensors in written.items()}
        return {file: partial(save_safetensors, tensors) for file, tensors in written.items()}

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(_read(folder / MODEL_FILE, self.device))
        by_name = dict(zip(self.names, self.masters))
        for key, tensor in _read(folder / OPTIMIZER_FILE, self.device).items():
            entry, name = key.split(".", 1)
            if name not in by_name:
                raise UserError(f"{folder / OPTIMIZER_FILE}: {key} belongs to no parameter of this model")
            if entry == "master":
                by_name[name].data.copy_(tensor)
            else:
                self.optimizer.state[by_name[name]][entry] = tensor

    def load_state(self, weights: Weights) -> None:
        masters = dict(zip(self.names, self.masters))
        moved_state.check_names(weights, masters)
        part = moved_state.part_reader(weights, self.grid)
        moved_state.fill_plain(self.optimizer, masters, part, steps=weights.optimizer_steps)
        self._spread_masters()

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        """Add the model's gradients to those of the fp32 masters, which accumulate over micro-batches."""
        if self.masters is self.weights:
            return
        for weight, master in zip(self.weights, self.masters):
            if weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None

    @torch.no_grad()
    def _spread_masters(self) -> None:
        if self.masters is not self.weights:
            for weight, master in zip(self.weights, self.masters):
                weight.copy_(master)


def _read(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use an earlier checkpoint") from None
