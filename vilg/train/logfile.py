"""Files and consoles that a run talks to. None of them may end it: what fails is said, kept where it can be, and tried
again."""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from typing import TextIO

KEPT_LINES = 20_000  # of a file that cannot be written, some 5 MB


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print and flush, on stderr unless another console is given; one that is gone or on a full disk is passed over."""
    with contextlib.suppress(OSError):
        print(text, file=stream or sys.stderr, flush=True)


class Trouble:
    """Something that fails for a while: said when it begins and when it is over, not each time in between."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn, self.lasts = warn, False

    def begin(self, text: str) -> None:
        """It failed; text: what, and what that means."""
        if not self.lasts:
            self.lasts = True
            self.warn(text)

    def end(self, text: str) -> None:
        """It worked; text is said if it had failed before."""
        if self.lasts:
            self.lasts = False
            self.warn(text)


class LogFile:
    """Lines appended to a file. Those that cannot be written are kept, the last KEPT_LINES of them, for the next write.

    Opened for each write: a handle that went stale, as on NFS, would stay so. warn: where it says that it fails, which is
    not itself. Threads may share it. Raises OSError if the file cannot be opened at first.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        open(path, "ab").close()
        self.path = path
        self._kept: deque[str] = deque()
        self._lost = 0
        self._lock = threading.Lock()
        self._trouble = Trouble(warn)

    def write(self, lines: Iterable[str]) -> None:
        """Append the lines, each with its line break, behind those that were kept. Raises nothing."""
        with self._lock:
            self._kept += lines
            if not self._kept:
                return
            try:
                _append(self.path, "".join(self._kept).encode(errors="backslashreplace"))
            except OSError as error:
                while len(self._kept) > KEPT_LINES:
                    self._kept.popleft()
                    self._lost += 1
                self._trouble.begin(f"{self.path} cannot be written: {error.strerror}; its lines are kept for later")
            else:
                self._kept.clear()
                lost = f", without {self._lost} lines" if self._lost else ""
                self._lost = 0
                self._trouble.end(f"{self.path} is written again{lost}")

    def forget(self, unwanted: Callable[[str], bool]) -> None:
        """Drop such lines of those that are kept."""
        with self._lock:
            self._kept = deque(line for line in self._kept if not unwanted(line))

    def close(self) -> None:
        """Try the lines that were kept for the last time, and say how many are lost."""
        self.write(())
        lost = self._lost + len(self._kept)
        if lost:
            self._trouble.warn(f"{self.path}: {lost} lines could not be written")


def _append(path: Path, content: bytes) -> None:
    """All or nothing, as far as the file system lets us. Raises OSError."""
    with FileIO(path, "ab") as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[stream.write(content) :]
        except OSError:
            with contextlib.suppress(OSError):
                stream.truncate(before)  # readers of the file take whole lines
            raise
