"""Find the checkpoint to continue from, and check that its files are what was written."""

from pathlib import Path
from typing import Any

from vilg.checkpoint.save import CHECKPOINTS, LATEST
from vilg.checkpoint.state import STATE_FILE, RunState
from vilg.checkpoint.tensors import checksum
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


def verify_files(checkpoint: Path, state: RunState, *, rank: int, world_size: int) -> None:
    """Read this rank's share of the files, the ranks' shares together being all, and compare their checksums.

    Done before anybody loads: a damaged file would otherwise end one rank inside DeepSpeed and leave the others waiting
    there. Every byte is read once over the whole job. Raises UserError naming the file.
    """
    largest_first = sorted(state.checksums, key=lambda name: (-state.files[name], name))
    for name in largest_first[rank::world_size]:
        path = checkpoint / name
        try:
            found = checksum(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); use an earlier checkpoint") from None
        if found != state.checksums[name]:
            raise UserError(
                f"{path}: its bytes changed since it was written (CRC-32 {found} instead of {state.checksums[name]}); "
                f"the disk or a copy damaged it. Use an earlier checkpoint: write its name into {LATEST}"
            )


def layout_note(was: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What differs between the layout that wrote a checkpoint and this run's, for people; None if nothing does."""
    differing = [key for key in was if was[key] != now.get(key)]
    if not differing:
        return None
    before, after = (", ".join(f"{key}={values.get(key)}" for key in differing) for values in (was, now))
    return f"the checkpoint was saved with {before}; this run has {after}: weights and moments are distributed anew"
