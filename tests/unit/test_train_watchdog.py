"""The watchdog against what hangs for good, in processes of their own: log files, consoles, the interpreter's lock, the
start."""

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

from tests.golden.make import DEBUG_RECIPE, ROOT, train_environment
from vilg.errors import FAILED, TRY_AGAIN
from vilg.train.events import read_events
from vilg.train.watchdog import Watchdog, stacks_path

PATIENCE = 120.0  # seconds until a process that should have ended within three counts as one that hangs
WATCHED = """
import ctypes, sys, time
from pathlib import Path
from vilg.train.watchdog import Watchdog

limits = dict(timeout=0.5, pause_timeout=0.5, grace=0.1, report_limit=float(sys.argv[2]))

def sleeps():
    time.sleep(600)

def keeps_the_lock():
    ctypes.PyDLL(None).sleep(600)

with Watchdog(Path(sys.argv[1]), rank=0, world_size=1, **limits) as dog:
    dog.beat(7)
    globals()[sys.argv[3]]()
"""


def end_of(folder, work: str, *, report_limit: float = 0.5, stderr: int = subprocess.PIPE) -> tuple[int, str]:
    """Exit code and stderr of a process whose only step does not end."""
    command = [sys.executable, "-c", WATCHED, str(folder), str(report_limit), work]
    done = subprocess.run(command, env=train_environment(), cwd=ROOT, stderr=stderr, text=True, timeout=PATIENCE)
    return done.returncode, done.stderr


@contextmanager
def full(descriptor: int):
    """A pipe that nobody reads: the next word written to it waits for ever."""
    os.set_blocking(descriptor, False)
    try:
        while os.write(descriptor, b"x" * 4096):
            pass
    except BlockingIOError:
        os.set_blocking(descriptor, True)
    yield descriptor
    os.close(descriptor)


@contextmanager
def full_stderr():
    reader, writer = os.pipe()
    with full(writer):
        yield writer
    os.close(reader)


def test_a_log_file_that_hangs_does_not_keep_the_process(tmp_path):
    os.mkfifo(stacks_path(tmp_path, 0))
    with full(os.open(stacks_path(tmp_path, 0), os.O_RDWR)):
        code, said = end_of(tmp_path, "sleeps")
    assert code == TRY_AGAIN and "no step for 0 s after step 7" in said and "in sleeps" in said


def test_a_console_that_hangs_does_not_keep_the_process(tmp_path):
    with full_stderr() as console:
        assert end_of(tmp_path, "sleeps", stderr=console)[0] == TRY_AGAIN


def test_code_that_keeps_the_interpreters_lock_is_ended_with_its_stack_on_stderr(tmp_path):
    code, said = end_of(tmp_path, "keeps_the_lock")
    assert code == FAILED and "in keeps_the_lock" in said


def test_code_that_keeps_the_interpreters_lock_is_ended_although_the_console_hangs(tmp_path):
    with full_stderr() as console:
        assert end_of(tmp_path, "keeps_the_lock", stderr=console)[0] == FAILED


def test_a_limit_of_a_lifetime_is_one_that_the_timer_can_count(tmp_path):
    with Watchdog(tmp_path, rank=0, world_size=1, timeout=0.2, pause_timeout=1e15) as dog, dog.aside("saving"):
        time.sleep(0.5)
        assert dog._thread.is_alive()


def test_a_report_that_does_not_hang_is_waited_for(tmp_path):
    code, said = end_of(tmp_path, "sleeps", report_limit=60.0)
    assert code == TRY_AGAIN and "ending with exit code 75" in said
    assert "Thread MainThread" in stacks_path(tmp_path, 0).read_text() and read_events(tmp_path)[-1]["event"] == "hang"


def test_a_rank_that_noticed_first_ends_after_the_one_that_speaks(tmp_path):
    """Where srun ends a job with its first rank, the verdict would be lost."""
    told: list[str] = []
    speaker, first = (Watchdog(tmp_path, rank=rank, world_size=2, timeout=4, grace=0.3, say=told.append) for rank in (0, 1))
    noticed = threading.Thread(target=lambda: (first._report("no step", "guards.hang_timeout", 4), told.append("end of rank 1")))
    noticed.start()
    time.sleep(0.2)
    speaker._report("no step", "guards.hang_timeout", 4)
    noticed.join()
    assert told[-2].startswith("vilg: hang: ") and told[-1] == "end of rank 1"


def test_a_start_that_hangs_in_a_file_ends_and_says_so(tmp_path):
    os.mkfifo(tmp_path / "text.model")
    settings = {
        "tokens.text_model": tmp_path / "text.model",
        "run_dir": tmp_path / "run",
        "guards.hang_timeout": 1,
        "guards.pause_timeout": 2,
    }
    command = [sys.executable, "-m", "vilg", "train", str(DEBUG_RECIPE), *(f"--{k}={v}" for k, v in settings.items())]
    done = subprocess.run(command, env=train_environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == TRY_AGAIN, done.stderr
    assert "opening the run does not end for 2 s after step 0 (guards.pause_timeout)" in done.stderr
    assert "read_bytes" in stacks_path(tmp_path / "run" / "logs", 0).read_text()
    assert read_events(tmp_path / "run" / "logs")[-1]["text"].startswith("opening the run does not end")
