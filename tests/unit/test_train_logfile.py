"""Logs that cannot be written for a while: the run goes on, says so once, and writes what it kept when it can."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from tests.golden.make import DEBUG_RECIPE, make_data, read_losses
from vilg.config import load_recipe
from vilg.train import logfile
from vilg.train.distributed import distributed
from vilg.train.events import read_events
from vilg.train.heartbeat import read_heartbeat
from vilg.train.log import RunLog
from vilg.train.logfile import LogFile
from vilg.train.loop import train
from vilg.train.run import Run

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, as on Linux")


def fill(path: Path) -> None:
    """From now on the file's disk is full."""
    path.rename(path.with_name("whole." + path.name))
    path.symlink_to(FULL)


def clear(path: Path) -> None:
    """There is space again."""
    path.unlink()
    path.with_name("whole." + path.name).rename(path)


def test_lines_that_cannot_be_written_are_kept_and_two_warnings_say_so(tmp_path):
    warnings, path = [], tmp_path / "metrics.jsonl"
    file = LogFile(path, warnings.append)
    file.write(["one\n"])
    fill(path)
    file.write(["two\n"]), file.write(["three\n"])
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    clear(path)
    file.write(["four\n"])
    file.close()
    assert path.read_text() == "one\ntwo\nthree\nfour\n"
    assert len(warnings) == 2 and warnings[1] == f"{path} is written again"


def test_the_oldest_lines_go_when_too_many_are_kept_and_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(logfile, "KEPT_LINES", 2)
    warnings, path = [], tmp_path / "metrics.jsonl"
    file = LogFile(path, warnings.append)
    fill(path)
    for text in "abcd":
        file.write([text + "\n"])
    file.close()
    assert warnings[1:] == [f"{path}: 4 lines could not be written"]
    clear(path)
    file.write(["e\n"])
    assert path.read_text() == "c\nd\ne\n" and warnings[2] == f"{path} is written again, without 2 lines"


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    file = LogFile(path, lambda text: None)
    file.write(["one\n"])

    class HalfWritten(logfile.FileIO):
        """A disk that fills up in the middle."""

        def write(self, content):
            if len(content) < 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content[:2])

    with monkeypatch.context() as patch:
        patch.setattr(logfile, "FileIO", HalfWritten)
        file.write(["two\n"])
    assert path.read_text() == "one\n"
    file.write(["three\n"])
    assert path.read_text() == "one\ntwo\nthree\n"


def test_steps_that_will_be_done_again_are_not_kept_for_later(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = RunLog(tmp_path, rank=0, total_steps=10, resume_step=0)
    with monkeypatch.context() as patch:
        patch.setattr(logfile, "_append", full)
        log.metrics.write(json.dumps({"step": step}) + "\n" for step in (1, 2, 3))
        log.rewind(1)
    log.metrics.write([json.dumps({"step": 2}) + "\n"])
    log.close()
    assert [json.loads(row)["step"] for row in log.metrics.path.read_text().splitlines()] == [1, 2]


def test_a_log_folder_that_is_missing_shows_at_the_start(tmp_path):
    with pytest.raises(OSError, match="none"):
        RunLog(tmp_path / "none", rank=1, total_steps=10, resume_step=0)


def test_a_run_outlives_full_disks_stale_files_and_sinks_that_raise(tmp_path, monkeypatch, capfd):
    steps = {"schedule.steps": 8, "schedule.warmup_steps": 2, "checkpoint.every_steps": 50, "logging.every_steps": 1}
    settings = {"parallel.engine": "torch", "model.num_layers": 2, "logging.tensorboard": "false", **steps}
    settings |= {"logging.heartbeat_seconds": 0.001, "guards.spike_action": "off"}
    folder = tmp_path / "run"
    logs = folder / "logs"
    files = [logs / name for name in ("metrics.jsonl", "events.jsonl", "rank_0.log")]
    finish, there, replace = Run.finish_step, Path.exists, os.replace
    broken = []

    def exists(path, **options):
        if broken and path.name in ("STOP", "SAVE"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return there(path, **options)

    def replaced(source, target):
        if broken and Path(target).name == "heartbeat.json":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        replace(source, target)

    class Failing:
        def rows(self, rows):
            raise RuntimeError("the service is gone")

    def finish_and_break(run, plan, *rest):
        finish(run, plan, *rest)
        if plan.step == 3:
            broken.append(True), run.log.sinks.append(Failing())
            for path in files:
                fill(path)
            run.log.event("fault", 3, "said while the disk is full")
        if plan.step == 6:
            assert read_heartbeat(logs)["step"] < 6
            broken.clear()
            for path in files:
                clear(path)

    monkeypatch.setattr(Run, "finish_step", finish_and_break)
    monkeypatch.setattr(Path, "exists", exists)
    monkeypatch.setattr(os, "replace", replaced)
    values = {**make_data(tmp_path), **settings, "run_dir": folder}
    with distributed(torch.device("cpu")) as ranks:
        train(load_recipe(DEBUG_RECIPE, [f"{k}={v}" for k, v in values.items()]), ranks, torch.device("cpu"))
    assert len(read_losses(folder)) == 8  # no step is missing
    events = read_events(logs)
    assert "said while the disk is full" in [event["text"] for event in events] and events[-1]["event"] == "finish"
    assert json.loads((logs / "heartbeat.json").read_text())["state"] == "finished"
    said = capfd.readouterr().err
    for text in (
        "metrics.jsonl cannot be written: No space left", "metrics.jsonl is written again",
        "events.jsonl cannot be written", "events.jsonl is written again", "Failing gets nothing more",
        "no heartbeat until", "heartbeat.json is written again", "STOP cannot be looked at",
        "STOP can be looked at again",
    ):  # fmt: skip
        assert said.count(text) == 1, text
