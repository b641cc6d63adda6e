"""Processes by what is in their environment, and a watcher that ends a cluster's when its owner is gone.

    python tests/slurm/processes.py NAME=VALUE    waits for the end of its standard input, then kills

The daemons of SLURM put themselves and the jobs into sessions of their own: no signal to a group reaches them, and they
would go on for ever when a test process is killed. The standard library only, so that the watcher costs nothing.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def environments() -> list[tuple[int, set[str]]]:
    """(process id, its environment as NAME=value) of all processes that can be read."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                raw = (entry / "environ").read_bytes()
            except OSError:
                continue  # ended meanwhile
            found.append((int(entry.name), set(raw.decode(errors="replace").split("\0"))))
    return found


def kill_all(belongs: Callable[[set[str]], bool]) -> int:
    """Kill the processes whose environment belongs, except this one; how many there were."""
    count = 0
    for pid, environment in environments():
        if pid != os.getpid() and belongs(environment):
            try:
                os.kill(pid, signal.SIGKILL)
                count += 1
            except ProcessLookupError:
                pass  # it ended by itself
    return count


def start_watcher(setting: str) -> subprocess.Popen:
    """A process that kills all with NAME=VALUE in their environment as soon as this one has ended, however it did, or
    has closed the watcher's standard input."""
    command = [sys.executable, "-S", __file__, setting]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    # A daemon may start one more process while its others are being killed.
    while kill_all(lambda environment: sys.argv[1] in environment):
        pass
