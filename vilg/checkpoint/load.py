"""Find the checkpoint to continue from, and check that this run can."""

from pathlib import Path
from typing import Any

from vilg.checkpoint.save import CHECKPOINTS, LATEST
from vilg.checkpoint.state import STATE_FILE, RunState
from vilg.errors import UserError


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that LATEST names; the newest one if LATEST is missing; None if there is none.

    Raises UserError if LATEST names a checkpoint that is not there.
    """
    try:
        name = (run_dir / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        present = all_checkpoints(run_dir)  # a crash between the first rename and LATEST
        return present[-1] if present else None
    path = run_dir / CHECKPOINTS / name
    if not path.is_dir():
        present = ", ".join(p.name for p in all_checkpoints(run_dir)) or "none"
        raise UserError(
            f"{run_dir / LATEST} names {name!r}, which is not there (present: {present}); write one of these into it"
        )
    return path


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted(p for p in (run_dir / CHECKPOINTS).glob("step_*") if p.is_dir())


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


def check_layout(state: RunState, checkpoint: Path, layout: dict[str, Any]) -> None:
    """Raise UserError, naming the sizes that differ, unless a run of this layout can read the checkpoint's files."""
    differing = [key for key in state.layout if state.layout[key] != layout.get(key)]
    if differing:
        was, now = (", ".join(f"{key}={values.get(key)}" for key in differing) for values in (state.layout, layout))
        raise UserError(
            f"{checkpoint} was saved with {was}; this run has {now}. Continue it with the layout it was saved with "
            f"({_layout_text(state.layout)})"
        )


def _layout_text(layout: dict[str, Any]) -> str:
    processes = layout["data"] * layout["tensor"] * layout["pipeline"]
    return f"{processes} process{'es' if processes > 1 else ''}, " + ", ".join(f"{k}={v}" for k, v in layout.items())
