"""fp16 with DeepSpeed's loss scaling, under ZeRO, tensor and pipeline parallelism; on a CPU that DeepSpeed is told can do it."""

import json

import pytest

from tests.distributed.helpers import run_distributed
from tests.distributed.resume_support import Job, Layout, train_jobs
from tests.golden.make import make_data

STEPS = {"schedule.steps": 6, "schedule.warmup_steps": 2, "checkpoint.every_steps": 3, "logging.tensorboard": "false"}
# DeepSpeed keeps what ranks are for in globals: data parallel runs first, then tensor, then pipeline.
LAYOUTS = [Layout(data=2, zero=3), Layout(data=2, zero=1), Layout(tensor=2, zero=1), Layout(pipeline=2, zero=1)]


def train_in_fp16(rank, world_size, jobs, supported=True):
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: supported)
        patch.setenv("VILG_FAULT", "nan@step4:rank1")
        return train_jobs(rank, world_size, jobs)


def steps_of(run_dir):
    return [json.loads(line) for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(session_tmp):
    path = session_tmp / "fp16"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def settings(folder):
    return make_data(folder) | STEPS


def test_losses_follow_fp32_and_an_overflow_is_one_skipped_step_in_every_layout(settings, folder):
    layouts = {"fp32": LAYOUTS[1], **{layout.name: layout for layout in LAYOUTS}}
    jobs = [
        Job(settings | layout.overrides() | {"run_dir": folder / name, "precision": name if name == "fp32" else "fp16"})
        for name, layout in layouts.items()
    ]
    stopped = {**jobs[2].overrides, "run_dir": folder / "stopped"}
    jobs[3:3] = [Job(stopped, stop_after=3), Job(stopped)]
    assert run_distributed(2, train_in_fp16, (jobs,), init=False, timeout=600) == [[None] * len(jobs)] * 2

    runs = {name: steps_of(folder / name) for name in [*layouts, "stopped"]}
    for name, steps in runs.items():
        assert [step["skipped"] for step in steps] == [step["step"] == 4 for step in steps], name
        assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in runs["fp32"]], rel=2e-3), name
        assert [step["loss"] for step in steps] != [step["loss"] for step in runs["fp32"]] or name == "fp32"
        norms = [[step["grad_norm"] for step in of if not step["skipped"]] for of in (steps, runs["fp32"])]
        assert norms[0] == pytest.approx(norms[1], rel=1e-2), name
    assert [step["loss"] for step in runs["stopped"]] == [step["loss"] for step in runs["t1p1d2z1"]]


def test_a_device_without_fp16_is_said(settings, folder):
    overrides = settings | Layout(zero=1).overrides() | {"run_dir": folder / "none", "precision": "fp16"}
    [[error]] = run_distributed(1, train_in_fp16, ([Job(overrides)], False), init=False)
    assert "precision=fp16" in error and "use bf16 or fp32" in error
