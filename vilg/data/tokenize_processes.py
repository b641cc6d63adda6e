"""Several processes of one machine that tokenize, each with its own shards and device; the first mistake ends all."""

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from vilg.data.children import tie_to_parent
from vilg.data.encode import Recipe
from vilg.data.progress import Progress
from vilg.errors import UserError

_LOOK_SECONDS = 0.5  # between looks at the counts


@dataclass(frozen=True)
class Work:
    """What all processes of a job have in common; the fields are those of `tokenize`. threads: of each."""

    raw: Path
    out: Path
    image_model: Path
    recipe: Recipe
    max_bad_fraction: float
    threads: int


class SharedCount:
    """A child's count of images, read by its parent. Called by the child, it says how many there are in all."""

    def __init__(self, context: Any):
        self._numbers = context.Array("q", [-1, 0, 0], lock=False)  # all, done now, done by an earlier start

    def __call__(self, images: int) -> "SharedCount":
        self._numbers[0] = images
        return self

    def numbers(self) -> tuple[int, int, int]:
        """(all, done now, done by an earlier start); all is -1 as long as the child does not know."""
        return tuple(self._numbers)

    def image_done(self) -> None:
        """Count an image."""
        self._numbers[1] += 1

    def skip(self, images: int) -> None:
        """Count images that an earlier start finished."""
        self._numbers[2] += images

    def close(self) -> None:
        """Nothing is left to be done."""


def in_processes(work: Work, devices: Sequence[str], parts: Sequence[tuple[int, int]]) -> None:
    """Let a process for each device make the shards of its part. Raises the first UserError that one met."""
    context = multiprocessing.get_context("spawn")  # not forked: torch may have threads by now
    children: dict[Any, tuple[BaseProcess, Connection]] = {}
    counts = [SharedCount(context) for _ in devices]
    try:
        for device, part, count in zip(devices, parts, counts, strict=True):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(work, device, part, count, theirs), name=f"tokenize {device}")
            child.start()
            theirs.close()
            children[child.sentinel] = (child, ours)
        bar = _Bar(counts)
        while children:
            for sentinel in wait(list(children), timeout=_LOOK_SECONDS):
                _check(*children.pop(sentinel))
            bar.look()
        bar.close()
    finally:
        for child, _ in children.values():
            child.kill()
            child.join()


def _child(work: Work, device: str, part: tuple[int, int], count: SharedCount, mistakes: Connection) -> None:
    tie_to_parent()
    from vilg.data.tokenize import tokenize
    from vilg.tokens.vqgan import ImageTokenizer

    torch.set_num_threads(1)
    try:
        tokenize(
            work.raw, work.out, ImageTokenizer.load(work.image_model, device=device), recipe=work.recipe,
            device=device, threads=work.threads, max_bad_fraction=work.max_bad_fraction, part=part, count=count,
        )  # fmt: skip
    except UserError as error:
        mistakes.send((str(error), error.exit_code))
        raise SystemExit(1) from None


def _check(child: BaseProcess, mistakes: Connection) -> None:
    """Raise for a child that has ended otherwise than well."""
    child.join()
    if child.exitcode == 0:
        return
    try:
        message, exit_code = mistakes.recv()
    except EOFError:
        raise RuntimeError(f"process {child.name!r} ended with exit code {child.exitcode}; see above") from None
    raise UserError(message, exit_code)


class _Bar:
    """One bar for all children, as soon as they know how much there is."""

    def __init__(self, counts: Sequence[SharedCount]):
        self._counts, self._bar, self._shown = counts, None, 0

    def look(self) -> None:
        """Show what has been done since the last look."""
        totals, done, skipped = zip(*(count.numbers() for count in self._counts))
        if self._bar is None and min(totals) >= 0:
            self._bar = Progress("tokenize", sum(totals), enabled=True)
            self._bar.skip(sum(skipped))
        if self._bar is not None:
            self._bar.image_done(sum(done) - self._shown)
            self._shown = sum(done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
