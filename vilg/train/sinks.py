"""Where a run's figures go beside its own files: TensorBoard, Weights & Biases, a Prometheus text file. Rank 0 only.

A row is a line of metrics.jsonl; an event one of events.jsonl.
"""

import importlib
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vilg.config.schema import Recipe
from vilg.errors import UserError
from vilg.tokens.files import write_atomically
from vilg.train.step import HELD_OUT

Row = dict[str, Any]
# Figures of the last row: key -> (name with its unit, as Prometheus asks for, and what it is).
_GAUGES = {
    "step": ("vilg_step", "optimizer steps done"),
    "loss": ("vilg_loss_nats", "weighted loss of the last step, nats per target token"),
    "text_loss": ("vilg_text_loss_nats", "image to text, nats per text token"),
    "image_loss": ("vilg_image_loss_nats", "text to image, nats per image token"),
    "val_loss": ("vilg_held_out_loss_nats", "weighted loss of the held-out pairs, nats per target token"),
    "val_text_loss": ("vilg_held_out_text_loss_nats", "held out, image to text, nats per text token"),
    "val_image_loss": ("vilg_held_out_image_loss_nats", "held out, text to image, nats per image token"),
    "grad_norm": ("vilg_grad_norm", "global gradient norm before clipping"),
    "lr": ("vilg_learning_rate", "learning rate of the last step"),
    "tokens_per_second": ("vilg_tokens_per_second", "filled slots per second and rank"),
    "seconds_per_step": ("vilg_step_seconds", "mean duration of a step"),
    "mfu": ("vilg_mfu_ratio", "share of the device's peak that the model's work reaches"),
    "hfu": ("vilg_hfu_ratio", "the same with what is computed twice to save memory"),
    "data_wait": ("vilg_data_wait_ratio", "share of the time spent waiting for data"),
    "memory": ("vilg_memory_bytes", "peak memory of rank 0"),
    "eta_seconds": ("vilg_eta_seconds", "time that the remaining steps will take"),
}


class Sink(Protocol):
    """Takes what a run writes."""

    def rows(self, rows: Sequence[Row]) -> None:
        """Steps done since the last call, in order; only the last may hold the figures of a console line."""
        ...

    def event(self, event: Row) -> None:
        """Something happened."""
        ...

    def rewind(self, step: int) -> None:
        """Steps after this one will be done again."""
        ...

    def close(self) -> None:
        """Write what is pending."""
        ...


def open_sinks(recipe: Recipe, folder: Path, *, resume_step: int, warn: Callable[[str], None]) -> list[Sink]:
    """Those that the recipe asks for. folder: the run's logs. One that cannot be opened, because its service does not
    answer or for whatever reason, is warned about and left out. Raises UserError for W&B's missing package and Prometheus'
    missing folder."""
    wanted, makers, sinks = recipe.logging, [], []
    if wanted.tensorboard:
        makers.append(partial(TensorBoard, folder / "tensorboard", resume_step))
    if wanted.wandb != "off":
        makers.append(partial(Wandb, recipe, folder))
    if wanted.prometheus is not None:
        makers.append(partial(Prometheus, wanted.prometheus, recipe.name))
    for make in makers:
        try:
            sinks.append(make())
        except UserError:
            raise
        except Exception as error:
            warn(f"{make.func.__name__} gets nothing in this start: {type(error).__name__}: {error}")
    return sinks


class TensorBoard:
    """Scalars under train/, those of held-out pairs under val/."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        self.folder = folder
        self.writer = self._open(resume_step)

    def rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for key, value in _figures(row).items():
                self.writer.add_scalar(_tag(key), value, row["step"])

    def event(self, event: Row) -> None:
        self.writer.add_text(f"events/{event['event']}", event["text"], event["step"])

    def rewind(self, step: int) -> None:
        self.writer.close()
        self.writer = self._open(step)

    def close(self) -> None:
        self.writer.close()

    def _open(self, resume_step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

        return SummaryWriter(str(self.folder), purge_step=resume_step + 1 if resume_step else None, flush_secs=30)


class Wandb:
    """Weights & Biases; `offline` writes into the logs folder, to be sent with `wandb sync` by whoever may."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise UserError(
                f"logging.wandb={recipe.logging.wandb}, but the package wandb is not installed; `pip install wandb`, "
                "or set logging.wandb=off"
            ) from None
        self.run = wandb.init(
            project=recipe.logging.wandb_project,
            name=recipe.name,
            mode=recipe.logging.wandb,
            dir=str(folder),
            config=recipe.model_dump(mode="json"),
        )
        self.run.define_metric("*", step_metric="step")  # its own counter may not go back; ours may

    def rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.run.log({_tag(key): value for key, value in _figures(row).items()} | {"step": row["step"]})

    def event(self, event: Row) -> None:
        self.run.log({f"events/{event['event']}": 1, "step": event["step"]})

    def rewind(self, step: int) -> None: ...

    def close(self) -> None:
        self.run.finish()


class Prometheus:
    """`<run name>.prom` in the folder of node_exporter's textfile collector, replaced at each console line."""

    def __init__(self, folder: Path, name: str) -> None:
        if not folder.is_dir():
            raise UserError(f"logging.prometheus={folder} is no folder; name the node exporter's textfile folder")
        self.path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.prom"
        self.label = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        self.last: Row = {}
        self.counts: Counter[str] = Counter()

    def rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.last |= row
        if rows:
            self._write()

    def event(self, event: Row) -> None:
        self.counts[event["event"]] += 1
        self._write()

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...

    def _write(self) -> None:
        lines = []
        for key, (name, about) in _GAUGES.items():
            if self.last.get(key) is not None:
                lines += _metric(name, "gauge", about, [(f'run="{self.label}"', self.last[key])])
        events = [(f'run="{self.label}",event="{kind}"', count) for kind, count in sorted(self.counts.items())]
        lines += _metric("vilg_events_total", "counter", "what happened since this start", events) if events else []
        now = [(f'run="{self.label}"', round(time.time(), 3))]
        lines += _metric("vilg_written_timestamp_seconds", "gauge", "when this was written", now)
        write_atomically(self.path, ("\n".join(lines) + "\n").encode())


def _metric(name: str, kind: str, about: str, values: Sequence[tuple[str, float]]) -> list[str]:
    """A metric in Prometheus's text format, version 0.0.4."""
    rows = [f"{name}{{{labels}}} {value}" for labels, value in values]
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *rows]


def _tag(key: str) -> str:
    """`train/loss`, `val/loss`."""
    return f"val/{key.removeprefix(HELD_OUT)}" if key.startswith(HELD_OUT) else f"train/{key}"


def _figures(row: Row) -> dict[str, float]:
    """The numbers of a row that have a curve."""
    return {
        key: value
        for key, value in row.items()
        if key not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
