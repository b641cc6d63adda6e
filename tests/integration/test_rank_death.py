"""A rank that dies ends the run within a minute, with its reason shown: real processes, started as users do."""

import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from tests.golden.make import DEBUG_RECIPE, ROOT, make_data, train_command, train_environment
from vilg.train import distributed as module

LIMIT = 60.0  # seconds
# Trains like `vilg train`, but one rank's last block fails in the middle of the third step.
FAILING = """
import os, sys
from vilg.model.block import Block
forward, calls = Block.forward, 0

def failing(self, *arguments):
    global calls
    calls += self.index == 3
    if os.environ["RANK"] == "1" and calls == 5:
        raise ZeroDivisionError("planted in the middle of a step")
    return forward(self, *arguments)

Block.forward = failing
from vilg.__main__ import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def overrides(session_tmp):
    folder = session_tmp / "death"
    folder.mkdir()
    layout = {"parallel.tensor": 2, "parallel.pipeline": 2, "logging.tensorboard": "false", "logging.every_steps": 1}
    return {**make_data(folder), **layout}


def end_of(command: list[str], **environment: str) -> tuple[int, str]:
    """Exit code and everything printed, of a run that ends by itself within LIMIT seconds of its first step's line."""
    with subprocess.Popen(
        command, cwd=ROOT, env={**train_environment(), **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        hangs = threading.Timer(LIMIT, os.killpg, (process.pid, signal.SIGKILL))
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 1/"):
                hangs.start()
        code = process.wait()
        ended = hangs.is_alive()
        hangs.cancel()
    assert ended, "no first step, or a hang:\n" + "".join(lines)
    return code, "".join(lines)


def test_a_killed_rank_takes_the_others_down_and_they_say_so(overrides, tmp_path):
    command = train_command({**overrides, "run_dir": tmp_path / "run"}, processes=4)
    code, output = end_of(command, VILG_FAULT="kill@step3:rank1")
    assert code != 0
    assert re.search(r"vilg: rank [023]: another rank ended", output)
    assert "exitcode: -9" in output and "local_rank: 1" in output


def test_an_error_in_one_rank_is_shown_and_takes_the_others_down(overrides, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    values = {**overrides, "parallel.tensor": 1, "run_dir": tmp_path / "run"}
    settings = [f"--{key}={value}" for key, value in values.items()]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    code, output = end_of([*start, "train", str(DEBUG_RECIPE), *settings])
    assert code != 0
    assert "[rank1]: ZeroDivisionError: planted in the middle of a step" in output


def test_on_a_gpu_the_failing_rank_does_not_wait_for_the_others(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    for error, text, code in (
        (ValueError("odd"), "ValueError: odd", 1),
        (module.UserError("full disk"), "vilg: error: full disk", 2),
        (module.UserError("port taken", 75), "vilg: error: port taken", 75),
    ):
        module.leave_at_once(error)
        assert text in capsys.readouterr().err and codes.pop() == code
