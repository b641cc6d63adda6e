"""Processes that work for this one."""

import multiprocessing
import os
import signal
import threading


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
