"""The hang watchdog: a run whose steps stop coming says where it stands and ends, so that it can be started anew.

Every rank has its own: when one rank is stuck, dead or stopped, the others wait for it in a collective without end, and
each of them notices by itself. What is left in logs/: `stacks_rankN.txt` (all threads of every rank that could still
write) and `flight_rankN.json` (torch's flight recorder: its last collectives). A rank without fresh stacks is the
one to look at.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from vilg.errors import TRY_AGAIN
from vilg.train.events import append_event

GRACE_SECONDS = 10.0  # between a rank's report and its end, so that every rank has reported before the first one ends


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank's stacks go."""
    return folder / f"stacks_rank{rank}.txt"


def silent_ranks(folder: Path, world_size: int, *, since: float) -> list[int]:
    """Ranks whose stacks file is missing, empty or older than `since` (seconds since 1970, file system's clock)."""

    def is_fresh(rank: int) -> bool:
        try:
            found = stacks_path(folder, rank).stat()
        except FileNotFoundError:
            return False
        return found.st_size > 0 and found.st_mtime >= since

    return [rank for rank in range(world_size) if not is_fresh(rank)]


class Watchdog:
    """A thread that ends the process with TRY_AGAIN when `beat` was not called for `timeout` seconds (0: never).

    A context manager. What has another rhythm (a checkpoint, an evaluation, a sample sheet) goes inside `aside`, which may take
    pause_timeout seconds (0: without end). exit and say are for tests and for the run's log. Raises nothing: a watchdog that fails to write still ends the process.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        timeout: float,
        pause_timeout: float = 0.0,
        grace: float = GRACE_SECONDS,
        say: Callable[[str], None] = print,
        exit: Callable[[int], object] = os._exit,
    ) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.timeout, self.grace, self.say, self.exit = timeout, min(grace, timeout), say, exit
        self.pause_timeout = pause_timeout
        self.step = 0
        self._main = threading.get_ident()
        self._last = time.monotonic()
        self._aside: list[str] = []  # what is being done instead of steps, innermost last
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._backstop = None

    def __enter__(self) -> "Watchdog":
        if self.timeout > 0:
            self._main, self._last = threading.get_ident(), time.monotonic()
            self._backstop = open(stacks_path(self.folder, self.rank), "a", encoding="utf-8")
            self._thread = threading.Thread(target=self._watch, name="vilg-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._backstop.close()
            if stacks_path(self.folder, self.rank).stat().st_size == 0:
                stacks_path(self.folder, self.rank).unlink()

    def beat(self, step: int) -> None:
        """A step was finished."""
        self.step, self._last = step, time.monotonic()

    @contextmanager
    def aside(self, work: str) -> Iterator[None]:
        """Time spent inside, on `work` (one word), is no part of a step and has a limit of its own."""
        self._last = time.monotonic()
        self._aside.append(work)
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._aside.pop()

    def _watch(self) -> None:
        tick = min(5.0, self.timeout / 4)
        while not self._ended.wait(tick):
            # Code that keeps the interpreter's lock would stop this thread too. The C timer needs no lock; it is put
            # off as long as this thread runs.
            faulthandler.dump_traceback_later(self.timeout + 4 * self.grace + tick, exit=True, file=self._backstop)
            work = self._aside[-1:]  # before `_last`, which is set before it changes
            limit = self.pause_timeout if work else self.timeout
            if 0 < limit < time.monotonic() - self._last:
                key = "guards.pause_timeout" if work else "guards.hang_timeout"
                what = f"{work[0]} does not end" if work else "no step"
                self._report(f"{what} for {limit:.0f} s after step {self.step}", key, limit)
                self.exit(TRY_AGAIN)
                return

    def _report(self, what: str, key: str, limit: float) -> None:
        host, own = socket.gethostname(), stacks_path(self.folder, self.rank)
        try:
            text = f"rank {self.rank} on {host}: {what} ({key}); main thread in {_place(self._main)}"
            self._backstop.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._backstop.flush()
            faulthandler.dump_traceback(self._backstop, all_threads=True)
            written = own.stat().st_mtime
            self.say(f"{text}; all threads in {own}")
            self.say("".join(traceback.format_stack(sys._current_frames().get(self._main))))
            _dump_flight_recorder(self.folder / f"flight_rank{self.rank}.json")
            time.sleep(self.grace)
            silent = silent_ranks(self.folder, self.world_size, since=written - limit)
            reporters = [rank for rank in range(self.world_size) if rank not in silent]
            if self.rank == reporters[0]:  # one rank speaks for all, and rank 0 may be the one that is silent
                verdict = f"{what}; stacks of {len(reporters)} rank(s)"
                if silent:
                    verdict += f"; SILENT, look there first: rank {', '.join(map(str, silent))}"
                self.say(f"vilg: hang: {verdict}; ending with exit code {TRY_AGAIN}")
                append_event(self.folder, "hang", self.step, verdict, silent=silent, host=host)
        except Exception:  # the disk may be what hangs or is full: the end must come all the same
            traceback.print_exc()


def _place(thread: int) -> str:
    """Innermost frame of a thread: `all_reduce (distributed_c10d.py:2811)`."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "no Python frame"
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _dump_flight_recorder(path: Path) -> None:
    """Torch's record of the last collectives, as JSON; nothing where this torch has none or there is no group."""
    from torch._C import _distributed_c10d  # private, and only some builds have it

    dump = getattr(_distributed_c10d, "_dump_fr_trace_json", None)
    if dump is not None and dist.is_initialized():
        path.write_bytes(dump())
