"""Claim: a save in the background stops training for no longer than the copy to host memory.

    python benchmarks/save_stall.py                  # one process, ZeRO 1, fp32, 20M parameters, 300 MB a checkpoint

One run saves every sixth step, in turn in the background and standing still, so that both meet the same machine.
Measured: how long `save` keeps the loop, and how long the steps take: ordinary ones, and those that run while the
background thread writes (on a CPU they share cores with it; on a GPU they would not). `copy` is the copy of the state
alone, `bare_copy` one memory copy of as many bytes. Medians, with the smallest and the largest value, into
benchmarks/results/save_stall.json.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.distributed.helpers import run_distributed
from tests.golden.make import DEBUG_RECIPE, ROOT, make_data
from vilg.checkpoint.load import latest_checkpoint
from vilg.checkpoint.state import read_state, source_commit, versions
from vilg.config import load_recipe

RESULT = Path(__file__).parent / "results" / "save_stall.json"
EVERY, SAVES = 6, 12
RECIPE = {
    "schedule.steps": EVERY * SAVES + EVERY // 2,
    "checkpoint.every_steps": EVERY,
    "checkpoint.keep_last": 1,
    "logging.every_steps": EVERY,
    "logging.tensorboard": "false",
    "model.num_layers": 6,
    "model.hidden_size": 512,
    "model.num_heads": 8,
    "batch.global_size": 4,
    "batch.micro_size": 4,
}


def measured_run(rank: int, world_size: int, overrides: dict[str, object]) -> dict[str, list[float]]:
    """Train; seconds of every step and save, by what they were."""
    from vilg.train import deepspeed_engine, loop
    from vilg.train.distributed import distributed
    from vilg.train.run import Run

    seconds: dict[str, list[float]] = defaultdict(list)
    last = [time.perf_counter()]
    save, finish, copy = Run.save, Run.finish_step, deepspeed_engine.host_copy

    def timed_finish(self, plan, result, tokens):
        finish(self, plan, result, tokens)
        now = time.perf_counter()
        kind = "step_while_writing" if self.saver.busy else "step"
        if plan.step % EVERY != 1:  # the first one after a save holds the end of it, or warms up
            seconds[kind].append(now - last[0])
        last[0] = now

    def timed_save(self, *, background=False):
        turn = self.step // EVERY
        counted = background and self.step and self.steps_left and turn > 2
        began = time.perf_counter()
        save(self, background=background and turn % 2 == 0)
        if counted:
            kind = "save_in_background" if turn % 2 == 0 else "save_standing_still"
            seconds[kind].append(time.perf_counter() - began)
        last[0] = time.perf_counter()

    def timed_copy(state):
        began = time.perf_counter()
        copied = copy(state)
        seconds["copy"].append(time.perf_counter() - began)
        return copied

    with pytest.MonkeyPatch.context() as patch, distributed(torch.device("cpu")) as ranks:
        patch.setattr(Run, "save", timed_save)
        patch.setattr(Run, "finish_step", timed_finish)
        patch.setattr(deepspeed_engine, "host_copy", timed_copy)
        changes = [f"{key}={value}" for key, value in overrides.items()]
        recipe = load_recipe(DEBUG_RECIPE, changes, world_size=world_size)
        loop.train(recipe, ranks, torch.device("cpu"))
    return dict(seconds)


def bare_copies(count: int) -> list[float]:
    """Seconds to copy so many bytes inside the memory, fresh pages each time, as a save needs them."""
    source, found = torch.ones(count, dtype=torch.uint8), []
    for _ in range(5):
        began = time.perf_counter()
        source.clone()
        found.append(time.perf_counter() - began)
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "smallest": min(values), "largest": max(values), "count": len(values)}


def main() -> int:
    with tempfile.TemporaryDirectory(dir=ROOT / "runs" if (ROOT / "runs").is_dir() else None) as scratch:
        folder = Path(scratch)
        overrides = {**make_data(folder), **RECIPE, "run_dir": folder / "run"}
        [seconds] = run_distributed(1, measured_run, (overrides,), init=False, timeout=1200)
        state = read_state(latest_checkpoint(folder / "run"))
    size = sum(state.files.values())
    # The two files of a rank are copied one after the other, so two copies make one save.
    seconds["copy"] = [a + b for a, b in zip(seconds["copy"][::2], seconds["copy"][1::2])]
    seconds["bare_copy"] = bare_copies(size)
    figures = {name: summary(values) for name, values in seconds.items()}
    for name, figure in figures.items():
        spread = f"{figure['smallest']:.3f} to {figure['largest']:.3f}, {figure['count']} times"
        print(f"{name:22} {figure['median']:8.3f} s  ({spread})")
    content = {
        "format_version": 1,
        "claim": "an asynchronous save stops training for the copy to host memory only",
        "command": "python benchmarks/save_stall.py",
        "commit": source_commit(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": None},
        "versions": versions(),
        "recipe": RECIPE,
        "checkpoint_bytes": size,
        "seconds": figures,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
