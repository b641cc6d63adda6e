"""The folder that a run owns: made at the first start, recognised at the next, refused to another recipe.

config.yaml  deepspeed.json  checkpoints/  LATEST  logs/  samples/  DONE (after the last step)
"""

import errno
import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from vilg.checkpoint.load import latest_checkpoint
from vilg.checkpoint.save import LATEST, sweep
from vilg.checkpoint.state import read_state
from vilg.config import Recipe, dump_recipe, load_recipe
from vilg.errors import TRY_AGAIN, UserError
from vilg.tokens.files import write_atomically
from vilg.train.changes import compare

CONFIG_FILE, DONE_FILE, LOGS, SAMPLES = "config.yaml", "DONE", "logs", "samples"

_FOREIGN_ALLOWED = {LOGS, SAMPLES}  # a batch script may have opened its log here before the run starts


class RunLock:
    """Keeps a second `vilg train` out of a run folder; the system frees it when this process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._stream: IO[bytes] | None = None

    def acquire(self) -> None:
        """Raises UserError if another process holds it. File systems that cannot lock are taken as they are."""
        self._stream = open(self.path, "ab")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run_dir={self.path.parent} is in use by a run that is still going; wait for it, stop it, or give this "
                "one its own folder (--run_dir=...)",
                TRY_AGAIN,
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise

    def release(self) -> None:
        """Let others in; nothing if it is not held."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def open_run_dir(recipe: Recipe, lock: RunLock, accept: Sequence[str] = ()) -> tuple[Path | None, list[str]]:
    """Make or recognise the run folder; the checkpoint to continue from (None: start anew) and notes for people.

    Called on one rank, which holds `lock` from then on. accept: keys that may differ from the checkpoint's recipe.
    Raises UserError if the folder is in use, or belongs to something else or to another recipe, naming the keys.
    """
    folder = recipe.run_dir
    _check_place(folder)
    lock.acquire()
    _, notes = _recognise(recipe, accept)  # before the folder is changed
    notes += sweep(folder)
    for name in (LOGS, SAMPLES):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return latest_checkpoint(folder), notes


def check_run_dir(recipe: Recipe, accept: Sequence[str] = ()) -> list[str]:
    """Make or recognise the run folder without taking it, as before a job is submitted; notes for people.

    Raises UserError as `open_run_dir`, but lets a run that is still going have its folder.
    """
    _check_place(recipe.run_dir)
    return _recognise(recipe, accept)[1]


def _recognise(recipe: Recipe, accept: Sequence[str]) -> tuple[Path | None, list[str]]:
    folder = recipe.run_dir
    checkpoint = latest_checkpoint(folder)
    if checkpoint:
        return checkpoint, compare(_recipe_of(checkpoint), recipe, checkpoint, accept)
    if (folder / CONFIG_FILE).exists():  # stopped before its first checkpoint was whole
        return None, compare(load_recipe(folder / CONFIG_FILE, cross_checks=False), recipe, folder, accept)
    return None, []


def _recipe_of(checkpoint: Path) -> Recipe:
    try:
        return Recipe.model_validate_json(json.dumps(read_state(checkpoint).recipe), strict=True)
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise UserError(
            f"{checkpoint}: its recipe has keys that this vilg does not know, or lacks some ({keys}); continue it with "
            "the vilg that wrote it (vilg inspect shows the commit)"
        ) from None


def write_recipe(recipe: Recipe) -> None:
    """Leave the resolved recipe in the folder, which is the run's from then on."""
    write_atomically(recipe.run_dir / CONFIG_FILE, dump_recipe(recipe).encode())


def _check_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir={folder} is a file; name a folder")
    if folder.is_dir() and not (folder / CONFIG_FILE).exists():
        # Dot files are nobody's run: remains of an atomic write, or of the file system.
        foreign = sorted(
            p.name for p in folder.iterdir() if p.name not in _FOREIGN_ALLOWED and not p.name.startswith(".")
        )
        if foreign:
            raise UserError(
                f"run_dir={folder} holds {', '.join(foreign[:5])} but no {CONFIG_FILE}, so it is no run "
                "of this program; name an empty or new folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{LATEST}.probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be written to: {error.strerror}") from None

