"""Processes that build steps ahead of the trainer, each behind a pipe of its own.

Not torch's DataLoader, whose workers share one pipe and its lock: one that is killed with half a message sent, as the kernel
does when memory is short, leaves its trainer waiting for the other half without end. Here nobody but the worker holds the far
end of its pipe, so that its death is the end of a file, which the trainer meets where it waits for the next step.
"""

import itertools
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

import torch

from vilg.data.children import fork_server, tie_to_parent
from vilg.data.steps import StepData
from vilg.errors import TRY_AGAIN, UserError

Build = Callable[[int], StepData]  # from the first global index of a step
_GRACE = 5.0  # seconds that workers have to finish the step in their hands when the trainer wants no more


def built_ahead(build: Build, firsts: Iterator[int], *, workers: int, ahead: int) -> Iterator[StepData]:
    """`build` of each of `firsts` (without end), in their order, from `workers` processes that hold `ahead` steps ready each.

    build: picklable. The workers end with the generator, and when this process ends, however it does. Raises UserError
    (TRY_AGAIN) naming a worker that died, RuntimeError with the traceback of an exception in `build`.
    """
    # Forked from a server: a fork of a process that holds CUDA, NCCL or logging threads may hang, and spawning imports
    # torch anew for every worker.
    context = fork_server(__name__)
    team: list[_Worker] = []
    # With an uncaught exception nobody closes the generator. multiprocessing then asks daemons by SIGTERM, which workers
    # ignore, and waits for them without end; its own finalizers run before that.
    end = util.Finalize(None, _end, args=(team,), exitpriority=0)
    try:
        for number in range(1, workers + 1):
            team.append(_Worker(context, build, f"loader worker {number} of {workers}"))
        for worker in team * ahead:
            worker.ask(next(firsts))
        for worker in itertools.cycle(team):
            data = worker.take()
            worker.ask(next(firsts))
            yield data
    finally:
        end()


class _Worker:
    """The trainer's end of a worker."""

    def __init__(self, context: ForkServerContext, build: Build, name: str):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(build, theirs), name=name, daemon=True)
        self.process.start()
        theirs.close()  # or its death would not end what is read from `connection`

    def ask(self, first: int) -> None:
        """Order the step that begins at `first`; of a dead worker `take` tells."""
        try:
            self.connection.send(first)
        except OSError:
            return

    def take(self) -> StepData:
        """The oldest step that was ordered and not taken. Raises as `built_ahead`."""
        try:
            data = self.connection.recv()
        except (EOFError, OSError):
            raise UserError(self._obituary(), TRY_AGAIN) from None
        if isinstance(data, _Raised):
            raise RuntimeError(f"{self.process.name}:\n{data.traceback}")
        return data

    def _obituary(self) -> str:
        self.process.join(_GRACE)  # until the fork server has told how it ended
        code, why = self.process.exitcode, "what it printed before may say why"
        how = f"by signal {-code} ({signal.strsignal(-code)})" if code and code < 0 else f"with exit code {code}"
        if code == -signal.SIGKILL:
            why = "mostly it is killed because memory is full: set data.workers lower, or ask for more host memory"
        return f"{self.process.name} (process {self.process.pid}) ended {how}; {why}. The same command continues the run"


@dataclass(frozen=True)
class _Raised:
    """Comes from a worker in place of a step."""

    traceback: str


def _end(team: list[_Worker]) -> None:
    """Tell all workers to end, and see that they have."""
    for worker in team:
        worker.connection.close()
    deadline = time.monotonic() + _GRACE
    for worker in team:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():  # in a read that stalls, or in a long one
            worker.process.kill()
            worker.process.join(_GRACE)


def _serve(build: Build, connection: Connection) -> None:
    """A worker's life: steps in the order in which they are asked for, until the trainer closes its end."""
    tie_to_parent()
    torch.set_num_threads(1)  # the other cores have workers of their own
    ready: queue.SimpleQueue[StepData | _Raised] = queue.SimpleQueue()
    threading.Thread(target=_send, args=(connection, ready), daemon=True).start()
    while True:
        try:
            first = connection.recv()
        except (EOFError, OSError):
            return
        try:
            ready.put(build(first))
        except Exception:
            ready.put(_Raised(traceback.format_exc()))


def _send(connection: Connection, ready: "queue.SimpleQueue[StepData | _Raised]") -> None:
    """Send what is ready. In a thread of its own: a pipe holds less than a step, and the next one is built meanwhile."""
    try:
        while True:
            connection.send(ready.get())
    except OSError:  # the trainer has closed its end: what was asked for besides is not wanted any more
        os._exit(0)
    except BaseException:  # without this thread the trainer would wait for ever
        traceback.print_exc()
        os._exit(1)
