"""What cross rules are made of: problems with their keys, what is known beside the recipe, and words for values."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


class NotGiven(Exception):
    """A rule read a field that is missing or wrong; that is reported elsewhere, and the rule has nothing to say."""


@dataclass(frozen=True)
class Problem:
    """A broken rule; `key` is the dotted key whose position the error shows."""

    key: str
    message: str


@dataclass(frozen=True)
class Surroundings:
    """What rules know beside the recipe; None where nothing is known yet.

    node_ranks: ranks that share a second copy of the weights (`deepspeed.secondary_partition`). neighbourly: settings of
    the DeepSpeed file, as `key=value`, for which DeepSpeed makes groups of neighbouring ranks, whatever these hold.
    """

    world_size: int | None = None
    zero_stage: int | None = None
    node_ranks: int | None = None
    neighbourly: tuple[str, ...] = ()


Rule = Callable[[Any, Surroundings], Iterator[Problem]]


def rounded_up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step


def divisors(number: int, near: int, count: int = 4) -> str:
    """The few divisors of `number` closest to `near`, as "1, 2 or 4"."""
    found = [d for d in range(1, number + 1) if number % d == 0]
    closest = sorted(sorted(found, key=lambda d: (abs(d - near), d))[:count])
    *first, last = map(str, closest)
    return f"{', '.join(first)} or {last}" if first else last
