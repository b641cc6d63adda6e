"""One thread that does the model's work, job after job, while the event loop keeps talking to clients.

A model fills its device, so more threads would only share it; what is asked meanwhile waits in line.
A job is told to stop when nobody waits for it any more, and stops at its next `Job.check`.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any


class Stopped(Exception):
    """Raised inside a job that nobody waits for any more."""


@dataclass(frozen=True)
class Progress:
    """Where a job stands. ahead: jobs to be done before it, 0 once it runs; done of total: steps of its own.

    previews: PNG pictures that are half drawn, of the candidates from number `first` on.
    """

    ahead: int = 0
    done: int = 0
    total: int = 0
    previews: tuple[bytes, ...] = ()
    first: int = 0


class Job:
    """A piece of work that waits, runs, and is done or stopped; made by `Worker.submit` on the event loop."""

    def __init__(self, work: Callable[["Job"], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._work, self._loop = work, loop
        self._stop = threading.Event()
        self._news = asyncio.Event()
        self._progress = Progress()
        self._result: asyncio.Future[Any] = loop.create_future()
        self._result.add_done_callback(self._forget)

    def check(self) -> None:
        """For the work itself: raise Stopped if it is to stop."""
        if self._stop.is_set():
            raise Stopped

    def report(self, progress: Progress) -> None:
        """Say where the job stands; from any thread. Only the newest word is kept for a reader that is slow."""
        self._call(self._note, progress)

    def stop(self) -> None:
        """Let the work end at its next check, or never begin."""
        self._stop.set()

    async def progress(self) -> AsyncIterator[Progress]:
        """Each newest state until the work has ended."""
        while not self._result.done():
            await self._news.wait()
            self._news.clear()
            if not self._result.done():
                yield self._progress

    async def result(self) -> Any:
        """What the work returned, or its exception."""
        return await asyncio.shield(self._result)

    def run(self) -> None:
        """Do the work in this thread, unless it was stopped before."""
        try:
            self.check()
            value = self._work(self)
        except BaseException as error:  # whatever it is belongs to the client that asked
            self._call(self._settle, None, error)
        else:
            self._call(self._settle, value, None)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _note(self, progress: Progress) -> None:
        self._progress = progress
        self._news.set()

    def _settle(self, value: Any, error: BaseException | None) -> None:
        if error is None:
            self._result.set_result(value)
        else:
            self._result.set_exception(error)

    def _forget(self, result: asyncio.Future[Any]) -> None:
        self._news.set()
        if not result.cancelled():
            result.exception()  # a stopped job's is nobody's to read


class Worker:
    """The thread and its line, which whoever submits keeps short."""

    def __init__(self) -> None:
        self._line: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="vilg-worker", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        return self._running is None and not self._line

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Put work at the end of the line; call it on the event loop. Raises Stopped after `close`."""
        job = Job(work, asyncio.get_running_loop())
        with self._changed:
            if self._closed:
                raise Stopped
            self._line.append(job)
            self._tell_places()
            self._changed.notify()
        return job

    def withdraw(self, job: Job) -> None:
        """Stop a job; one that still waits leaves its place in the line at once."""
        job.stop()
        with self._changed:
            if job in self._line:
                self._line.remove(job)
                self._tell_places()

    def close(self) -> None:
        """Stop all jobs and wait until the thread has ended."""
        with self._changed:
            self._closed = True
            for job in [*self._line, *([self._running] if self._running else [])]:
                job.stop()
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if not self._line:
                    return
                self._running = self._line.popleft()
                self._tell_places()
            self._running.run()
            with self._changed:
                self._running = None
                self._tell_places()

    def _tell_places(self) -> None:
        for place, job in enumerate(self._line):
            job.report(Progress(ahead=place + (self._running is not None)))
