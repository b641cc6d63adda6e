"""DeepSpeed behind the engine's five calls. Nothing else of vilg imports DeepSpeed for training.

The traps this file steps around are DeepSpeed 0.19's: a JIT build at start, optimizers that compile, pickles without
`weights_only`, prints, and scripts copied beside checkpoints.
"""

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vilg.checkpoint.reader import Weights
from vilg.checkpoint.save import Files
from vilg.checkpoint.tensors import DEEPSPEED_CLASSES, host_copy, load_tensors, save_tensors
from vilg.config.deepspeed import merged_deepspeed_config, offloads_optimizer, zero_stage
from vilg.config.schema import Recipe
from vilg.errors import UserError
from vilg.model.vilg import Vilg
from vilg.parallel.grid import Grid
from vilg.tokens.sequence import SequenceBatch
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


class DeepSpeedEngine:
    """ZeRO by the recipe's DeepSpeed file, with our AdamW as client optimizer and our schedule.

    All ranks must make every call together. Each micro-batch's loss is multiplied by the data size, which undoes
    DeepSpeed's averaging over data ranks: gradients are those of the global batch's loss.
    """

    def __init__(
        self, recipe: Recipe, grid: Grid, model: Vilg, device: torch.device, reconstruction: Reconstruction | None = None
    ) -> None:
        self.recipe, self.grid, self.device, self.reconstruction = recipe, grid, device, reconstruction
        config = merged_deepspeed_config(recipe, data_size=grid.data_size)
        self.stage = zero_stage(config)
        if self.stage == 0:
            config["gradient_clipping"] = 0.0  # stage 0 neither reports the norm nor skips; `_plain_step` does both
        self.layout = dict(
            engine="deepspeed",
            precision=recipe.precision,
            zero_stage=self.stage,
            data=grid.data_size,
            tensor=grid.tensor_size,
            pipeline=grid.pipeline_size,
        )
        deepspeed = import_deepspeed(device)
        if recipe.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise UserError(f"precision=fp16: DeepSpeed does not train in fp16 on {device.type}; use bf16 or fp32")
        model = model.to(device).train()
        groups = optim.parameter_groups(list(model.named_parameters()), recipe.optimizer.weight_decay)
        stepped_on = torch.device("cpu") if offloads_optimizer(config) else device
        optimizer, self.optimizer_name = optim.build_adamw(groups, recipe.optimizer, stepped_on)
        self.config = config
        with silent():
            self.engine = self._wrap(deepspeed, model, optimizer)
        self.model = model
        self.tensor_files = _checkpoint_engine()
        self.engine.checkpoint_engine = self.tensor_files

    def train_step(self, batches: Sequence[SequenceBatch], plan: StepPlan) -> StepResult:
        sums = no_sums(self.device)
        optim.set_learning_rate(self.engine.optimizer, plan.lr)
        batches = begin_step(self.reconstruction, plan, batches)
        for index, batch in enumerate(batches):
            seeds = dropout_seeds(self.recipe, self.grid, plan, index, batch)
            on_device = batch.to(self.device)
            loss, parts = micro_batch_loss(self.engine, on_device, plan, seeds, self.grid, self.reconstruction)
            sums += parts
            if index + 1 == len(batches):
                loss = spoil_spike(loss, sums, plan, self.grid)
            self.engine.backward(loss * self.grid.data_size, scale_wrt_gas=False)
            if index + 1 < len(batches) or self.stage > 0:
                self.engine.step()  # counts micro-batches; the last one updates the weights
        norm, skipped = self._plain_step() if self.stage == 0 else self._zero_outcome()
        self._add_over_ranks(sums)
        figures = finish_step(self.reconstruction, skipped=skipped)
        return step_result(sums, plan, grad_norm=norm, skipped=skipped, figures=figures)

    def evaluate(self, batches: Sequence[SequenceBatch], plan: StepPlan) -> StepResult:
        batches, reconstruct = begin_evaluation(self.reconstruction, batches)
        sums = evaluation_sums(self.engine, batches, plan, self.grid, self.device, reconstruct)
        self._add_over_ranks(sums)
        return step_result(sums, plan)

    def files(self, *, copy: bool) -> Files:
        self.tensor_files.copy = copy
        # DeepSpeed makes the folder that it believes it writes to, and leaves scripts there that unpickle.
        with tempfile.TemporaryDirectory() as unused, silent():
            self.engine.save_checkpoint(unused, tag="checkpoint", save_latest=False)
        (taken, failure), self.tensor_files.kept = self.tensor_files.kept, ({}, None)  # copies live until they are written
        if failure:  # only now: DeepSpeed has waited for all ranks inside
            raise failure
        return {name: partial(save_tensors, state) for name, state in taken.items()}

    def load(self, folder: Path) -> None:
        with silent():
            path, _ = self.engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        if path is None:
            raise UserError(f"{folder}: holds no DeepSpeed files that this layout reads")
        # The files carry the settings of the run that wrote them; the recipe's count.
        if self.stage > 0:
            self.engine.optimizer.clip_grad = self.recipe.optimizer.grad_clip
        optim.restore_settings(self.engine.optimizer, self.recipe.optimizer)

    def load_state(self, weights: Weights) -> None:
        named = dict(self.model.named_parameters())
        moved_state.check_names(weights, named)
        zero, part, steps = self.engine.optimizer, moved_state.part_reader(weights, self.grid), weights.optimizer_steps
        if self.stage == 0:
            moved_state.fill_plain(zero, named, part, steps=steps)
        elif self.stage < 3:
            moved_state.fill_flat(zero, named, part, steps=steps)
        else:
            names = {parameter: name for name, parameter in named.items()}
            moved_state.fill_cut(zero, names, part, data_rank=self.grid.data_rank, steps=steps)
        self.engine.global_steps = weights.state.step

    def _add_over_ranks(self, sums: torch.Tensor) -> None:
        """Sums of this rank's micro-batches become those of the global batch."""
        if self.grid.data_group is not None:
            dist.all_reduce(sums, group=self.grid.data_group)

    def _zero_outcome(self) -> tuple[torch.Tensor | float, bool]:
        """Norm before clipping and whether ZeRO left the step out; all ranks agree, for the norm is all-reduced."""
        return self.engine.get_global_grad_norm(), bool(self.engine.optimizer.overflow)

    def _wrap(self, deepspeed, model: Vilg, optimizer: torch.optim.Optimizer):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=self.config,
            mpu=self.grid if self.grid.tensor_size > 1 else None,
            dist_init_required=False,
        )
        return engine

    def _plain_step(self) -> tuple[torch.Tensor, bool]:
        """The last micro-batch's step without ZeRO: gradients are already summed over the data ranks."""
        weights = list(self.model.parameters())
        norm = self._norm_over_model_ranks(weights)
        skipped = not bool(norm.isfinite())
        if skipped:
            self._leave_step_out()
        else:
            optim.clip_gradients(weights, norm, self.recipe.optimizer.grad_clip)
            self._apply_step()
        return norm, skipped

    def _apply_step(self) -> None:
        self.engine.step()

    def _leave_step_out(self) -> None:
        self.engine.zero_grad()
        self.engine.set_gradient_accumulation_boundary(False)
        self.engine.step()
        self.engine.set_gradient_accumulation_boundary(None)

    def _norm_over_model_ranks(self, weights: list[torch.nn.Parameter]) -> torch.Tensor:
        """Over tensor ranks and stages; parameters that every tensor rank holds whole count once."""
        squared = optim.gradient_norm([p for p in weights if p.tensor_model_parallel]).square()
        if self.grid.tensor_group is not None:
            dist.all_reduce(squared, group=self.grid.tensor_group)
        squared = squared + optim.gradient_norm([p for p in weights if not p.tensor_model_parallel]).square()
        if self.grid.pipeline_group is not None:
            dist.all_reduce(squared, group=self.grid.pipeline_group)
        return squared.sqrt()


