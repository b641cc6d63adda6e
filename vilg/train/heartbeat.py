"""logs/heartbeat.json: one small file for whoever watches a run from outside, replaced atomically.

    {"format_version": 1, "time": 1795520677.9, "state": "training", "step": 120, "steps": 5000, "loss": 5.31,
     "host": "node1", "pid": 4711, "world_size": 16, "job": "123456"}

A `time` that is older than a few steps with a `state` of "training" means that the run hangs or died without a word.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from vilg.tokens.files import write_atomically

HEARTBEAT_FILE = "heartbeat.json"
HEARTBEAT_VERSION = 1
State = Literal["training", "saving", "evaluating", "drawing", "stopped", "finished", "failed"]


class Heartbeat:
    """Written by rank 0 when the state changes, and at most every `every` seconds while training; 0: never."""

    def __init__(self, folder: Path, *, every: float, steps: int, world_size: int) -> None:
        self.path, self.every = folder / HEARTBEAT_FILE, every
        self.fixed: dict[str, Any] = dict(
            steps=steps,
            host=socket.gethostname(),
            pid=os.getpid(),
            world_size=world_size,
            job=os.environ.get("SLURM_JOB_ID", ""),
        )
        self.loss: float | None = None
        self._tried, self._state = -float("inf"), ""

    def due(self) -> bool:
        """Whether the next `beat` would write although the state stays the same."""
        return self.every > 0 and time.monotonic() - self._tried >= self.every

    def beat(self, state: State, step: int, loss: float | None = None) -> bool:
        """Write, if it is time; whether it was. loss: of the last step; None keeps the one written before.

        Raises UserError if it cannot be written; the next try is at the next change of state, or after `every` seconds.
        """
        self.loss = self.loss if loss is None else loss
        if self.every <= 0 or (state == self._state and not self.due()):
            return False
        self._tried, self._state = time.monotonic(), state
        row = {"format_version": HEARTBEAT_VERSION, "time": round(time.time(), 3), "state": state, "step": step}
        write_atomically(self.path, (json.dumps({**row, "loss": self.loss, **self.fixed}) + "\n").encode())
        return True


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """The last heartbeat of a logs folder; None if there is none or its version is unknown."""
    try:
        row = json.loads((folder / HEARTBEAT_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return row if isinstance(row, dict) and row.get("format_version") == HEARTBEAT_VERSION else None
