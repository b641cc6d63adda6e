"""Training as a user starts it, and as several runs inside one process group (importing DeepSpeed takes seconds)."""

import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.helpers import free_port, run_distributed
from tests.golden.make import (
    DEBUG_RECIPE,
    GOLDEN,
    ROOT,
    make_data,
    platform_id,
    read_evaluations,
    read_losses,
    train_command,
    train_environment,
)
from vilg.__main__ import main as vilg
from vilg.checkpoint.load import latest_checkpoint
from vilg.checkpoint.reader import open_weights
from vilg.checkpoint.state import STATE_FILE, read_state
from vilg.checkpoint.tensors import checksum
from vilg.config import load_recipe
from vilg.errors import TRY_AGAIN, UserError

Overrides = dict[str, object]
SHORT = {"schedule.steps": 4, "schedule.warmup_steps": 2, "checkpoint.every_steps": 2, "logging.tensorboard": "false"}
EVALUATED = {"evaluation.every_steps": 2, "evaluation.pairs": 21}  # which micro-batches of 8 and of 2 ranks do not fill


@pytest.fixture(scope="module")
def data(session_tmp) -> Overrides:
    folder = session_tmp / "training-data"
    folder.mkdir()
    return make_data(folder)


def arguments(overrides: Overrides) -> list[str]:
    return [str(DEBUG_RECIPE), *(f"--{key}={value}" for key, value in overrides.items())]


def in_one_group(rank: int, world_size: int, runs: list[tuple[Overrides, str | None]]) -> list[str | None]:
    """Train several recipes, one after another, in one process group; the error message of each, None if it had none.

    The string names a mishap of MISHAPS that befalls the run.
    """
    from vilg.train.distributed import distributed
    from vilg.train.loop import train

    errors = []
    with distributed(torch.device("cpu")) as ranks:
        for overrides, mishap in runs:
            with pytest.MonkeyPatch.context() as patch:
                if mishap:
                    MISHAPS[mishap](patch, rank)
                try:
                    recipe = load_recipe(
                        DEBUG_RECIPE, [f"{k}={v}" for k, v in overrides.items()], world_size=world_size
                    )
                    train(recipe, ranks, torch.device("cpu"))
                    errors.append(None)
                except UserError as error:
                    errors.append(str(error))
                if "deepspeed" in sys.modules:  # it keeps the groups of the last engine with stages for all later ones
                    sys.modules["deepspeed"].utils.groups.mpu = None
    return errors


def _signal_one_rank(patch, rank: int) -> None:
    """SIGTERM to the last rank alone, in the middle of the run."""
    from vilg.train.run import Run

    finish = Run.finish_step

    def finish_and_signal(self, plan, result, tokens):
        finish(self, plan, result, tokens)
        if plan.step == 7 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(Run, "finish_step", finish_and_signal)


def _nan_on_one_rank(patch, rank: int) -> None:
    """One rank's loss is NaN in step 2."""
    import vilg.train.deepspeed_engine as module

    original = module.micro_batch_loss

    def spoiled(forward, batch, plan, *further):
        loss, sums = original(forward, batch, plan, *further)
        return (loss * math.nan if plan.step == 2 and rank == 1 else loss), sums

    patch.setattr(module, "micro_batch_loss", spoiled)


def _disk_fills(patch, rank: int) -> None:
    """No file may grow beyond 20 kB from step 3 on."""
    from vilg.train.run import Run

    finish = Run.finish_step

    def finish_and_fill(self, plan, result, tokens):
        finish(self, plan, result, tokens)
        if plan.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    patch.setattr(Run, "finish_step", finish_and_fill)


MISHAPS = {"signal": _signal_one_rank, "nan": _nan_on_one_rank, "full disk": _disk_fills}


@pytest.fixture(scope="module")
def two_processes(data, session_tmp) -> dict[str, Path]:
    """Runs with two processes, by name."""
    folder = session_tmp / "two"
    bf16 = {"precision": "bf16", "schedule.steps": 12, "checkpoint.every_steps": 5}
    both = {"data.directions": "both", "loss.reduction": "sum"}
    plans: list[tuple[str, Overrides, str | None]] = [
        ("alternate", EVALUATED, None),
        ("alternate, accumulated", {"batch.micro_size": 2, **EVALUATED}, None),
        ("both", {**both, **EVALUATED}, None),
        ("both, accumulated", {**both, "batch.micro_size": 4}, None),
        ("zero3", {"parallel.deepspeed": ROOT / "ds_configs" / "zero3.json", **EVALUATED}, None),
        # One sequence a micro-batch in training, two in an evaluation: what stages send each other changes its shape.
        ("pipeline", {"parallel.pipeline": 2, "batch.micro_size": 1, **EVALUATED}, None),
        ("bf16", bf16, None),
        ("bf16 stopped", bf16, "signal"),
        ("bf16 stopped", bf16, None),
        ("nan", {}, "nan"),
    ]
    runs = [
        ({**data, **SHORT, "run_dir": folder / name.replace(", ", "-"), **own}, mishap) for name, own, mishap in plans
    ]
    for errors in run_distributed(2, in_one_group, (runs,), init=False):
        assert errors == [None] * len(plans)
    return {name: folder / name.replace(", ", "-") for name, *_ in plans}


