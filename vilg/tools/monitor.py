"""`vilg monitor RUN [RUN ...] --out DIR`: a run's logs as charts and one page that can be mailed."""

import argparse
import base64
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vilg.config import load_recipe
from vilg.errors import UserError
from vilg.pictures.plots import read_metrics
from vilg.pictures.run_charts import COLOURS, RunCurves, draw_charts
from vilg.tokens.files import write_atomically
from vilg.train.events import read_events
from vilg.train.heartbeat import read_heartbeat
from vilg.train.log import METRICS_FILE, duration
from vilg.train.rundir import CONFIG_FILE, LOGS

PAGE = "index.html"
_ROUTINE = ("save", "evaluate", "draw")
_BAD = ("nonfinite", "spike", "rollback", "straggler", "fault", "hang", "error")
_SHOWN_EVENTS = 200
_SILENT_AFTER = 10.0  # heartbeats or steps, whichever is longer


@dataclass(frozen=True)
class RunLogs:
    """What a run folder's logs say. heartbeat: None without one; steps: of the whole run."""

    folder: Path
    name: str
    steps: int
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    heartbeat: dict[str, Any] | None


def main(argv: Sequence[str]) -> int:
    """Write the page. Raises UserError for a folder without a run, or without a step yet."""
    parser = argparse.ArgumentParser(
        prog="vilg monitor",
        description="Draw the logs of one or several runs: loss, speed, memory, gradient norm, learning rate, events.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; it may still be training")
    parser.add_argument("--out", type=Path, required=True, help="folder for index.html and the charts as PNG")
    options = parser.parse_args(argv)
    page = write_page([read_run(folder) for folder in options.runs], options.out, now=time.time())
    print(f"wrote {page}")
    return 0


def read_run(folder: Path) -> RunLogs:
    """The logs of a run folder. Raises UserError naming what is missing."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: no {CONFIG_FILE} there, so it is no run folder; name the recipe's run_dir")
    recipe = load_recipe(folder / CONFIG_FILE, cross_checks=False)
    logs = folder / LOGS
    return RunLogs(
        folder=folder,
        name=recipe.name,
        steps=recipe.schedule.steps,
        rows=read_metrics(logs / METRICS_FILE),
        events=read_events(logs),
        heartbeat=read_heartbeat(logs),
    )


def write_page(runs: Sequence[RunLogs], out: Path, *, now: float) -> Path:
    """Charts and page into `out`; the page. now: seconds since 1970. Raises UserError if it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make the folder: {error.strerror}") from None
    names = _labels(runs)
    curves = [
        RunCurves(name, COLOURS[i % len(COLOURS)], run.rows, run.events)
        for i, (name, run) in enumerate(zip(names, runs))
    ]
    charts = [
        dict(
            title=chart.title,
            caption=chart.caption,
            wide=chart.wide,
            # In the page itself, so that it is whole wherever it is sent.
            data=base64.b64encode((out / chart.file).read_bytes()).decode(),
        )
        for chart in draw_charts(curves, out)
    ]
    events = [event | {"run": curve.name, "colour": curve.colour} for curve in curves for event in curve.events]
    events = sorted(events, key=lambda event: event["time"])[::-1]  # of one moment the last one first
    notable = [_event(event) for event in events if event["event"] not in _ROUTINE]
    environment = Environment(
        loader=PackageLoader("vilg.pictures", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template("monitor.html").render(
        title=", ".join(dict.fromkeys(names)),
        written=_clock(now),
        runs=[summary(run, now=now) | {"label": c.name, "colour": c.colour} for run, c in zip(runs, curves)],
        charts=charts,
        events=notable[:_SHOWN_EVENTS],
        hidden=len(notable) - len(notable[:_SHOWN_EVENTS]),
        several=len(runs) > 1,
    )
    write_atomically(out / PAGE, html.encode())
    return out / PAGE


def summary(run: RunLogs, *, now: float) -> dict[str, Any]:
    """What a run's card on the page shows: state, progress, last figures, counts of events."""
    last = run.rows[-1]
    window = next((row for row in reversed(run.rows) if row.get("tokens_per_second") is not None), {})
    held_out = next((row for row in reversed(run.rows) if row.get("val_loss") is not None), None)
    counts = Counter(event["event"] for event in run.events)
    save = next((event for event in reversed(run.events) if event["event"] == "save"), None)
    state, tone = _state(run, window, now=now)
    trains = tone == "good" and last["step"] < run.steps
    figures = [
        ("loss", "not finite" if last["loss"] is None else f"{last['loss']:.3f}", "nats"),
        ("held out", f"{held_out['val_loss']:.3f}", f"nats at step {held_out['step']:,}") if held_out else None,
        ("throughput", f"{window['tokens_per_second']:,.0f}", "tok/s/rank") if window else None,
        ("MFU", f"{window['mfu']:.0%}", "of peak") if window.get("mfu") is not None else None,
        ("memory", f"{window['memory'] / 2**30:.1f}", "GiB") if window else None,
        ("step", f"{window['seconds_per_step']:.2f}", "s") if window else None,
        ("left", duration(window["eta_seconds"]), "") if trains and window else None,
        ("last checkpoint", f"{save['step']:,}", f"{duration(max(0, now - save['time']))} ago") if save else None,
    ]
    troubles = [
        f"{counts[kind]} {words}" + ("s" if counts[kind] > 1 and kind != "nonfinite" else "")
        for kind, words in (
            ("nonfinite", "non-finite"),
            ("spike", "spike"),
            ("rollback", "rollback"),
            ("hang", "hang"),
            ("error", "error"),
        )
        if counts[kind]
    ]
    return dict(
        name=run.name,
        folder=str(run.folder),
        state=state,
        tone=tone,
        step=last["step"],
        steps=run.steps,
        percent=round(100 * last["step"] / run.steps, 1),
        figures=[dict(name=name, value=value, unit=unit) for name, value, unit in filter(None, figures)],
        starts=max(1, counts["start"]),
        saves=counts["save"],
        troubles=troubles,
    )


def _state(run: RunLogs, window: dict[str, Any], *, now: float) -> tuple[str, str]:
    """Words for where the run stands, and their tone: good, still or bad."""
    beat = run.heartbeat
    if beat is None:
        return "no heartbeat", "still"
    state = beat["state"]
    if state in ("finished", "stopped"):
        return state, "still"
    if state == "failed" or (run.events and run.events[-1]["event"] == "hang"):
        return "hung" if run.events and run.events[-1]["event"] == "hang" else state, "bad"
    age = now - beat["time"]
    steps = [row["seconds_per_step"] for row in run.rows[-100:] if row.get("seconds_per_step")]
    if age > _SILENT_AFTER * max(60.0, statistics.median(steps) if steps else 0.0):
        return f"no sign of life for {duration(age)}", "bad"
    return state, "good"


def _labels(runs: Sequence[RunLogs]) -> list[str]:
    """Names of the runs; with their folders where two have the same."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else f"{run.name} ({run.folder.name})" for run in runs]


def _event(event: dict[str, Any]) -> dict[str, Any]:
    kind = event["event"]
    tone = "bad" if kind in _BAD else "good" if kind in ("start", "finish") else "still"
    shown = {key: event[key] for key in ("run", "colour", "step")}
    return dict(**shown, time=_clock(event["time"]), kind=kind, tone=tone, text=event.get("text", ""))


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
