"""Processes that work for this one."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def tie_to_parent() -> None:
    """Tie this process's life to its parent's and to nothing else.

    Ctrl-C and SLURM's TERM reach every process of a job; the parent decides when to stop and then kills its children.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """End this process when its parent has ended, which if killed outright cannot end it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
