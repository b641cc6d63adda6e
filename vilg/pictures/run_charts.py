"""Charts of one or several training runs over their steps: loss, speed, memory, gradient, learning rate, progress."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vilg.pictures.plots import save_figure, smoothed

# Okabe and Ito's colours, told apart by every kind of eye; the yellow is left out, it vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_TIME_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
_HELD_OUT = dict(marker="o", linestyle=(0, (3, 2)), markersize=3.2, linewidth=1.2)
_LABEL = dict(
    textcoords="offset points", fontsize=8, zorder=5,
    bbox=dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor="none", alpha=0.85),
)  # fmt: skip
_SKIPPED, _MUTED, _GRID = "#C1121F", "#6b7280", "#e5e7eb"
Row = dict[str, Any]


@dataclass(frozen=True)
class RunCurves:
    """A run as charts need it. rows: lines of metrics.jsonl; events: of events.jsonl; both in order."""

    name: str
    colour: str
    rows: Sequence[Row]
    events: Sequence[Row]

    def column(self, key: str, rows: Sequence[Row] | None = None) -> np.ndarray:
        """Values of a key, float64, NaN where a row has none."""
        rows = self.rows if rows is None else rows
        return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)

    def windows(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the rows that hold a figure: of a console line, of held-out pairs."""
        rows = [row for row in self.rows if row.get(key) is not None]
        return self.column("step", rows), self.column(key, rows)

    def steps_of(self, *kinds: str) -> list[int]:
        """Steps of events of these kinds."""
        return [event["step"] for event in self.events if event["event"] in kinds]


@dataclass(frozen=True)
class Chart:
    """A picture on the page. caption: what to read from it, one sentence."""

    file: str
    title: str
    caption: str
    draw: Callable[[Sequence[RunCurves]], Figure | None]
    wide: bool = False


def draw_charts(runs: Sequence[RunCurves], folder: Path) -> list[Chart]:
    """Write the charts that these runs have figures for as PNG; those written. Raises UserError if that fails."""
    written = []
    for chart in CHARTS:
        figure = chart.draw(runs)
        if figure is not None:
            save_figure(figure, folder / chart.file)
            written.append(chart)
    return written


def loss_chart(runs: Sequence[RunCurves]) -> Figure:
    """Total and both directions, raw and smoothed; held-out losses as dots on a dashed line."""
    figure, panels = _figure(width=13, height=4.2, columns=3)
    for axes, key, title in zip(
        panels, ("loss", "image_loss", "text_loss"), ("minimised loss", "text → image", "image → text")
    ):
        smooth_all = []
        for run in runs:
            steps, values = run.column("step"), run.column(key)
            kept = np.where(run.column("skipped") > 0, np.nan, values)
            if not np.isfinite(kept).any():
                continue
            smooth = smoothed(kept)
            smooth_all.append(smooth)
            at, held_out = run.windows(f"val_{key}")
            if len(at):
                smooth_all.append(held_out)
                axes.plot(at, held_out, color=run.colour, zorder=4, **_HELD_OUT)
                axes.annotate(
                    f"{held_out[-1]:.3f} held out", (at[-1], held_out[-1]), (0, 9), **_LABEL, color=run.colour, ha="right"
                )
            axes.plot(steps, kept, color=run.colour, alpha=0.22, linewidth=0.8)
            axes.plot(steps, smooth, color=run.colour, linewidth=1.7)
            axes.annotate(
                f"{smooth[-1]:.3f}", (steps[-1], smooth[-1]), (4, 0), **_LABEL, color=run.colour, va="center"
            )
        _name(axes, title, "nats per token")
        if smooth_all:
            low, high = np.nanmin([np.nanmin(s) for s in smooth_all]), np.nanmax([np.nanmax(s) for s in smooth_all])
            room = max(0.06 * (high - low), 0.01 * abs(high), 1e-6)
            axes.set_ylim(low - 1.5 * room, high + room)
        _mark(axes, runs)
    _legend(figure, runs, held_out=any(len(run.windows("val_loss")[0]) for run in runs))
    return figure


