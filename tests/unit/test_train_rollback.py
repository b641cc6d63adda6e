"""A run that goes back for a spike, and one that is stopped and saved by files: one process, plain torch."""

import json
import shutil

import pytest
import torch

from tests.golden.make import DEBUG_RECIPE, make_data
from vilg.checkpoint.load import latest_checkpoint
from vilg.checkpoint.state import read_state
from vilg.config import load_recipe
from vilg.errors import UserError
from vilg.parallel.ranks import SharedError
from vilg.train.distributed import distributed
from vilg.train.events import read_events
from vilg.train.loop import train

SMALL = {
    "parallel.engine": "torch",
    "model.num_layers": 2,
    "schedule.steps": 16,
    "schedule.warmup_steps": 2,
    "checkpoint.every_steps": 4,
    "checkpoint.keep_last": 9,
    "logging.tensorboard": "false",
    "guards.spike_window": 8,
}


@pytest.fixture(scope="module")
def data(session_tmp):
    folder = session_tmp / "rollback-data"
    folder.mkdir()
    return make_data(folder)


def run(overrides) -> None:
    with distributed(torch.device("cpu")) as ranks:
        train(load_recipe(DEBUG_RECIPE, [f"{k}={v}" for k, v in overrides.items()]), ranks, torch.device("cpu"))


def losses(folder) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return {row["step"]: row["loss"] for row in rows}


def test_a_spike_sends_the_run_back_and_past_its_samples_and_a_later_start_does_the_same(data, tmp_path, monkeypatch):
    mine = {**data, **SMALL, "run_dir": tmp_path / "run", "guards.spike_action": "rollback"}
    monkeypatch.setenv("VILG_FAULT", "spike@step7:rank0")
    run(mine)
    (back,) = [event for event in read_events(tmp_path / "run" / "logs") if event["event"] == "rollback"]
    size = 16  # pairs of a step in the debug recipe
    assert (back["step"], back["to_step"], back["left_out"]) == (7, 4, [4 * size, 7 * size])
    state = read_state(latest_checkpoint(tmp_path / "run"))
    assert state.step == 16 and state.samples == (16 + 3) * size
    assert state.skipped["spikes"]["left_out"] == [[4 * size, 7 * size]]
    # Continued from the checkpoint that was written anew: the same samples are left out, every digit is the same.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "LATEST").write_text("step_00000004\n")
    monkeypatch.delenv("VILG_FAULT")
    run({**mine, "run_dir": tmp_path / "again"})
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_rollbacks_to_one_checkpoint_are_bounded(data, tmp_path, monkeypatch):
    mine = {**data, **SMALL, "run_dir": tmp_path / "run", "guards.spike_action": "rollback", "guards.max_spikes": 1}
    monkeypatch.setenv("VILG_FAULT", "spike@step6:rank0,spike@step7:rank0")
    with pytest.raises(SharedError, match="2 rollbacks to one checkpoint .allowed: guards.max_spikes=1"):
        run(mine)
    assert [e["event"] for e in read_events(tmp_path / "run" / "logs")].count("rollback") == 1


def test_a_save_file_is_answered_and_a_stop_file_ends_the_run_and_keeps_it_from_starting(data, tmp_path, monkeypatch):
    from vilg.train.run import Run

    finish = Run.finish_step

    def finish_and_ask(self, plan, result, tokens):
        finish(self, plan, result, tokens)
        if plan.step in (1, 6):
            (self.recipe.run_dir / ("SAVE" if plan.step == 1 else "STOP")).touch()

    monkeypatch.setattr(Run, "finish_step", finish_and_ask)
    folder = tmp_path / "run"
    run({**data, **SMALL, "run_dir": folder})
    assert (folder / "checkpoints" / "step_00000002").is_dir() and not (folder / "SAVE").exists()
    assert read_state(latest_checkpoint(folder)).step == 6 and (folder / "STOP").exists()
    assert read_events(folder / "logs")[-1]["event"] == "stop" and not (folder / "DONE").exists()
    assert "STOP file: stopping after step 6" in (folder / "logs" / "rank_0.log").read_text()
    with pytest.raises(UserError, match="asked this run to stop"):
        run({**data, **SMALL, "run_dir": folder})
    assert json.loads((folder / "logs" / "heartbeat.json").read_text())["state"] == "stopped"
