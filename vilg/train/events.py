"""What happened to a run, beside its steps: logs/events.jsonl, one line an event, only ever appended to.

An event has `time` (seconds since 1970), `event` (one of KINDS), `step` (the last finished one), and details;
`text` is the sentence that people read.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"
KINDS = (
    "start",  # host, world_size, job
    "save",
    "prune",  # older checkpoints could not be deleted
    "evaluate",
    "draw",
    "nonfinite",  # a step left out
    "spike",  # loss, limit, action
    "rollback",  # to_step, left_out
    "straggler",
    "fault",  # planted by VILG_FAULT
    "hang",
    "stop",  # asked for, the run can be continued
    "finish",
    "error",
)


def new_event(kind: str, step: int, text: str, **details: Any) -> dict[str, Any]:
    """An event that happens now."""
    assert kind in KINDS, kind
    return {"time": round(time.time(), 3), "event": kind, "step": step, "text": text, **details}


def event_line(event: dict[str, Any]) -> str:
    """The event's line of the file. A short write: lines of two ranks do not mix, and a crash cuts at most the last."""
    return json.dumps(event, ensure_ascii=False) + "\n"


def append_event(folder: Path, kind: str, step: int, text: str, **details: Any) -> None:
    """Append an event that happens now to the folder's file. Raises OSError."""
    with open(folder / EVENTS_FILE, "a", encoding="utf-8") as stream:
        stream.write(event_line(new_event(kind, step, text, **details)))


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a logs folder in order; none if there is no file. A line that a crash cut is left out."""
    path = folder / EVENTS_FILE
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and {"time", "event", "step"} <= row.keys():
                events.append(row)
    return events