def progress_chart(runs: Sequence[RunCurves]) -> Figure | None:
    """Steps over the time since a run's first start; what stands still is time lost."""
    # A save in the background is reported later than its step.
    points = [
        sorted(
            [(event["time"], event["step"]) for event in run.events if event["event"] not in ("save", "draw", "evaluate")]
            + [(event["time"], event["to_step"]) for event in run.events if event["event"] == "rollback"]
            + [(row["time"], row["step"]) for row in run.rows if row.get("time")],
            key=lambda point: point[0],
        )
        for run in runs
    ]
    longest = max((p[-1][0] - p[0][0] for p in points if len(p) > 1), default=0.0)
    if longest <= 0:
        return None
    unit, seconds = next((u, s) for u, s in _TIME_UNITS if longest >= 2 * s or s == 1)
    figure, (axes,) = _figure()
    for run, path in zip(runs, points):
        if len(path) < 2:
            continue
        passed = [(moment - path[0][0]) / seconds for moment, _ in path]
        axes.plot(passed, [step for _, step in path], color=run.colour, linewidth=1.6)
        for event in run.events:
            if event["event"] in ("start", "hang", "error", "rollback"):
                _event_point(axes, event, (event["time"] - path[0][0]) / seconds, run)
    _name(axes, "progress", "optimizer step", x=f"{unit} since the first start")
    _legend(figure, runs)
    return figure


def _window_chart(
    key: str, title: str, unit: str, *, scale: float = 1.0, log: bool = False, bottom: float | None = 0.0
) -> Callable[[Sequence[RunCurves]], Figure | None]:
    def draw(runs: Sequence[RunCurves]) -> Figure | None:
        if not any(len(run.windows(key)[0]) for run in runs):
            return None
        figure, (axes,) = _figure()
        for run in runs:
            steps, values = run.windows(key)
            values = values * scale
            dense = len(values) > 200
            axes.plot(steps, values, color=run.colour, alpha=0.25 if dense else 1, linewidth=0.8 if dense else 1.6)
            if dense:
                axes.plot(steps, smoothed(values), color=run.colour, linewidth=1.7)
        _name(axes, title, unit)
        if log and _decades([run.windows(key)[1] for run in runs]) > 1:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif bottom is not None:
            axes.margins(y=0.15)
            axes.set_ylim(bottom=bottom)
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        _mark(axes, runs)
        _legend(figure, runs)
        return figure

    return draw


CHARTS = (
    Chart(
        "loss.png",
        "Loss",
        "Faint: every step; strong: mean over a fiftieth of the run; dots: held-out pairs.",
        loss_chart,
        wide=True,
    ),
    Chart(
        "throughput.png",
        "Throughput",
        "Filled token slots per second and rank, between two console lines.",
        _window_chart("tokens_per_second", "throughput", "tokens / s / rank"),
    ),
    Chart(
        "mfu.png",
        "Model FLOPs utilisation",
        "Share of the device's dense bf16 peak that the model's own work reaches.",
        _window_chart("mfu", "MFU", "% of peak", scale=100),
    ),
    Chart(
        "memory.png",
        "Memory",
        "Most bytes held so far by rank 0: of the GPU, or of the process on a CPU. A slope is a leak.",
        _window_chart("memory", "peak memory", "GiB", scale=2**-30),
    ),
    Chart(
        "grad_norm.png",
        "Gradient norm",
        "Global norm before clipping. It often rises before the loss does.",
        _window_chart("grad_norm", "gradient norm", "norm", log=True),
    ),
    Chart("lr.png", "Learning rate", "As applied.", _window_chart("lr", "learning rate", "per step")),
    Chart(
        "data_wait.png",
        "Waiting for data",
        "Share of the time in which rank 0 waited for its loader; more than a few percent: raise data.workers.",
        _window_chart("data_wait", "data wait", "% of time", scale=100),
    ),
    Chart(
        "progress.png",
        "Progress",
        "Steps over time, across restarts; flat stretches are time lost.",
        progress_chart,
    ),
)


