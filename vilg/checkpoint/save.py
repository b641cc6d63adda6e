"""Write a checkpoint so that a crash at any byte leaves the previous one usable, and without holding up training.

All files go into a hidden folder and are flushed; the folder is renamed; `LATEST` is replaced last. In the background a
thread of every rank writes what was copied to the host's memory; at step boundaries the ranks ask each other, over the
host's group, whether all are through, and only then is the checkpoint published.

A thread, because the state is in this process: DeepSpeed's `fast` and `decoupled` engines need its compiled AIO library
(they fail on a CPU), and torch's asynchronous saver writes a format of its own, which DeepSpeed does not read back.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

from vilg.checkpoint.folders import DELETED, PARTIAL, REPLACED, flush_folder, hidden, put_back, put_in_place, standing
from vilg.checkpoint.state import STATE_FILE, RunState, is_whole, source_commit, versions
from vilg.checkpoint.tensors import write_failure
from vilg.errors import UserError
from vilg.parallel.ranks import Ranks, SharedError

CHECKPOINTS, LATEST = "checkpoints", "LATEST"

# Name in the checkpoint folder -> what writes and flushes that file at the path given and returns its checksum.
Files = Mapping[str, Callable[[Path], str]]


def step_name(step: int) -> str:
    """Folder name of a checkpoint; sorts by step."""
    return f"step_{step:08d}"


@dataclass(frozen=True)
class Saved:
    """A published checkpoint. seconds: from `begin` until it was published. trouble: why older ones could not be
    deleted, on the main rank; empty if they could."""

    path: Path
    seconds: float
    trouble: str = ""


class Saver:
    """Saves the checkpoints of one run folder, one at a time. All ranks make every call together.

    keep_last: newest checkpoints kept. keep_every: those whose step is a multiple of it are kept as well; 0: none.
    """

    def __init__(self, run_dir: Path, *, ranks: Ranks, keep_last: int, keep_every: int = 0) -> None:
        self.run_dir, self.ranks, self.keep_last, self.keep_every = run_dir, ranks, keep_last, keep_every
        self._job: _Job | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._job is not None

    def begin(self, state: RunState, files: Files) -> None:
        """Start writing this rank's files, which must not change any more. An earlier save is finished first.

        Raises SharedError on all ranks if any of the two fails; the checkpoint before is then untouched.
        """
        self.wait()
        started = time.monotonic()
        final = self.run_dir / CHECKPOINTS / step_name(state.step)
        partial = hidden(final, PARTIAL)
        self._job = job = _Job(deepcopy(state), final, partial, started)  # training goes on counting in it
        try:
            self.ranks.on_main(lambda: _fresh_folder(partial))
        except SharedError as error:
            self._give_up(error)
        job.run(lambda: job.checksums.update({name: write(partial / name) for name, write in files.items()}))

    def poll(self) -> Saved | None:
        """Ask whether the save has come further; the checkpoint once it is published. An exchange of two integers
        between the hosts, nothing if no save is under way. Raises SharedError on all ranks if it failed on any."""
        job = self._job
        if job is None:
            return None
        running, failed = self.ranks.sum(job.running, job.failure is not None)
        if failed:
            job.join()
            try:
                self.ranks.together(job.raise_failure)
            except SharedError as error:
                self._give_up(error)
        if running:
            return None
        if job.publishing:
            self._job = None
            return Saved(job.final, time.monotonic() - job.started, job.trouble)
        checksums = {name: value for rank in self.ranks.gather(job.checksums) for name, value in rank.items()}
        job.publishing = True
        job.run(lambda: self._publish(job, checksums) if self.ranks.is_main else None)
        return None

    def wait(self) -> Saved | None:
        """Finish the save that is under way, if any, as `poll` would."""
        done = None
        while self._job is not None:
            self._job.join()
            done = self.poll()
        return done

    def _publish(self, job: "_Job", checksums: dict[str, str]) -> None:
        _publish(job.partial, job.final, replace(job.state, checksums=checksums))
        try:
            _prune(job.final.parent, job.state.step, self.keep_last, self.keep_every)
        except OSError as error:  # the checkpoint itself is published: no reason to end the run
            job.trouble = f"cannot delete {error.filename or job.final.parent}: {write_failure(error)}"

    def _give_up(self, error: SharedError) -> None:
        """End the save that failed, and say what is left."""
        job, self._job = self._job, None
        if self.ranks.is_main:
            shutil.rmtree(job.partial, ignore_errors=True)
        raise SharedError(
            f"checkpoint {job.final.name} could not be saved: {error}. {_what_is_left(self.run_dir)} "
            "Mend the cause (space, quota, rights), then run the same command again",
            error.exit_code,
        ) from error


@dataclass
class _Job:
    """One save on one rank: first this rank's files, then, on the main rank, the publication; each in a thread."""

    state: RunState
    final: Path
    partial: Path
    started: float
    checksums: dict[str, str] = field(default_factory=dict)
    publishing: bool = False
    failure: BaseException | None = None
    trouble: str = ""
    _thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def run(self, action: Callable[[], None]) -> None:
        """Do it in a thread that does not keep a dying process alive."""
        # An earlier thread has ended: `failure` is written by one thread at a time and read after it.
        self._thread = threading.Thread(target=self._kept, args=(action,), name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def raise_failure(self) -> None:
        """Raise what ended the thread, if anything did."""
        if self.failure is not None:
            raise self.failure

    def _kept(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:  # raised by `raise_failure` on the main thread, whatever it is
            self.failure = error


def leftovers(run_dir: Path) -> list[Path]:
    """Folders that an interrupted save or deletion left behind."""
    return [p for p in (run_dir / CHECKPOINTS).glob(".step_*") if p.name.endswith((PARTIAL, REPLACED, DELETED))]


def sweep(run_dir: Path) -> list[str]:
    """Undo and delete what an interrupted save or deletion left behind; sentences that say so. Raises OSError."""
    notes = [f"put {path.name} back, which a crash left half replaced" for path in aside(run_dir) if put_back(path)]
    left = leftovers(run_dir)
    for path in left:
        shutil.rmtree(path)
    if left:
        notes.append(f"removed what an interrupted save left behind: {', '.join(path.name for path in left)}")
    return notes


def aside(run_dir: Path) -> list[Path]:
    """Checkpoints, by their own names, that a crash left whole under a hidden one while they were replaced."""
    found = []
    for path in (run_dir / CHECKPOINTS).glob(f".step_*{REPLACED}"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(REPLACED))
        if standing(final) == path and is_whole(path):  # an interrupted deletion of an older vilg is neither
            found.append(final)
    return found


def past_checkpoints(folder: Path, name: str) -> list[Path]:
    """Checkpoints in `folder` up to the one of that name, oldest first; later ones are not this run's past."""
    return sorted(p for p in folder.glob("step_*") if p.name <= name)


def kept_for_good(path: Path, keep_every: int) -> bool:
    """Whether a checkpoint stays when newer ones push it out."""
    number = int(path.name.removeprefix("step_"))
    return keep_every > 0 and number > 0 and number % keep_every == 0


def write_latest(run_dir: Path, name: str) -> None:
    """Point LATEST at a checkpoint, atomically."""
    path = run_dir / LATEST
    temporary = path.with_name(f".{LATEST}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(name + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    flush_folder(run_dir)


def _fresh_folder(partial: Path) -> None:
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot create {partial}: {write_failure(error)}") from error


def _publish(partial: Path, final: Path, state: RunState) -> None:
    try:
        # On a shared file system the other ranks' files must be visible here, with their sizes, before they are listed.
        files = {name: (partial / name).stat().st_size for name in sorted(state.checksums)}
        complete = replace(state, files=files, versions=versions(), commit=source_commit())
        with open(partial / STATE_FILE, "w", encoding="utf-8") as stream:
            stream.write(complete.to_json())
            stream.flush()
            os.fsync(stream.fileno())
        flush_folder(partial)
        put_in_place(partial, final)  # a run that went back to an earlier checkpoint comes past this step again
        write_latest(final.parent.parent, final.name)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or partial}: {write_failure(error)}") from error


def _prune(folder: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Delete checkpoints older than the newest `keep_last` of this run's past."""
    for path in past_checkpoints(folder, step_name(step))[:-keep_last]:
        if kept_for_good(path, keep_every):
            continue
        # Renamed first: a deletion that is cut short must not leave a folder that looks like a checkpoint.
        going = hidden(path, DELETED)
        shutil.rmtree(going, ignore_errors=True)
        os.rename(path, going)
        shutil.rmtree(going)


def _what_is_left(run_dir: Path) -> str:
    try:
        return f"The previous one, {(run_dir / LATEST).read_text().strip()}, is intact."
    except OSError:
        return "No checkpoint was written yet."
