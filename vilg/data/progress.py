"""How far a job on images is."""

import sys
import time

from tqdm import tqdm

_LINE_SECONDS = 10  # between progress lines where there is no terminal


class Progress:
    """A bar with images/s and ETA on a terminal, a line now and then elsewhere (batch jobs' logs).

    total: images there are, None if nobody knows.
    """

    def __init__(self, job: str, total: int | None, *, enabled: bool):
        self._bar = tqdm(total=total, unit="img", desc=job, disable=not (enabled and sys.stderr.isatty()))
        self._lines = enabled and not sys.stderr.isatty()
        self._job, self._total, self._done, self._skipped = job, total, 0, 0
        self._begin = self._last_line = time.monotonic()

    def image_done(self, images: int = 1) -> None:
        """Count images; a line is written when one is due."""
        self._done += images
        self._bar.update(images)
        now = time.monotonic()
        if self._lines and now - self._last_line > _LINE_SECONDS:
            self._last_line = now
            print(self.line(now - self._begin), file=sys.stderr, flush=True)

    def skip(self, images: int) -> None:
        """Images that an earlier start finished: they count as done, but not for the rate."""
        self._skipped += images
        if self._bar.total is not None:
            self._bar.total -= images
        self._bar.refresh()

    def line(self, seconds: float) -> str:
        """`tokenize: 1200/5000 images  31 images/s  eta 2m02s` after so many seconds of work."""
        rate = self._done / seconds
        done = self._skipped + self._done
        if self._total is None or done > self._total:
            return f"{self._job}: {done} images  {rate:.0f} images/s"
        left = round((self._total - done) / rate) if rate else 0
        return f"{self._job}: {done}/{self._total} images  {rate:.0f} images/s  eta {left // 60}m{left % 60:02d}s"

    def close(self) -> None:
        self._bar.close()