def _figure(*, width: float = 6.4, height: float = 3.4, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130, facecolor="white")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _name(axes: Axes, title: str, unit: str, *, x: str = "optimizer step") -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(x, color=_MUTED)
    axes.set_ylabel(unit, color=_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=8)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)


def _mark(axes: Axes, runs: Sequence[RunCurves]) -> None:
    """Events along a step axis: ticks below for checkpoints, crosses above for steps left out, lines for the rest."""
    below, above = (axes.get_xaxis_transform(),) * 2
    for index, run in enumerate(runs):
        saves = run.steps_of("save")
        height = 0.015 + 0.03 * index  # a row for each run
        axes.plot(saves, [height] * len(saves), "^", color=run.colour, markersize=4, transform=below, clip_on=False)
        left_out = [row["step"] for row in run.rows if row.get("skipped")]
        axes.plot(left_out, [0.97] * len(left_out), "x", color=_SKIPPED, markersize=6, mew=1.6, transform=above)
        for step in run.steps_of("rollback"):
            axes.axvline(step, color=run.colour, linestyle=(0, (4, 2)), linewidth=1.1)
        for step in run.steps_of("start")[1:]:
            axes.axvline(step, color=run.colour, linestyle=(0, (1, 2)), linewidth=1.2, alpha=0.8)


def _event_point(axes: Axes, event: Row, hour: float, run: RunCurves) -> None:
    marker, colour = {
        "start": ("o", run.colour),
        "rollback": ("v", _SKIPPED),
        "hang": ("s", _SKIPPED),
        "error": ("X", _SKIPPED),
    }[event["event"]]
    axes.plot([hour], [event["step"]], marker, color=colour, markersize=5, zorder=3)


def _legend(figure: Figure, runs: Sequence[RunCurves], *, held_out: bool = False) -> None:
    """Runs by colour where there are several, and the marks that occur; held_out: also on the curves."""
    kinds = {event["event"] for run in runs for event in run.events}
    progress = figure.axes[0].get_title(loc="left") == "progress"
    handles = [Line2D([], [], color=run.colour, linewidth=2, label=run.name) for run in runs] if len(runs) > 1 else []

    def mark(label: str, **style: Any) -> None:
        handles.append(Line2D([], [], label=label, **style))

    if progress:
        mark("start", color=_MUTED, marker="o", linestyle="", markersize=5)
        for kind, marker, label in (("rollback", "v", "rollback"), ("hang", "s", "hang"), ("error", "X", "error")):
            if kind in kinds:
                mark(label, color=_SKIPPED, marker=marker, linestyle="", markersize=5)
    else:
        if held_out:
            mark("held out", color=_MUTED, **_HELD_OUT)
        if "save" in kinds:
            mark("checkpoint", color=_MUTED, marker="^", linestyle="", markersize=4)
        if any(row.get("skipped") for run in runs for row in run.rows):
            mark("step left out", color=_SKIPPED, marker="x", linestyle="", markersize=6, markeredgewidth=1.6)
        if "rollback" in kinds:
            mark("rollback", color=_MUTED, linestyle=(0, (4, 2)), linewidth=1.1)
        if any(len(run.steps_of("start")) > 1 for run in runs):
            mark("restart", color=_MUTED, linestyle=(0, (1, 2)), linewidth=1.2)
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=8,
            labelcolor="#374151",
        )


def _decades(columns: Sequence[np.ndarray]) -> float:
    """How many powers of ten the positive values span."""
    values = np.concatenate(columns)
    values = values[values > 0]
    return float(np.log10(values.max() / values.min())) if len(values) else 0.0


def _short(value: float, _position: int) -> str:
    """`12.5k` for 12500, `1.5e-4` for 0.00015."""
    if 0 < abs(value) < 1e-3:
        digits, exponent = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
