"""The folder that a run owns: made at the first start, recognised at the next, refused to another recipe.

config.yaml  deepspeed.json  checkpoints/  LATEST  logs/  samples/  DONE (after the last step)
"""

import errno
import fcntl
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from vilg.checkpoint.load import latest_checkpoint
from vilg.checkpoint.save import LATEST, sweep
from vilg.config import Recipe, dump_recipe, load_recipe
from vilg.errors import UserError
from vilg.tokens.files import write_atomically

CONFIG_FILE, DONE_FILE, LOGS, SAMPLES = "config.yaml", "DONE", "logs", "samples"

# Keys that a continued run may change, and what the change means. Every other difference is another run.
CHANGEABLE = {
    "name": "only a label",
    "run_dir": "the folder was moved",
    "logging.*": "only what is shown",
    "samples.*": "only what is drawn",
    "checkpoint.*": "only when checkpoints are saved",
    "guards.*": "only when the run stops itself",
    "data.train": "the folder may move; its manifest's hash must stay the same",
    "data.workers": "batches do not depend on it",
    "data.max_bad_fraction": "only when the run stops itself",
    "tokens.text_model": "the file may move; its hash must stay the same",
    "tokens.image_model": "the folder may move; its hash must stay the same",
    "batch.micro_size": "the same batches in other parts; losses differ by rounding",
    "parallel.*": "the checkpoint must be readable under the new layout",
    "schedule.steps": "the learning rate follows the new length from here on",
    "schedule.min_lr_ratio": "the learning rate follows it from here on",
}
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
                "one its own folder (--run_dir=...)"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise

    def release(self) -> None:
        """Let others in; nothing if it is not held."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def open_run_dir(recipe: Recipe, lock: RunLock) -> tuple[Path | None, list[str]]:
    """Make or recognise the run folder; the checkpoint to continue from (None: start anew) and notes for people.

    Called on one rank, which holds `lock` from then on. Raises UserError if the folder is in use, or belongs to something
    else or to another recipe, naming the keys.
    """
    folder = recipe.run_dir
    _check_place(folder)
    lock.acquire()
    notes = []
    if (folder / CONFIG_FILE).exists():
        notes += compare(load_recipe(folder / CONFIG_FILE, cross_checks=False), recipe, folder)
        if swept := sweep(folder):
            notes.append(f"removed what an interrupted save left behind: {', '.join(swept)}")
    for name in (LOGS, SAMPLES):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return latest_checkpoint(folder), notes


def write_recipe(recipe: Recipe) -> None:
    """Leave the resolved recipe in the folder, which is the run's from then on."""
    write_atomically(recipe.run_dir / CONFIG_FILE, dump_recipe(recipe).encode())


def compare(before: Recipe, now: Recipe, folder: Path) -> list[str]:
    """Notes for changes that a continued run may make. Raises UserError listing all that it may not."""
    old, new = (dict(_leaves(recipe.model_dump(mode="json"))) for recipe in (before, now))
    changed = [(key, old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)]
    notes, refused = [], []
    for key, was, is_now in changed:
        why = next((text for pattern, text in CHANGEABLE.items() if fnmatch(key, pattern)), None)
        if why is None:
            refused.append(f"{key}: {_shown(was)} there, {_shown(is_now)} here")
        else:
            notes.append(f"{key} changed from {_shown(was)} to {_shown(is_now)} ({why})")
    if refused:
        raise UserError(
            f"{folder} belongs to a run of another recipe:\n  " + "\n  ".join(refused) + "\n"
            f"Give this one its own folder (--run_dir=...), or use {folder / CONFIG_FILE}. Nothing was changed"
        )
    return notes


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


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