def import_deepspeed(device: torch.device):
    """DeepSpeed, initialised on the existing process group, warnings only."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no GPU
    with silent():
        import deepspeed
        import deepspeed.ops

        if device.type == "cpu":
            # Otherwise every fresh machine compiles `deepspeed_shm_comm` for a minute, or fails without a compiler;
            # only an inference call uses it. The table is private, so its absence only costs that minute.
            with contextlib.suppress(AttributeError, TypeError):
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # it was made while stdout was silenced
    return deepspeed


def _checkpoint_engine():
    """DeepSpeed's reader and writer of files, replaced: it keeps what is to be written for `Saver`, and unpickles only
    tensors."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = (loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum, fragment_address)
    assert {f"{c.__module__}.{c.__qualname__}" for c in classes} == set(DEEPSPEED_CLASSES)

    class TensorFiles(TorchCheckpointEngine):
        copy = False
        kept: tuple[dict[str, Any], Exception | None] = ({}, None)  # file name -> what it will hold; the first failure

        def save(self, state_dict: Any, path: str) -> None:
            taken, failure = self.kept
            try:
                taken = {**taken, Path(path).name: host_copy(state_dict) if self.copy else state_dict}
            except Exception as error:  # too little host memory; `files` raises it
                failure = failure or error
            self.kept = taken, failure

        def load(self, path: str, map_location: Any = None) -> Any:
            return load_tensors(path, map_location=map_location, classes=classes)

    return TensorFiles()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Swallow DeepSpeed's plain prints; its logger and all errors stay."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
