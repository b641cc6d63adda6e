"""Write a checkpoint so that a crash at any byte leaves the previous one usable.

All files go into a hidden folder and are flushed; the folder is renamed; `LATEST` is replaced last.
"""

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vilg.checkpoint.state import STATE_FILE, RunState, source_commit, versions
from vilg.checkpoint.tensors import write_failure
from vilg.errors import UserError
from vilg.parallel.ranks import Ranks, SharedError

CHECKPOINTS, LATEST = "checkpoints", "LATEST"
_PARTIAL, _REPLACED = ".partial", ".replaced"


def step_name(step: int) -> str:
    """Folder name of a checkpoint; sorts by step."""
    return f"step_{step:08d}"


def save_checkpoint(
    run_dir: Path, state: RunState, writes: Sequence[Callable[[Path], None]], *, ranks: Ranks, keep_last: int
) -> Path:
    """Make `run_dir/checkpoints/step_XXXXXXXX` the latest checkpoint; all ranks call it, all return its path.

    writes: called in turn on every rank with the hidden folder (same file system as the final one); each puts its files
    there and flushes them, and all ranks agree that one went well before the next begins. Older checkpoints beyond the newest `keep_last` are deleted afterwards.
    Raises SharedError on all ranks if any could not write; the previous checkpoint is then untouched.
    """
    folder = run_dir / CHECKPOINTS
    final = folder / step_name(state.step)
    partial = folder / f".{final.name}{_PARTIAL}"
    try:
        ranks.on_main(lambda: _fresh_folder(partial))
        for write in writes:
            ranks.together(lambda: write(partial))
        ranks.on_main(lambda: _publish(partial, final, state))
    except SharedError as error:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise SharedError(
            f"checkpoint {final.name} could not be saved: {error}. {_what_is_left(run_dir)} "
            "Mend the cause (space, quota, rights), then run the same command again"
        ) from error
    ranks.on_main(lambda: _prune(folder, state.step, keep_last))
    return final


def sweep(run_dir: Path) -> list[str]:
    """Delete what an interrupted save or deletion left behind; the names of the folders removed."""
    leftovers = [p for p in (run_dir / CHECKPOINTS).glob(".step_*") if p.name.endswith((_PARTIAL, _REPLACED))]
    for path in leftovers:
        shutil.rmtree(path)
    return [path.name for path in leftovers]


def write_latest(run_dir: Path, name: str) -> None:
    """Point LATEST at a checkpoint, atomically."""
    path = run_dir / LATEST
    temporary = path.with_name(f".{LATEST}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(name + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    _flush_folder(run_dir)


def _fresh_folder(partial: Path) -> None:
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot create {partial}: {write_failure(error)}") from error


def _publish(partial: Path, final: Path, state: RunState) -> None:
    try:
        # On a shared file system the other ranks' files must be visible here, with their sizes, before they are listed.
        files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        complete = replace(state, files=files, versions=versions(), commit=source_commit())
        with open(partial / STATE_FILE, "w", encoding="utf-8") as stream:
            stream.write(complete.to_json())
            stream.flush()
            os.fsync(stream.fileno())
        _flush_folder(partial)
        replaced = final.with_name(f".{final.name}{_REPLACED}")
        if final.exists():  # a run that went back to an earlier checkpoint comes past this step again
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        os.rename(partial, final)
        _flush_folder(final.parent)
        write_latest(final.parent.parent, final.name)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or partial}: {write_failure(error)}") from error


def _prune(folder: Path, step: int, keep_last: int) -> None:
    """Delete checkpoints older than the newest `keep_last` of this run's past; later ones are not this run's past."""
    past = sorted(p for p in folder.glob("step_*") if p.name <= step_name(step))
    for path in past[:-keep_last]:
        # Renamed first: a deletion that is cut short must not leave a folder that looks like a checkpoint.
        hidden = path.with_name(f".{path.name}{_REPLACED}")
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def _what_is_left(run_dir: Path) -> str:
    try:
        return f"The previous one, {(run_dir / LATEST).read_text().strip()}, is intact."
    except OSError:
        return "No checkpoint was written yet."


def _flush_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems do not flush folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
