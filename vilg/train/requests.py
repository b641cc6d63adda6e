"""What people ask of a running run by a file in its folder: `touch RUN/STOP`, `touch RUN/SAVE`.

STOP: finish the step, save and end. It stays, and no start continues the run until somebody removes it, so that a
requeued or chained job does not undo the wish. SAVE: save after this step; it is removed when the checkpoint is whole.
"""

from collections.abc import Callable
from pathlib import Path

from vilg.errors import UserError
from vilg.train.logfile import Trouble

STOP_FILE, SAVE_FILE = "STOP", "SAVE"


def refuse_stopped(run_dir: Path) -> None:
    """Raises UserError if the folder holds a STOP file."""
    if (run_dir / STOP_FILE).exists():
        raise UserError(
            f"{run_dir / STOP_FILE} is there: somebody asked this run to stop. Remove it to continue the run"
        )


class Requests:
    """Looked at before each step, on one rank; the loop's exchange tells the others.

    warn: told when a file cannot be looked at or removed; until it can be, nothing is asked.
    """

    def __init__(self, run_dir: Path, *, is_main: bool, warn: Callable[[str], None]) -> None:
        self.stop_path, self.save_path, self.is_main = run_dir / STOP_FILE, run_dir / SAVE_FILE, is_main
        self._taken = False
        self._troubles = {path: Trouble(warn) for path in (self.stop_path, self.save_path)}

    def stop(self) -> bool:
        """Whether the run is asked to end."""
        return self.is_main and self._is_there(self.stop_path)

    def save(self) -> bool:
        """Whether a checkpoint is asked for; true once until `saved`."""
        if not self.is_main or self._taken or not self._is_there(self.save_path):
            return False
        self._taken = True
        return True

    def saved(self) -> None:
        """A checkpoint is whole: the request, if it was taken, is done with."""
        if self._taken:
            try:
                self.save_path.unlink(missing_ok=True)
            except OSError as error:  # it stays taken until a later checkpoint can remove it
                self._troubles[self.save_path].begin(f"{self.save_path} was answered but stays: {error.strerror}")
            else:
                self._taken = False

    def _is_there(self, path: Path) -> bool:
        trouble = self._troubles[path]
        try:
            found = path.exists()
        except OSError as error:
            trouble.begin(f"{path} cannot be looked at, so nothing is asked by it: {error.strerror}")
            return False
        trouble.end(f"{path} can be looked at again")
        return found
