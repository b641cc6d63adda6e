"""A run continues under another layout as if nothing had happened; all moves: benchmarks/checkpoint_matrix.py."""

import errno
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.helpers import run_distributed
from tests.distributed.resume_support import Job, Layout, branch, differing, distance, latest, train_jobs
from tests.golden.make import DEBUG_RECIPE, ROOT, make_data, read_losses
from vilg.__main__ import main as vilg
from vilg.checkpoint.load import latest_checkpoint
from vilg.checkpoint.save import Saver
from vilg.checkpoint.state import STATE_FILE, RunState, read_state
from vilg.checkpoint.tensors import checksum
from vilg.errors import TRY_AGAIN
from vilg.parallel.ranks import Ranks, SharedError

RECIPE = {
    "schedule.steps": 9,
    "schedule.warmup_steps": 2,
    "checkpoint.every_steps": 3,
    "checkpoint.keep_last": 9,
    "logging.tensorboard": "false",
    "model.num_layers": 3,
    "model.hidden_size": 32,
}
TORCH = Layout(engine="torch")


@pytest.fixture(scope="module")
def common(session_tmp):
    folder = session_tmp / "resume-data"
    folder.mkdir()
    return {**make_data(folder), **RECIPE}


@pytest.fixture(scope="module")
def unbroken(common, session_tmp):
    """Nine steps of one process."""
    run = session_tmp / "resume" / "torch"
    assert vilg(["train", str(DEBUG_RECIPE), *arguments({**common, **TORCH.overrides(), "run_dir": run})]) == 0
    return run


def arguments(overrides) -> list[str]:
    return [f"--{key}={value}" for key, value in overrides.items()]


def start(layout: Layout, common, run, **how) -> list[str | None]:
    """Errors of one start of a run, one per rank."""
    job = Job({**common, **layout.overrides(), "run_dir": run}, **how)
    return [errors[0] for errors in run_distributed(layout.processes, train_jobs, ([job],), init=False)]


def test_a_run_moves_from_tensor_and_pipeline_ranks_to_zero_3_and_on_to_tensor_ranks(common, unbroken, session_tmp):
    first = session_tmp / "resume" / "chain"
    assert start(Layout(2, 2, 1, 1), common, first, stop_after=3) == [None] * 4
    second = branch(first, "step_00000003", session_tmp / "resume" / "second")
    damaged = branch(first, "step_00000003", session_tmp / "resume" / "damaged")
    flip_a_bit(latest(damaged) / "layer_02-model_01-model_states.pt")

    jobs = [
        Job({**common, **Layout(1, 1, 2, 3).overrides(), "run_dir": damaged}),
        Job({**common, **Layout(1, 1, 2, 3).overrides(), "run_dir": second}, stop_after=6, save_first=True),
    ]
    for told, moved in run_distributed(2, train_jobs, (jobs,), init=False):
        assert "layer_02-model_01-model_states.pt: its bytes changed" in told and moved is None
    assert differing(second / "checkpoints" / "step_00000003", first / "checkpoints" / "step_00000003") == []

    assert start(Layout(2, 1, 1, 0), common, second) == [None] * 2
    assert read_losses(second) == pytest.approx(read_losses(unbroken), rel=1e-6)
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert distance(latest(second), latest(unbroken), kind) < 1e-4
    notes = (second / "logs" / "rank_0.log").read_text()
    assert "saved with zero_stage=1, data=1, tensor=2, pipeline=2; this run has zero_stage=3, data=2" in notes


def test_a_run_moves_from_plain_pytorch_to_pipeline_stages(common, unbroken, session_tmp):
    moved = branch(unbroken, "step_00000006", session_tmp / "resume" / "stages")
    assert start(Layout(1, 2, 1, 1), common, moved, save_first=True) == [None] * 2
    assert differing(moved / "checkpoints" / "step_00000006", unbroken / "checkpoints" / "step_00000006") == []
    assert read_losses(moved) == pytest.approx(read_losses(unbroken), rel=1e-6)
    table = read_state(latest(moved)).parameters
    assert table["layers.0.segment"]["stage"] == 0 and table["layers.4.image_head.weight"]["stage"] == 1
    assert vilg(["inspect", str(moved), "--parameters"]) == 0


