"""Training under several layouts, stopped and continued, for the tests and benchmarks of checkpoints that move."""

import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.golden.make import DEBUG_RECIPE, ROOT
from vilg.checkpoint.load import latest_checkpoint
from vilg.checkpoint.reader import KINDS, Kind, open_weights
from vilg.checkpoint.save import CHECKPOINTS, LATEST
from vilg.config import load_recipe
from vilg.errors import UserError

Overrides = dict[str, object]


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes and the ZeRO stage; engine torch is one process without DeepSpeed."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 0
    engine: str = "deepspeed"

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        return "torch" if self.engine == "torch" else f"t{self.tensor}p{self.pipeline}d{self.data}z{self.zero}"

    def overrides(self) -> Overrides:
        """What a recipe says to run under it."""
        return {
            "parallel.engine": self.engine,
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "parallel.deepspeed": ROOT / "ds_configs" / f"zero{self.zero}.json",
        }


@dataclass(frozen=True)
class Job:
    """One start of a run. stop_after: step after which a SIGTERM arrives. save_first: save again before the first step,
    so that what was loaded can be looked at. accept: keys of --accept."""

    overrides: Overrides
    stop_after: int | None = None
    save_first: bool = False
    accept: tuple[str, ...] = ()


def train_jobs(rank: int, world_size: int, jobs: Sequence[Job]) -> list[str | None]:
    """Run the jobs one after another in one process group; the error message of each, None if it had none."""
    from vilg.train.distributed import distributed

    with distributed(torch.device("cpu")) as ranks:
        return [_train(job, ranks) for job in jobs]


def _train(job: Job, ranks) -> str | None:
    from vilg.train import loop
    from vilg.train.run import Run

    finish, open_run = Run.finish_step, loop.open_run

    def finish_and_stop(self, plan, result, tokens):
        finish(self, plan, result, tokens)
        if plan.step == job.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def open_and_save(*args, **kwargs):
        run = open_run(*args, **kwargs)
        if run and job.save_first:
            run.saved_step = None
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish_step", finish_and_stop)
        patch.setattr(loop, "open_run", open_and_save)
        try:
            overrides = [f"{key}={value}" for key, value in job.overrides.items()]
            recipe = load_recipe(DEBUG_RECIPE, overrides, world_size=ranks.world_size)
            loop.train(recipe, ranks, torch.device("cpu"), accept=job.accept)
        except UserError as error:
            return str(error)
    return None


def branch(run: Path, checkpoint: str, out: Path) -> Path:
    """A copy of a run folder as it was when `checkpoint` was its latest one."""
    (out / CHECKPOINTS).mkdir(parents=True)
    shutil.copytree(run / CHECKPOINTS / checkpoint, out / CHECKPOINTS / checkpoint)
    shutil.copytree(run / "logs", out / "logs")
    shutil.copy(run / "config.yaml", out)
    (out / LATEST).write_text(checkpoint + "\n")
    return out


def differing(a: Path, b: Path, kinds: Sequence[Kind] = KINDS) -> list[str]:
    """`name/kind` of every tensor that is not the same number for number in two checkpoints."""
    left, right = open_weights(a), open_weights(b)
    assert left.names == right.names and left.optimizer_steps == right.optimizer_steps
    return [
        f"{name}/{kind}"
        for name in left.names
        for kind in kinds
        if not torch.equal(left.read(name, kind=kind), right.read(name, kind=kind))
    ]


def distance(a: Path, b: Path, kind: Kind) -> float:
    """Norm of the difference of all tensors of a kind, relative to the norm of `b`'s."""
    left, right = open_weights(a), open_weights(b)
    pairs = [(left.read(name, kind=kind).double(), right.read(name, kind=kind).double()) for name in right.names]
    squares = [(float((x - y).square().sum()), float(y.square().sum())) for x, y in pairs]
    return (sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5


def latest(run: Path) -> Path:
    """The run's latest checkpoint, which must be there."""
    found = latest_checkpoint(run)
    assert found is not None, f"{run} has no checkpoint"
    return found
