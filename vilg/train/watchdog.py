"""The hang watchdog: a run whose steps stop coming says where it stands and ends, so that it can be started anew.

Every rank has its own: when one rank is stuck, dead or stopped, the others wait for it in a collective without end, and
each of them notices by itself. What is left in logs/: `stacks_rankN.txt` (all threads of every rank that could still
write) and `flight_rankN.json` (torch's flight recorder: its last collectives). A rank without fresh stacks is the
one to look at. The file system of logs/ may be what hangs: stderr is told first, and the end waits for no file.
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
from types import FrameType

import torch.distributed as dist

from vilg.errors import TRY_AGAIN
from vilg.train.events import append_event
from vilg.train.logfile import tell

GRACE_SECONDS = 10.0  # between a rank's report and its end, so that every rank has reported before the first one ends
_LONGEST = 1e9  # seconds that the timer in C can count
REPORT_SECONDS = 30.0  # that a report may take; one that takes longer waits for a file system that does not answer


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

    A context manager. What has another rhythm (the start, a checkpoint, an evaluation, a sample sheet) goes inside
    `aside`, which may take pause_timeout seconds (0: without end). Touches no file before a hang. Raises nothing:
    whatever becomes of the report, the process ends at most grace + report_limit seconds after the limit.

    say: may be set later, to the run's log. grace, report_limit and exit are for tests.
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
        report_limit: float = REPORT_SECONDS,
        say: Callable[[str], None] = tell,
        exit: Callable[[int], object] = os._exit,
    ) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.timeout, self.grace, self.say, self.exit = timeout, min(grace, timeout), say, exit
        self.pause_timeout, self.report_limit = pause_timeout, report_limit
        self.step = 0
        self._tick = min(5.0, timeout / 4)
        self._main = threading.get_ident()
        self._last = time.monotonic()
        self._aside: list[str] = []  # what is being done instead of steps, innermost last
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._backstop = -1  # descriptor that the timer in C writes to

    def __enter__(self) -> "Watchdog":
        if self.timeout > 0:
            self._main, self._last = threading.get_ident(), time.monotonic()
            self._backstop = _stderr_that_never_blocks()
            self._put_off(self.timeout)
            self._thread = threading.Thread(target=self._watch, name="vilg-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            os.close(self._backstop)

    def beat(self, step: int) -> None:
        """A step was finished."""
        self.step, self._last = step, time.monotonic()

    @contextmanager
    def aside(self, work: str) -> Iterator[None]:
        """Time spent inside, on `work` (a word or two), is no part of a step and has a limit of its own."""
        self._last = time.monotonic()
        self._aside.append(work)
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._aside.pop()

    def _watch(self) -> None:
        while not self._ended.wait(self._tick):
            work = self._aside[-1:]  # before `_last`, which is set before it changes
            limit = self.pause_timeout if work else self.timeout
            self._put_off(limit)
            if 0 < limit < time.monotonic() - self._last:
                key = "guards.pause_timeout" if work else "guards.hang_timeout"
                what = f"{work[0]} does not end" if work else "no step"
                text = f"{what} for {limit:.0f} s after step {self.step}"
                report = threading.Thread(target=self._report, args=(text, key, limit), daemon=True)
                try:
                    report.start()
                    report.join(self.grace + self.report_limit)
                finally:
                    self.exit(TRY_AGAIN)
                return

    def _put_off(self, limit: float) -> None:
        """Code that keeps the interpreter's lock stops the watchdog's thread too. A timer in C needs no lock; it ends
        the process unless it is put off again. limit: seconds (0: no timer)."""
        if limit > 0:
            late = limit + self.grace + self.report_limit + self._tick
            faulthandler.dump_traceback_later(min(late, _LONGEST), exit=True, file=self._backstop)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _report(self, what: str, key: str, limit: float) -> None:
        """Leave all there is to know, stderr first; may hang in a file, and is then left behind."""
        host, own = socket.gethostname(), stacks_path(self.folder, self.rank)
        try:
            frames = sys._current_frames()
            main = frames.get(self._main)
            text = f"rank {self.rank} on {host}: {what} ({key}); main thread in {_place(main)}"
            self.say(f"{text}; all threads in {own}\n{_stack(main)}")
            self.folder.mkdir(parents=True, exist_ok=True)  # a start may hang before it has made the folder
            with open(own, "a", encoding="utf-8") as stream:
                stream.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n{_all_stacks(frames)}\n")
            written = own.stat().st_mtime
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
            else:  # the first end is that of all, under srun: whoever noticed before the one that speaks waits for it
                time.sleep(2 * self._tick)
        except Exception:  # the disk may be full: the end must come all the same
            tell(traceback.format_exc())


def _stderr_that_never_blocks() -> int:
    """A descriptor of stderr for the timer in C, which ends the process only when its words are written.

    Stderr may be a pipe whose reader waits for the file system that hangs. Opened anew: O_NONBLOCK on the descriptor
    itself would hold for every process that shares it. Where that cannot be done (a socket) nothing is said.
    """
    try:
        return os.open("/dev/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


# Not by `faulthandler`, which keeps the interpreter's lock while a file that hangs takes its words, nor with lines of the
# source, which would be read from files.
def _all_stacks(frames: dict[int, FrameType]) -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [f"Thread {names.get(ident, ident)}:\n{_stack(frame)}" for ident, frame in frames.items()]
    return "\n\n".join(stacks)


def _stack(innermost: FrameType | None) -> str:
    frames = [frame for frame, _ in traceback.walk_stack(innermost)] if innermost else []
    lines = [f'  File "{f.f_code.co_filename}", line {f.f_lineno} in {f.f_code.co_name}' for f in frames]
    return "\n".join(lines)


def _place(frame: FrameType | None) -> str:
    """Innermost frame of a thread: `all_reduce (distributed_c10d.py:2811)`."""
    if frame is None:
        return "no Python frame"
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _dump_flight_recorder(path: Path) -> None:
    """Torch's record of the last collectives, as JSON; nothing where this torch has none or there is no group."""
    from torch._C import _distributed_c10d  # private, and only some builds have it

    dump = getattr(_distributed_c10d, "_dump_fr_trace_json", None)
    if dump is not None and dist.is_initialized():
        path.write_bytes(dump())
