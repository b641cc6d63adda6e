"""A bounded cache of small files on a node's own disk, shared by every process of the node without a server.

A file appears whole, by a rename, and is never changed; whoever has it open keeps it when another process deletes it.
So reading needs no lock. Locks only keep two processes from fetching the same file at once, and nobody waits for one
for long: a fetch that hangs must not stop the others, and fetching twice is harmless.
"""

import fcntl
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vilg.errors import UserError

_LOCKS = 256  # lock files; two names on one lock wait for each other, no more
_PATIENCE = 10.0  # seconds to wait for another process that fetches the same file
_POLL = 0.01  # seconds
_FULL = 0.9  # of the limit is left after making room
_LOOKS = 256  # a process counts the folder each time it has added limit / this: many of them overshoot little
_ABANDONED = 3600.0  # seconds after which a temporary file belongs to a process that was killed


class PieceCache:
    """Files of `folder` by name. limit: bytes that they may take together; the longest unused go first."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = Path(folder), limit
        self._added = limit  # so that the first file counts what earlier runs left

    def __reduce__(self):
        return PieceCache, (self.folder, self.limit)

    def open(self, name: str, fetch: Callable[[], bytes]) -> int:
        """A descriptor of the file, which the caller closes; `fetch` gives its content where the cache has it not."""
        found = self._open(name)
        if found is None:
            with self._lock(name, _PATIENCE):
                found = self._open(name)
                if found is None:
                    found = self._put(name, fetch())
        return found

    def fetch_ahead(self, name: str, fetch: Callable[[], bytes]) -> None:
        """Make sure that the file is there, unless another process is about it."""
        with self._lock(name, 0) as free:
            if free and not (self.folder / name).exists():
                os.close(self._put(name, fetch()))

    def _open(self, name: str) -> int | None:
        try:
            file = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error
        os.utime(file)  # what was used last is deleted last
        return file

    def _put(self, name: str, content: bytes) -> int:
        temporary = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        try:
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
        except OSError as error:
            raise self._unusable(error) from error
        return file

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.folder}: {error.strerror}; data.cache_dir wants a folder on the node's own disk, data.cache_gib no "
            "more than there is room"
        )

    def _make_room(self, size: int) -> None:
        """Delete the longest unused files if those that are there are near the limit."""
        self._added += size
        if self._added * _LOOKS < self.limit:
            return
        self._added, found, now = 0, [], time.time()
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process makes room too
                continue
            if entry.name.startswith(".") and now - status.st_mtime < _ABANDONED:
                continue
            found.append((status.st_mtime_ns, status.st_size, entry.path))
        excess = sum(size for _, size, _ in found) + size - int(self.limit * _FULL)
        for _, size, path in sorted(found):
            if excess <= 0:
                return
            Path(path).unlink(missing_ok=True)
            excess -= size

    @contextmanager
    def _lock(self, name: str, patience: float) -> Iterator[bool]:
        """Yields whether the lock was had within `patience` seconds."""
        folder = self.folder.with_name(f"{self.folder.name}.locks")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=True)
            number = zlib.crc32(name.encode()) % _LOCKS
            lock = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            yield _taken(lock, time.monotonic() + patience)
        finally:
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
