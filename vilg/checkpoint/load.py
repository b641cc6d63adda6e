"""Find the checkpoint to continue from, and say how its layout differs."""

from pathlib import Path
from typing import Any

from vilg.checkpoint.folders import standing
from vilg.checkpoint.save import CHECKPOINTS, LATEST, aside
from vilg.checkpoint.state import STATE_FILE, RunState
from vilg.errors import UserError


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that LATEST names; the newest one if LATEST is missing; None if there is none.

    One that a crash left aside while it was replaced is found there. Raises UserError if LATEST is empty or names a
    checkpoint that is not there.
    """
    try:
        name = (run_dir / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        present = all_checkpoints(run_dir)  # a crash between the first rename and LATEST
        return present[-1] if present else None
    path = standing(run_dir / CHECKPOINTS / name)
    if not name or not path.is_dir():
        present = ", ".join(p.name for p in all_checkpoints(run_dir)) or "none"
        fault = f"names {name!r}, which is not there" if name else "is empty"
        raise UserError(f"{run_dir / LATEST} {fault} (present: {present}); write one of these into it")
    return path


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, also one that a crash left aside."""
    named = {p.name: p for p in (run_dir / CHECKPOINTS).glob("step_*") if p.is_dir()}
    left_aside = {p.name: standing(p) for p in aside(run_dir)}
    return [path for _, path in sorted({**named, **left_aside}.items())]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by a run folder (its latest) or a checkpoint folder. Raises UserError."""
    if (path / STATE_FILE).is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run or one of its checkpoints/step_*")
    found = latest_checkpoint(path)
    if found is None:
        raise UserError(f"{path}: neither a run with a checkpoint nor a checkpoint (no {LATEST}, no {STATE_FILE})")
    return found


def layout_note(state: RunState, layout: dict[str, Any], parameters: dict[str, dict[str, Any]]) -> str | None:
    """What differs between the layout that wrote a checkpoint and this run's, for people; None if nothing does.

    layout, parameters: this run's, as `RunState` has them.
    """
    differing = [key for key in state.layout if state.layout[key] != layout.get(key)]
    before, after = (", ".join(f"{key}={values.get(key)}" for key in differing) for values in (state.layout, layout))
    if not differing:
        # The same sizes, but another vilg cut the layers into stages elsewhere.
        moved = [name for name, entry in state.parameters.items() if entry["stage"] != parameters[name]["stage"]]
        if not moved:
            return None
        before, after = (f"{moved[0]} in stage {table[moved[0]]['stage']}" for table in (state.parameters, parameters))
    return f"the checkpoint was saved with {before}; this run has {after}: weights and moments are distributed anew"
