"""DeepSpeed's pipeline engine behind the engine's calls: the same step as `deepspeed_engine.py`, its layers in stages.

Every rank is given its data rank's micro-batches, so that target counts, dropout seeds and probes need no exchange;
only the first stage reads inputs from them, and only the last one targets.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from vilg.config.schema import Recipe
from vilg.parallel.grid import Grid
from vilg.tokens.sequence import SequenceBatch, SequenceSpec
from vilg.train import optim
from vilg.train.deepspeed_engine import DeepSpeedEngine, import_deepspeed, silent
from vilg.train.reconstruction import begin_evaluation, begin_step, finish_step
from vilg.train.step import StepPlan, StepResult, dropout_seeds, spoil_spike, step_result


def build_stage(recipe: Recipe, spec: SequenceSpec, grid: Grid, device: torch.device) -> nn.Module:
    """This rank's `VilgPipe`, in fp32. Its parameters are NaN until filled."""
    import_deepspeed(device)
    from vilg.model.pipe import VilgPipe

    with silent():
        return VilgPipe(
            recipe.model, spec, grid=grid, factor=recipe.batch.global_size // recipe.batch.micro_size,
            z_loss=recipe.loss.z_loss > 0,
        )  # fmt: skip


class PipelineEngine(DeepSpeedEngine):
    """One optimizer step is DeepSpeed's `train_batch`: micro-batches flow through the stages, one forward and one
    backward at a time.

    ZeRO 0 or 1. Results are the same numbers on all ranks.
    """

    def train_step(self, batches: Sequence[SequenceBatch], plan: StepPlan) -> StepResult:
        optim.set_learning_rate(self.engine.optimizer, plan.lr)
        loss = self.model.loss_fn
        loss.reconstruct = self.reconstruction
        batches = begin_step(self.reconstruction, plan, batches)
        loss.begin(len(batches), finish=partial(spoil_spike, plan=plan, grid=self.grid))
        with silent():  # it prints its first step
            self.engine.train_batch(data_iter=self._micro_batches(batches, plan))
        norm, skipped = self._plain_step() if self.stage == 0 else self._zero_outcome()
        sums = loss.sums.to(self.device)
        self._add_over_ranks(sums)
        figures = finish_step(self.reconstruction, skipped=skipped)
        return step_result(sums, plan, grad_norm=norm, skipped=skipped, figures=figures)

    def evaluate(self, batches: Sequence[SequenceBatch], plan: StepPlan) -> StepResult:
        loss = self.model.loss_fn
        batches, loss.reconstruct = begin_evaluation(self.reconstruction, batches)
        loss.begin(len(batches), finish=None)
        micro_batches = self._micro_batches(batches, plan)
        self.engine.reset_activation_shape()  # buffers between stages; these micro-batches may be larger than a step's
        self.engine.eval_batch(micro_batches, reduce_output=None, bcast_loss=False, num_micro_batches=len(batches))
        self.engine.reset_activation_shape()
        for held in self.engine.pipe_buffers.values():
            held[:] = [None] * len(held)  # else the last outputs would stay until a step overwrites them
        self.engine.train()
        sums = loss.sums.to(self.device)
        self._add_over_ranks(sums)
        return step_result(sums, plan)

    def _add_over_ranks(self, sums: torch.Tensor) -> None:
        dist.all_reduce(sums, group=self.grid.pipeline_group)  # zero on all stages but the last
        super()._add_over_ranks(sums)

    def _micro_batches(self, batches: Sequence[SequenceBatch], plan: StepPlan) -> Iterator[tuple]:
        from vilg.model.pipe import pipe_inputs

        for index, batch in enumerate(batches):
            seeds = dropout_seeds(self.recipe, self.grid, plan, index, batch)
            with_images = self.reconstruction is not None
            yield pipe_inputs(batch, dropout_seeds=seeds, scales=plan.scales, with_images=with_images)

    def _wrap(self, deepspeed, model: nn.Module, optimizer: torch.optim.Optimizer):
        from deepspeed.runtime.pipe.schedule import OptimizerStep

        from vilg.model.pipe import DEEPSPEED_SETTINGS

        self.config["pipeline"] = {**self.config.get("pipeline", {}), **DEEPSPEED_SETTINGS}
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.config, dist_init_required=False
        )
        if self.stage == 0:  # as in the flat engine, `_plain_step` does it once the norm over all stages is known
            engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, OptimizerStep: lambda engine: None}
        return engine

    def _apply_step(self) -> None:
        self.engine._exec_optimizer_step()

    def _leave_step_out(self) -> None:
        self.engine.zero_grad()
