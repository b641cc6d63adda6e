"""Loader workers: a killed one is named and ends the run, none of them keeps a run from ending, and no signal ends them."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vilg.data import workers as workers_module
from vilg.data.steps import StepData
from vilg.data.workers import built_ahead
from vilg.errors import TRY_AGAIN, UserError

LARGE = 1 << 20  # int64 of a step: far more than a pipe holds, so that a worker is nearly always in the middle of one


def large_step(first: int) -> StepData:
    return StepData([{"x": np.full(LARGE, first)}], 1, [])


def slow_step(first: int) -> StepData:
    time.sleep(600 if first else 0)
    return StepData([], 1, [])


def broken_step(first: int) -> StepData:
    raise KeyError(f"no step at {first}")


def ended_step(first: int) -> StepData:
    os._exit(3)


def steps_of(build, workers: int = 2):
    return built_ahead(build, itertools.count(0, 5), workers=workers, ahead=4)


def assert_ended(processes: list) -> None:
    for process in processes:
        process.join(timeout=30)
        assert not process.is_alive()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("delay", [0.0, 0.003, 0.02, 0.1])
def test_a_killed_worker_is_named_at_any_moment_and_the_others_end(victim, delay):
    steps = steps_of(large_step)
    assert [next(steps).arrays[0]["x"][-1] for _ in range(3)] == [0, 5, 10]
    workers = multiprocessing.active_children()
    time.sleep(delay)
    os.kill(workers[victim].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"^loader worker [12] of 2 \(process \d+\) ended by signal 9 .*data\.workers") as error:
        for _ in zip(steps, range(20)):
            pass
    assert str(workers[victim].pid) in str(error.value) and error.value.exit_code == TRY_AGAIN
    assert_ended(workers)


def test_other_ends_of_a_worker_are_told_too():
    with pytest.raises(UserError, match=r"^loader worker 1 of 1 \(process \d+\) ended with exit code 3"):
        next(steps_of(ended_step, workers=1))
    with pytest.raises(RuntimeError, match=r"(?s)^loader worker 1 of 2:\nTraceback.*in broken_step.*no step at 0"):
        next(steps_of(broken_step))


def test_closing_ends_workers_without_a_word_also_in_a_read_that_stalls(capfd, monkeypatch):
    monkeypatch.setattr(workers_module, "_GRACE", 0.5)
    for build in (large_step, slow_step):
        steps = steps_of(build)
        next(steps)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        steps.close()
        assert_ended(workers)
    assert capfd.readouterr() == ("", "")


def run_script(folder: Path, body: str) -> subprocess.CompletedProcess:
    """What becomes of a script in a process group of its own. It hangs if it takes a minute."""
    script = folder / "trainer.py"
    script.write_text(
        "import multiprocessing, os, signal, time\n"
        "from tests.unit.test_loader_workers import large_step, steps_of\n"
        'if __name__ == "__main__":\n' + "".join(f"    {line}\n" for line in body.strip().splitlines())
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=60, start_new_session=True
    )


@pytest.mark.parametrize("end, last", [
    ("raise KeyError('uncaught')", "KeyError: 'uncaught'"),
    ("os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL); list(steps)", "ended by signal 9"),
])  # fmt: skip
def test_an_uncaught_exception_ends_the_process(tmp_path, end, last):
    run = run_script(tmp_path, f"steps = steps_of(large_step)\nnext(steps)\n{end}")
    assert run.returncode == 1 and last in run.stderr


# All that SLURM and a terminal send, to all of a job, from before the first worker runs to the last step; the trainer
# alone notes them. A second set of workers needs a fork server that lives.
SIGNALLED = """
noted, trainer, every = set(), os.getpid(), (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
for number in every:
    signal.signal(number, lambda number, _: noted.add(number))
sender = os.fork()
if sender == 0:
    for number in every:
        signal.signal(number, signal.SIG_IGN)
    while os.getppid() == trainer:
        for number in every:
            os.killpg(0, number)
        time.sleep(0.02)
    os._exit(0)
for _ in range(2):
    steps = steps_of(large_step)
    print([int(next(steps).arrays[0]["x"][0]) for _ in range(12)])
    steps.close()
os.kill(sender, signal.SIGKILL)
os.waitpid(sender, 0)
print(noted == set(every))
"""


def test_no_signal_to_the_whole_job_reaches_workers_or_their_fork_server(tmp_path):
    run = run_script(tmp_path, SIGNALLED)
    expected = str(list(range(0, 60, 5)))
    assert (run.returncode, run.stdout.splitlines(), run.stderr) == (0, [expected, expected, "True"], "")
