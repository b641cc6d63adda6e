"""What a run says: console lines, metrics.jsonl, events.jsonl and sinks from rank 0; every rank has a log of its own."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vilg.train.events import EVENTS_FILE, event_line, new_event
from vilg.train.logfile import LogFile, tell
from vilg.train.metrics import Window
from vilg.train.sinks import Row, Sink
from vilg.train.step import StepPlan, StepResult

METRICS_FILE = "metrics.jsonl"
_PARTS = (("image", "image_loss"), ("text", "text_loss"), ("pixels", "reconstruction_loss"))


class RunLog:
    """Open for one start of a run. `resume_step`: metrics of later steps, which will be done again, are removed.

    sinks: where rows and events go as well; one that fails is reported and left out from then on. Raises OSError if a
    file cannot be opened at first; later nothing, whatever fails (logfile.py).
    """

    def __init__(
        self, folder: Path, *, rank: int, total_steps: int, resume_step: int, sinks: list[Sink] | None = None
    ) -> None:
        self.folder, self.rank, self.total_steps = folder, rank, total_steps
        self.pending: list[tuple[StepPlan, StepResult, dict[str, float | None]]] = []
        self.own = self._open(f"rank_{rank}.log")
        self.metrics: LogFile | None = None
        self.events: LogFile | None = None
        self.sinks = list(sinks or []) if rank == 0 else []
        if rank == 0:
            cut_metrics(folder / METRICS_FILE, resume_step)
            self.metrics, self.events = self._open(METRICS_FILE), self._open(EVENTS_FILE)

    def say(self, text: str) -> None:
        """A line for people: on the console from rank 0, in every rank's log file."""
        self._note(text)
        if self.rank == 0:
            tell(text, sys.stdout)

    def warn(self, text: str) -> None:
        """As `say`, on stderr, marked."""
        self._note(f"warning: {text}")
        if self.rank == 0:
            tell(f"warning: {text}")

    def alarm(self, text: str) -> None:
        """On stderr from any rank, and in its log file: it may be the last thing that this rank says."""
        tell(text)  # first: the file may be what hangs
        self._note(text)

    def event(
        self, kind: str, step: int, text: str, *, warn: bool = False, quiet: bool = False, **details: Any
    ) -> None:
        """As `say` (or `warn`; quiet: in no console), and a line of events.jsonl with the time, for monitors."""
        if quiet:
            self._note(text)
        else:
            (self.warn if warn else self.say)(text)
        if self.events:
            event = new_event(kind, step, text, **details)
            self.events.write([event_line(event)])
            self._each_sink(lambda sink: sink.event(event))

    def step(self, plan: StepPlan, result: StepResult) -> None:
        """Keep a step's numbers where they are, on the device, until `flush` reads them."""
        if self.rank == 0:
            self.pending.append((plan, result, {}))

    def add(self, figures: Mapping[str, float | None]) -> None:
        """Further figures of the step that was kept last; None for one that is not finite."""
        if self.pending:
            self.pending[-1][2].update(figures)

    def flush(self, window: Window | None = None, *, device_word: str = "gpu", **figures: float) -> None:
        """Write the steps kept; with a window also the console line, from the last step, and the figures beside it."""
        rows = [_row(plan, result) | added for plan, result, added in self.pending]
        self.pending.clear()
        if rows and window:
            rows[-1] |= {k: v for k, v in asdict(window).items() if v is not None} | figures
            rows[-1]["time"] = round(time.time(), 3)
            self.say(console_line(rows[-1], self.total_steps, window, device_word))
        if self.metrics:
            self.metrics.write(json.dumps(row) + "\n" for row in rows)
        self._each_sink(lambda sink: sink.rows(rows))

    def rewind(self, step: int) -> None:
        """The run goes back: steps after this one will be done again, and their rows are removed."""
        self.flush()
        if self.metrics:
            self.metrics.forget(lambda row: json.loads(row)["step"] > step)
            try:
                cut_metrics(self.metrics.path, step)
            except OSError as error:
                self.warn(f"{self.metrics.path} holds steps after {step} that are done again: {error.strerror}")
        self._each_sink(lambda sink: sink.rewind(step))

    def close(self) -> None:
        """Write what is pending, and say what could not be written."""
        self.flush()
        self._each_sink(lambda sink: sink.close())
        for file in filter(None, (self.metrics, self.events, self.own)):
            file.close()

    def _open(self, name: str) -> LogFile:
        # On stderr from any rank: the rank's own log is likely to be on the same disk.
        return LogFile(self.folder / name, lambda text: tell(f"warning: rank {self.rank}: {text}"))

    def _note(self, text: str) -> None:
        self.own.write([f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"])

    def _each_sink(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                action(sink)
            except Exception as error:  # whatever a package of others raises must not end a run
                self.sinks.remove(sink)
                self.warn(f"{type(sink).__name__} gets nothing more in this start: {type(error).__name__}: {error}")


def console_line(row: dict, total_steps: int, window: Window, device_word: str) -> str:
    """`step 120/5000  loss 5.31 (image 6.02 text 3.88)  ...`, with units. MFU is n/a where no peak is known; HFU stands
    where something is computed again."""
    norm = "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    parts = [
        f"step {row['step']}/{total_steps}",
        loss_text(row),
        f"lr {row['lr']:.2e}",
        f"grad {norm}",
        f"{_thousands(window.tokens_per_second)} tok/s/{device_word}",
        *([f"MFU {window.mfu:.0%}"] if window.mfu is not None else ["MFU n/a"]),
        *([f"HFU {window.hfu:.0%}"] if window.hfu is not None and window.hfu != window.mfu else []),
        f"data {window.data_wait:.0%}",
        f"mem {window.memory / 2**30:.1f} GiB",
        f"eta {duration(window.eta_seconds)}",
    ]
    return "  ".join(parts)


def loss_text(row: Mapping[str, float | None], *, prefix: str = "") -> str:
    """`loss 5.310 (image 6.020 text 3.880)` of the keys with this prefix; the parts that are there."""
    parts = [(name, row.get(prefix + key)) for name, key in _PARTS]
    parts = " ".join(f"{name} {value:.3f}" for name, value in parts if value is not None)
    total = row[prefix + "loss"]
    loss = "loss not finite" if total is None else f"loss {total:.3f}"
    return f"{loss} ({parts})" if parts else loss


def cut_metrics(path: Path, last_step: int) -> None:
    """Remove lines of steps after `last_step`, and a last line that a crash cut short; atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.writelines(kept)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def duration(seconds: float) -> str:
    """`3h12m`, `4m10s`, `12s`."""
    whole = int(round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def _row(plan: StepPlan, result: StepResult) -> Row:
    keys = ["loss", "text_loss", "image_loss", *(["z_loss"] if plan.z_loss else []), "grad_norm", "lr"]
    if plan.reconstruction:
        keys.append("reconstruction_loss")
    numbers = {key: finite(getattr(result, key)) for key in keys}
    numbers |= {key: finite(value) for key, value in result.figures.items()}
    return {"step": plan.step, **numbers, "skipped": result.skipped}


def finite(value: object) -> float | None:
    """The number, None where it is not finite: JSON has no NaN."""
    number = float(value)
    return number if math.isfinite(number) else None


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
