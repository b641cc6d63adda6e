"""A bounded cache of small files on a node's own disk, shared by every process of the node without a server.

A file appears whole, by a rename, and is never changed; whoever has it open keeps it when another process deletes it.
So reading needs no lock. Locks only keep two processes from fetching the same file at once, and nobody waits for one
for long: a fetch that hangs must not stop the others, and fetching twice is harmless.

Nothing is synced to the disk: a file that a crash of the node has cut short shows by its size, and is fetched again. On a
disk that others have filled, files are deleted until there is room.
"""

import errno
import fcntl
import os
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from vilg.errors import UserError

Result = TypeVar("Result")

_LOCKS = 256  # lock files; two names on one lock wait for each other, no more
_PATIENCE = 10.0  # seconds to wait for another process that fetches the same file
_POLL = 0.01  # seconds
_FULL = 0.9  # of the limit is left after making room
_LOOKS = 256  # a process counts the folder each time it has added limit / this: many of them overshoot little
_ABANDONED = 3600.0  # seconds after which a temporary file belongs to a process that was killed
_IN_MEMORY = 4 << 20  # bytes of the largest file that is kept in memory where the disk is full; a reader has some 64 open


def disk_is_full(error: BaseException | None) -> bool:
    """Whether the error, or the one that it was made from, is a full disk or quota."""
    found = {getattr(one, "errno", None) for one in (error, getattr(error, "__cause__", None))}
    return bool(found & {errno.ENOSPC, errno.EDQUOT})


def free_space(folder: Path, error: BaseException) -> str:
    """For messages: how much room the disk has, if the error is that it is full."""
    if not disk_is_full(error):
        return ""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return f" ({shutil.disk_usage(existing).free / 2**30:.3g} GiB free)"


class PieceCache:
    """Files of `folder` by name. limit: bytes that they may take together; the longest unused go first."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = Path(folder), limit
        self._added = limit  # so that the first file counts what earlier runs left
        self._said: set[str] = set()

    def __reduce__(self):
        return PieceCache, (self.folder, self.limit)

    def open(self, name: str, size: int, fetch: Callable[[], bytes]) -> int:
        """A descriptor of the file, which the caller closes; `fetch` gives its content, `size` bytes, where the cache has
        it not. Raises UserError where the cache cannot be used."""
        found = self._open(name, size)
        if found is None:
            with self._lock(name, _PATIENCE):
                found = self._open(name, size)
                if found is None:
                    found = self._put_somewhere(name, fetch())
        return found

    def fetch_ahead(self, name: str, size: int, fetch: Callable[[], bytes]) -> None:
        """Make sure that the file is there, unless another process is about it."""
        with self._lock(name, 0) as free:
            if free:
                found = self._open(name, size)
                os.close(self._put(name, fetch()) if found is None else found)

    def with_room(self, size: int, write: Callable[[], Result]) -> Result:
        """What `write` returns, which puts so many bytes on the cache's disk. Where that is full, the longest unused files
        are deleted until there is room, or none is left: then the error of `write` is raised."""
        while True:
            try:
                return write()
            except (OSError, UserError) as error:
                if not disk_is_full(error) or not self._delete(self._files(), max(size, self.limit // _LOOKS)):
                    raise

    def _open(self, name: str, size: int) -> int | None:
        try:
            file = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error
        if (found := os.fstat(file).st_size) != size:
            os.close(file)
            self._say("cut", f"{name} has {found} bytes instead of {size}, perhaps since a crash of the node; fetched again")
            return None
        with suppress(OSError):  # what was used last is deleted last: no more than a hint
            os.utime(file)
        return file

    def _put_somewhere(self, name: str, content: bytes) -> int:
        """A descriptor of the content: in the cache, or in memory if that is little and the disk is full."""
        try:
            return self._put(name, content)
        except UserError as error:
            if not disk_is_full(error) or len(content) > _IN_MEMORY or not hasattr(os, "memfd_create"):  # Linux alone has it
                raise
            self._say("full", f"the disk is full{free_space(self.folder, error)}; every process keeps pieces in its memory")
        file = os.memfd_create(name, os.MFD_CLOEXEC)
        with open(file, "wb", closefd=False) as stream:
            stream.write(content)
        return file

    def _put(self, name: str, content: bytes) -> int:
        try:
            return self.with_room(len(content), lambda: self._write(name, content))
        except OSError as error:
            raise self._unusable(error) from error

    def _write(self, name: str, content: bytes) -> int:
        temporary = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(len(content))
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            with open(file, "wb", closefd=False) as stream:
                stream.write(content)
            os.replace(temporary, self.folder / name)
        except BaseException:
            os.close(file)
            temporary.unlink(missing_ok=True)
            raise
        return file

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.folder}: {error.strerror}{free_space(self.folder, error)}; data.cache_dir wants a folder on the node's "
            "own disk, data.cache_gib no more than there is room"
        )

    def _say(self, kind: str, what: str) -> None:
        """A note, of each kind the first only."""
        if kind not in self._said:
            self._said.add(kind)
            print(f"note: {self.folder}: {what}", file=sys.stderr, flush=True)

    def _make_room(self, size: int) -> None:
        """Delete the longest unused files if those that are there are near the limit."""
        self._added += size
        if self._added * _LOOKS < self.limit:
            return
        self._added, found = 0, self._files()
        self._delete(found, sum(size for _, size, _ in found) + size - int(self.limit * _FULL))

    def _files(self) -> list[tuple[int, int, str]]:
        """(time of last use in ns, size, path) of all files that may be deleted."""
        found, now = [], time.time()
        for entry in os.scandir(self.folder) if self.folder.exists() else ():
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process makes room too
                continue
            if entry.name.startswith(".") and now - status.st_mtime < _ABANDONED:
                continue
            found.append((status.st_mtime_ns, status.st_size, entry.path))
        return sorted(found)

    def _delete(self, files: list[tuple[int, int, str]], excess: int) -> bool:
        """Delete the first of the files until so many bytes are gone; whether there were any."""
        for _, size, path in files:
            if excess <= 0:
                break
            Path(path).unlink(missing_ok=True)
            excess -= size
        return bool(files)

    @contextmanager
    def _lock(self, name: str, patience: float) -> Iterator[bool]:
        """Yields whether the lock was had within `patience` seconds."""
        folder = self.folder.with_name(f"{self.folder.name}.locks")
        lock = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = zlib.crc32(name.encode()) % _LOCKS
            lock = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if not disk_is_full(error):  # then without a lock
                raise self._unusable(error) from error
        try:
            yield lock is not None and _taken(lock, time.monotonic() + patience)
        finally:
            if lock is not None:
                os.close(lock)


def _taken(lock: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(_POLL)