@pytest.fixture(scope="module")
def one_process(data, session_tmp) -> dict[str, Path]:
    """Runs of one process, by name: plain PyTorch in this process, DeepSpeed in another."""
    folder = session_tmp / "one"
    for name, own in (("alternate", {}), ("both", {"data.directions": "both", "loss.reduction": "sum"})):
        overrides = {**data, **SHORT, **EVALUATED, **own, "parallel.engine": "torch", "run_dir": folder / name}
        assert vilg(["train", *arguments(overrides)]) == 0
    deepspeed = {**data, **SHORT, "run_dir": folder / "deepspeed"}
    assert run_distributed(1, in_one_group, ([(deepspeed, None)],), init=False) == [[None]]
    return {name: folder / name for name in ("alternate", "both", "deepspeed")}


@pytest.fixture(scope="module")
def golden_run(data, session_tmp) -> tuple[Path, str]:
    """The debug recipe as a user starts it with two processes, killed outright on the way; folder and console."""
    run_dir = session_tmp / "golden"
    overrides = {**data, "run_dir": run_dir, "checkpoint.every_steps": 10, "logging.every_steps": 1}
    overrides |= {"evaluation.every_steps": 10, "evaluation.pairs": 0}  # the golden losses were made without
    command = train_command(overrides, processes=2)
    console = []
    for until, number in ((13, signal.SIGKILL), (None, None)):
        process = subprocess.Popen(
            command, cwd=ROOT, env=train_environment(), text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            if until:
                wait_for_step(run_dir, until, process)
                for target in [*psutil.Process(process.pid).children(recursive=True), process]:
                    target.send_signal(number)
            output, _ = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        console.append(output)
    assert process.returncode == 0, console[-1]
    return run_dir, console[-1]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    """Return when the run has logged `step`."""
    path = run_dir / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert process.poll() is None and time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def test_golden_losses_survive_kill_9_in_every_digit(golden_run):
    run_dir, console = golden_run
    golden = json.loads(GOLDEN.read_text())
    losses = read_losses(run_dir)
    assert "continuing from" in console and "Traceback" not in console and (run_dir / "DONE").exists()
    if golden["platform"] == platform_id():
        assert losses == golden["losses"]
    else:
        assert losses == pytest.approx(golden["losses"], rel=1e-3)


def test_held_out_losses_fall_and_are_kept_across_the_kill(golden_run):
    run_dir, console = golden_run
    found = read_evaluations(run_dir)
    assert list(found) == [10, 20, 30, 40, 50]
    assert found[50]["val_loss"] == found[50]["val_text_loss"] + found[50]["val_image_loss"]
    for key in ("val_text_loss", "val_image_loss"):
        assert found[50][key] < 0.95 * found[10][key]
    assert re.search(r"step 50 held out: loss \S+ \(image \S+ text \S+\)  40 pairs in \S+ s", console)


def test_log_line_has_units(golden_run):
    number = r"\d+(\.\d+)?"
    pattern = (
        rf"step 50/50  loss {number} \(image {number} text {number}\)  lr \S+  grad {number}  {number}k? tok/s/rank  "
        rf"(MFU (n/a|\d+%)  )(HFU \d+%  )?data \d+%  mem {number} GiB  eta 0s"
    )
    assert re.search(pattern, golden_run[1])


def test_a_finished_run_says_so_and_does_nothing(golden_run, data, capsys):
    run_dir, _ = golden_run
    before = (run_dir / "logs" / "metrics.jsonl").read_bytes()
    done = {**data, "run_dir": run_dir, "checkpoint.every_steps": 10, "logging.every_steps": 1}
    assert vilg(["train", *arguments(done)]) == 0
    assert "is finished: 50 of 50 steps" in capsys.readouterr().out
    assert (run_dir / "logs" / "metrics.jsonl").read_bytes() == before


def test_another_recipe_in_the_run_folder_is_refused_and_nothing_lost(golden_run, data, capsys):
    run_dir, _ = golden_run
    config = (run_dir / "config.yaml").read_bytes()
    assert vilg(["train", *arguments({**data, "run_dir": run_dir, "model.dropout": 0.2})]) == 2
    assert "model.dropout: 0.1 there, 0.2 here" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_bytes() == config and (run_dir / "DONE").exists()


def test_inspect_reports_layout_and_notices_a_cut_file(golden_run, tmp_path, capsys):
    run_dir, _ = golden_run
    assert vilg(["inspect", str(run_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == 50 and report["layout"]["data"] == 2 and report["finished"] and report["whole"]
    latest = latest_checkpoint(run_dir)
    copy = tmp_path / latest.name
    copy.mkdir()
    for path in latest.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "mp_rank_00_model_states.pt").write_bytes(b"short")
    assert vilg(["inspect", str(copy)]) == 1
    assert "mp_rank_00_model_states.pt: has 5 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(("run", "reference"), [
    ("alternate", "alternate"),
    ("alternate, accumulated", "alternate"),
    ("both", "both"),
    ("both, accumulated", "both"),
    ("zero3", "alternate"),
    ("pipeline", "alternate"),
])  # fmt: skip
def test_two_processes_give_the_losses_of_one(two_processes, one_process, run, reference):
    assert read_losses(two_processes[run]) == pytest.approx(read_losses(one_process[reference]), rel=1e-5)


@pytest.mark.parametrize(("run", "reference"), [
    ("alternate", "alternate"),
    ("alternate, accumulated", "alternate"),
    ("both", "both"),
    ("zero3", "alternate"),
    ("pipeline", "alternate"),
])  # fmt: skip
def test_the_same_held_out_pairs_are_evaluated_by_one_process_and_by_two(two_processes, one_process, run, reference):
    found, wanted = read_evaluations(two_processes[run]), read_evaluations(one_process[reference])
    assert list(found) == list(wanted) == [2, 4]
    for step, losses in found.items():
        assert losses == pytest.approx(wanted[step], rel=1e-5)


def test_deepspeed_alone_gives_the_losses_and_norms_of_plain_pytorch(one_process):
    assert read_losses(one_process["deepspeed"]) == pytest.approx(read_losses(one_process["alternate"]), rel=1e-5)
    norms = [
        [
            json.loads(line)["grad_norm"]
            for line in (one_process[name] / "logs" / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("deepspeed", "alternate")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_bf16_run_stopped_by_a_signal_to_one_rank_continues_in_every_digit(two_processes):
    assert read_losses(two_processes["bf16 stopped"]) == read_losses(two_processes["bf16"])
    log = (two_processes["bf16 stopped"] / "logs" / "rank_0.log").read_text()
    assert "stopping after step 7" in log and "continuing from" in log


def test_a_nan_on_one_rank_skips_the_step_on_all(two_processes):
    run_dir = two_processes["nan"]
    rows = [json.loads(line) for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [False, True, False, False]
    assert rows[1]["grad_norm"] is None and rows[2]["loss"] < rows[0]["loss"]
    skipped = read_state(latest_checkpoint(run_dir)).skipped
    assert (skipped["in_a_row"], skipped["total"], skipped["spikes"]["total"]) == (0, 1, 0)


def test_a_full_disk_is_named_and_the_previous_checkpoint_stays(data, tmp_path):
    run = {**data, **SHORT, "parallel.engine": "torch", "run_dir": tmp_path / "run"}
    [[error]] = run_distributed(1, in_one_group, ([(run, "full disk")],), init=False)
    assert "could not be saved" in error and "step_00000002, is intact" in error
    assert read_state(latest_checkpoint(tmp_path / "run")).step == 2
    assert vilg(["train", *arguments(run)]) == 0
    assert len(read_losses(tmp_path / "run")) == 4


class Hostile:
    """Runs a command when it is unpickled carelessly."""

    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


def test_a_hostile_checkpoint_file_is_refused_when_deepspeed_loads_it(data, one_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(one_process["deepspeed"], tmp_path / "run")
    checkpoint = latest_checkpoint(tmp_path / "run")
    path = checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Hostile()}, path)
    state = json.loads((checkpoint / STATE_FILE).read_text())
    state["files"][path.name] = path.stat().st_size
    state["checksums"][path.name] = checksum(path)
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    longer = {**data, **SHORT, "run_dir": tmp_path / "run", "schedule.steps": 5}
    [[error]] = run_distributed(1, in_one_group, ([(longer, None)],), init=False)
    assert path.name in error and "posix.system" in error
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize("run", ["alternate", "bf16", "zero3"])
def test_export_is_the_checkpoint_and_is_verified(two_processes, run, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", str(two_processes[run]), "--out", str(out), "--dtype", "fp32", "--shard-size", "0.4MB"]
    assert vilg(command) == 0
    assert "largest logit difference" in capsys.readouterr().out
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    tensors = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    weights = open_weights(latest_checkpoint(two_processes[run]))
    assert set(tensors) == set(weights.names)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, weights.read(name, kind="master")) and tuple(tensor.shape) == weights.shape(name)
        if run == "bf16":
            assert torch.equal(tensor.bfloat16(), weights.read(name, kind="weight"))
    assert vilg(command) == 2 and "exists already" in capsys.readouterr().err


def test_a_port_in_use_is_named(data):
    port = free_port()
    environment = {**train_environment(), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        done = subprocess.run(
            train_command(data, processes=1),
            env={**environment, "MASTER_PORT": str(port)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert done.returncode == TRY_AGAIN and f"MASTER_PORT={port} cannot be listened on" in done.stderr
