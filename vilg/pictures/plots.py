"""Curves of a run, drawn from its metrics.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vilg.errors import UserError

matplotlib.rcParams["font.size"] = 9
_LOSSES = (
    ("loss", "total", "#444444"),
    ("image_loss", "text → image", "#c2571a"),
    ("text_loss", "image → text", "#1f6fb4"),
)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a metrics.jsonl that hold a training step, in order. Raises UserError if there are none."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected the metrics of a training run") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON lines ({error})") from None
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise UserError(f"{path}: holds no training step yet")
    return steps


def loss_plot(metrics: Sequence[dict[str, float]], path: Path, *, title: str) -> Path:
    """Losses in nats per target token, and the learning rate, over optimizer steps; held-out losses as dots on a dashed
    line. PNG, written atomically.

    Raises UserError if `path` cannot be written.
    """
    steps = np.array([line["step"] for line in metrics])
    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    for key, label, color in _LOSSES:
        values = np.array([line.get(key) if line.get(key) is not None else np.nan for line in metrics], float)
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        smooth = smoothed(values)
        axes.plot(steps, smooth, color=color, linewidth=1.6, label=f"{label}: {smooth[-1]:.3f} at the end")
        held_out = [(line["step"], line[f"val_{key}"]) for line in metrics if line.get(f"val_{key}") is not None]
        if held_out:
            label = f"held out: {held_out[-1][1]:.3f}"
            axes.plot(*zip(*held_out), "o--", color=color, linewidth=1.1, markersize=3, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per target token", title=title, xlim=(0, steps[-1]))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    rate = axes.twinx()
    rate.plot(steps, [line.get("lr", np.nan) for line in metrics], color="#999999", linestyle=":", linewidth=1)
    rate.set_ylabel("learning rate (dotted)", color="#777777")
    rate.set_ylim(bottom=0)
    axes.legend(loc="upper right", frameon=False)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, atomically. Raises UserError if `path` cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from error
    return path


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a fiftieth of the curve; gaps (NaN) are left out of the mean; wider ones stay."""
    width = max(1, len(values) // 50)
    known = np.nan_to_num(values)
    weights = np.convolve(~np.isnan(values), np.ones(width), "same")
    means = np.convolve(known, np.ones(width), "same") / np.maximum(weights, 1)
    return np.where(weights > 0, means, np.nan)
