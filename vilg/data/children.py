"""Processes that work for this one."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, SLURM's end of a job, its early warning


def pool(workers: int) -> ProcessPoolExecutor:
    """Processes that end with this one, also if it is killed. Spawned, not forked: torch may have threads by now."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)


def mapped(action: Callable[[Item], Result], items: Sequence[Item], *, workers: int) -> Iterator[Result]:
    """`map` by so many processes, 0: by this one; results in order. After an error no further item is begun."""
    if workers == 0 or not items:
        yield from map(action, items)
        return
    with pool(min(workers, len(items))) as processes:
        try:
            yield from processes.map(action, items)
        finally:
            processes.shutdown(cancel_futures=True)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fork_server(preload: str) -> ForkServerContext:
    """Context whose processes are forked from a server that has imported the module `preload`.

    Neither the server nor what it forks receives STOP_SIGNALS, from the first instruction on: a blocked signal stays blocked
    in what a process starts. Nothing is lost here: what arrives meanwhile is delivered afterwards. A process has one server
    for all: what else is forked from it has to unblock them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # Starting the tracker unblocks SIGINT and SIGTERM; the server's start would do so, were it not running by then.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def tie_to_parent() -> None:
    """Tie this process's life to its parent's and to nothing else.

    STOP_SIGNALS reach every process of a job; the parent decides when to stop and then ends its children.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """End this process when its parent has ended, which if killed outright cannot end it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