def train_in_uneven_stages(rank: int, world_size: int, jobs: list[Job]) -> list[str | None]:
    """As `train_jobs`, with all that one stage can hold in the first of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vilg.model.pipe.stage_costs", lambda config, spec: [0] * (config.num_layers + 1) + [1])
        return train_jobs(rank, world_size, jobs)


def test_a_run_continues_in_as_many_stages_that_are_cut_elsewhere(common, unbroken, session_tmp):
    moved = branch(unbroken, "step_00000003", session_tmp / "resume" / "uneven")
    uneven = Job({**common, **Layout(1, 2, 1, 1).overrides(), "run_dir": moved}, stop_after=6)
    assert run_distributed(2, train_in_uneven_stages, ([uneven],), init=False) == [[None], [None]]
    assert {e["stage"] for name, e in read_state(latest(moved)).parameters.items() if "layers.4" not in name} == {0}
    assert start(Layout(1, 2, 1, 1), common, moved) == [None] * 2
    assert "in stage 0; this run has" in (moved / "logs" / "rank_0.log").read_text()
    assert read_losses(moved) == pytest.approx(read_losses(unbroken), rel=1e-6)


def test_a_run_moves_to_zero_3_in_several_sub_groups_on_the_host_and_with_a_second_copy(common, unbroken, session_tmp):
    small = {"sub_group_size": 5000, "stage3_param_persistence_threshold": 100}  # many groups, few parameters kept whole
    folder, jobs = session_tmp / "resume" / "groups", {}
    # The second copy last: DeepSpeed keeps its group of ranks as long as the process lives.
    for name, source, added in (("host", "zero3-offload", {}), ("copy", "zero3", {"zero_hpz_partition_size": 2})):
        run = branch(unbroken, "step_00000006", folder / name)
        config = json.loads((ROOT / "ds_configs" / f"{source}.json").read_text())
        config["zero_optimization"] |= {**small, **added}
        (folder / f"{name}.json").write_text(json.dumps(config))
        overrides = {**common, "parallel.deepspeed": folder / f"{name}.json", "run_dir": run}
        jobs[run] = Job(overrides, save_first=True)
    assert run_distributed(2, train_jobs, (list(jobs.values()),), init=False) == [[None, None]] * 2
    for run in jobs:
        assert differing(run / "checkpoints" / "step_00000006", unbroken / "checkpoints" / "step_00000006") == []
        assert read_losses(run) == pytest.approx(read_losses(unbroken), rel=1e-6)
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert distance(latest(run), latest(unbroken), kind) < 1e-4


def test_a_harmful_change_needs_its_key_named_and_then_continues(common, unbroken, session_tmp, capsys):
    run = branch(unbroken, "step_00000006", session_tmp / "resume" / "accepted")
    changed = {**common, **TORCH.overrides(), "run_dir": run, "seed": 1, "optimizer.lr": 1e-3}
    command = ["train", str(DEBUG_RECIPE), *arguments(changed)]
    assert vilg(command) == 2
    assert "--accept=optimizer.lr,seed" in capsys.readouterr().err and read_state(latest(run)).step == 6
    assert vilg([*command, "--accept=optimizer.*,seed"]) == 0
    assert read_losses(run)[:6] == read_losses(unbroken)[:6] and read_losses(run)[6:] != read_losses(unbroken)[6:]
    assert read_state(latest(run)).loader["seed"] == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the run that failed may still hold its log


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_disk_that_fills_during_a_save_is_named_and_the_checkpoint_before_stays(
    common, small_disk, capsys, asynchronous
):
    run = small_disk / "run"
    overrides = {**common, **TORCH.overrides(), "run_dir": run, "checkpoint.asynchronous": asynchronous}
    assert vilg(["train", str(DEBUG_RECIPE), *arguments(overrides)]) == TRY_AGAIN
    told = capsys.readouterr().err
    assert "step_00000003 could not be saved" in told and "No space left" in told and "step_00000000, is intact" in told
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000000"]
    assert read_state(latest_checkpoint(run)).step == 0


def saves_with_a_bad_disk(rank: int, world_size: int, folder: Path) -> list[str]:
    """Three background saves, rank 1 failing in the second; what each became on this rank."""
    saver = Saver(folder, ranks=Ranks(rank, world_size, rank, dist.group.WORLD), keep_last=2)

    def write(path: Path) -> str:
        if rank == 1 and "00000002" in path.parent.name:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        path.write_bytes(b"x")
        return checksum(path)

    outcomes = []
    for step in (1, 2, 3):
        state = RunState(step, 0, 0, {}, {}, {}, {}, {})
        try:
            saver.begin(state, {f"rank_{rank}": write})
            while saver.busy:
                saved = saver.poll()
            outcomes.append(saved.path.name)
        except SharedError as error:
            outcomes.append(str(error))
    return outcomes


def test_a_background_save_that_fails_on_one_rank_fails_on_all_and_the_next_one_works(tmp_path):
    for first, second, third in run_distributed(2, saves_with_a_bad_disk, (tmp_path,)):
        assert first == "step_00000001" and third == "step_00000003"
        assert "rank 1: " in second and "Disk quota exceeded" in second and "step_00000001, is intact" in second
    latest_one = latest(tmp_path)
    assert sorted(read_state(latest_one).checksums) == ["rank_0", "rank_1"] and latest_one.name == "step_00000003"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000003"]


def test_a_newer_checkpoint_and_an_incomplete_one_are_refused_before_training(common, unbroken, tmp_path, capsys):
    def told(change) -> str:
        run = branch(unbroken, "step_00000006", tmp_path / change.__name__)
        change(latest(run))
        overrides = {**common, **TORCH.overrides(), "run_dir": run}
        assert vilg(["train", str(DEBUG_RECIPE), *arguments(overrides)]) == 2
        return capsys.readouterr().err

    def newer(folder):
        state = json.loads((folder / STATE_FILE).read_text())
        (folder / STATE_FILE).write_text(json.dumps({**state, "format_version": 99}))

    def missing(folder):
        (folder / "optimizer.safetensors").unlink()

    def cut(folder):
        with open(folder / "model.safetensors", "rb+") as stream:
            stream.truncate(1000)

    def incomplete(folder):
        (folder / STATE_FILE).unlink()

    def gone(folder):
        shutil.rmtree(folder)

    assert "format_version 99" in told(newer)
    assert "optimizer.safetensors: is missing" in told(missing)
    assert "model.safetensors: has 1000 bytes instead of" in told(cut)
    assert f"{STATE_FILE}: missing" in told(incomplete)
    assert "names 'step_00000006', which is not there" in told(gone)


def flip_a_bit(path) -> None:
    """Change a number in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
