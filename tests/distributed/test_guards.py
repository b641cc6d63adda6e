"""Guards where they matter: several ranks that must decide alike, and one that no longer answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.helpers import free_port, rank_environment, run_distributed
from tests.golden.make import DEBUG_RECIPE, ROOT, make_data
from vilg.checkpoint.load import latest_checkpoint
from vilg.checkpoint.state import read_state
from vilg.config import load_recipe
from vilg.errors import TRY_AGAIN
from vilg.train.events import read_events
from vilg.train.watchdog import stacks_path

SMALL = {
    "model.num_layers": 2,
    "schedule.steps": 8,
    "schedule.warmup_steps": 2,
    "checkpoint.every_steps": 4,
    "logging.every_steps": 1,
    "logging.tensorboard": "false",
    "guards.spike_window": 8,
    "guards.recompute_every": 3,
    "guards.straggler_percent": 0.001,  # every rank but the fastest is one: the report itself is seen to work
}
LAYOUTS = {
    "data": {},
    "tensor": {"parallel.tensor": 2},
    "pipeline": {"parallel.pipeline": 2},
    "zero0": {"parallel.deepspeed": ROOT / "ds_configs" / "zero0.json"},
    "zero2 bf16": {"parallel.deepspeed": ROOT / "ds_configs" / "zero2.json", "precision": "bf16"},
    "zero3": {"parallel.deepspeed": ROOT / "ds_configs" / "zero3.json"},
    "tensor zero3 bf16": {
        "parallel.tensor": 2,
        "parallel.deepspeed": ROOT / "ds_configs" / "zero3.json",
        "precision": "bf16",
    },
    "pipeline bf16": {"parallel.pipeline": 2, "precision": "bf16"},
}
FAULTS = "nan@step2:rank1,spike@step6:rank1"


@pytest.fixture(scope="module")
def data(session_tmp):
    folder = session_tmp / "guard-data"
    folder.mkdir()
    return make_data(folder)


def train_all(rank: int, world_size: int, runs: list[dict[str, object]]) -> list[float]:
    """Train recipes one after another in one process group; a checksum of this rank's weights after each."""
    from vilg.train import loop, open as opening
    from vilg.train.distributed import distributed

    sums = []
    with distributed(torch.device("cpu")) as ranks, pytest.MonkeyPatch.context() as patch:
        made = []
        opened = opening.open_run
        patch.setattr(loop, "open_run", lambda *args, **options: made.append(opened(*args, **options)) or made[-1])
        patch.setenv("VILG_FAULT", FAULTS)
        for overrides in runs:
            recipe = load_recipe(DEBUG_RECIPE, [f"{k}={v}" for k, v in overrides.items()], world_size=world_size)
            loop.train(recipe, ranks, torch.device("cpu"))
            sums.append(sum(float(p.detach().double().sum()) for p in made[-1].engine.model.parameters()))
    return sums


def check_runs(data, folder: Path, names: list[str]) -> dict[str, Path]:
    """Train with both faults under these layouts, and check what must hold under every one."""
    runs = {name: {**data, **SMALL, **LAYOUTS[name], "guards.spike_action": "skip"} for name in names}
    for name, run in runs.items():
        run["run_dir"] = folder / name.replace(" ", "_")
    sums = run_distributed(2, train_all, (list(runs.values()),), init=False)
    for index, (name, run) in enumerate(runs.items()):
        rows = [json.loads(line) for line in (run["run_dir"] / "logs" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["skipped"]] == [2, 6], name
        assert rows[5]["loss"] > 2 * rows[4]["loss"] and rows[6]["loss"] < 1.1 * rows[4]["loss"], name
        assert all(value[index] == value[index] for value in sums), f"{name}: weights are not finite"
        state = read_state(latest_checkpoint(run["run_dir"]))
        assert (state.skipped["total"], state.skipped["spikes"]["total"]) == (1, 1), name
        kinds = [event["event"] for event in read_events(run["run_dir"] / "logs")]
        assert kinds.count("nonfinite") == kinds.count("spike") == 1 and kinds[-1] == "finish", name
    return {name: run["run_dir"] for name, run in runs.items()}


def test_a_nan_and_a_spike_on_one_rank_skip_one_step_everywhere(data, tmp_path):
    found = check_runs(data, tmp_path, ["data", "tensor", "pipeline"])
    stragglers = [event for event in read_events(found["data"] / "logs") if event["event"] == "straggler"]
    rows = [json.loads(line) for line in (found["data"] / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["forward_seconds_slowest"] > 0 for row in rows if "slowest_rank" in row) and "slowest_rank" in rows[-1]
    assert any("is a straggler: " in event["text"] for event in stragglers)  # forward, or on a busy machine a wait


@pytest.mark.slow
def test_a_nan_and_a_spike_skip_one_step_under_every_zero_stage(data, tmp_path):
    check_runs(data, tmp_path, list(LAYOUTS)[3:])


def test_ranks_end_with_stacks_and_name_the_one_that_was_stopped(data, tmp_path):
    overrides = {**data, **SMALL, "run_dir": tmp_path / "run", "guards.hang_timeout": 10, "schedule.steps": 500}
    command = [sys.executable, "-m", "vilg", "train", str(DEBUG_RECIPE)]
    command += [f"--{key}={value}" for key, value in overrides.items()]
    port, processes = free_port(), []
    try:
        for rank in range(2):
            environment = {**os.environ, **rank_environment(rank, 2, port), "VILG_FAULT": "stop@step3:rank1"}
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        said = processes[0].communicate(timeout=120)[1]
    finally:
        for process in processes:
            process.kill()
    logs = tmp_path / "run" / "logs"
    assert processes[0].returncode == TRY_AGAIN, said
    assert "no step for 10 s after step 2" in said and "look there first: rank 1" in said
    stacks = stacks_path(logs, 0).read_text()
    assert "loop.py" in stacks  # the main thread, with the place where it waits
    assert json.loads((logs / "flight_rank0.json").read_text())["entries"]
    assert read_events(logs)[-1]["event"] == "hang" and read_events(logs)[-1]["silent"] == [1]
