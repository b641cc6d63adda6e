"""All processes of a run seen from the host: small agreements that must not touch the accelerator's stream.

Tensors of the model go through the groups of `grid.py`; this is for counts, flags and errors of the control flow.
"""

import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from vilg.errors import UserError, exit_code_of
from vilg.parallel.ops import Group

T = TypeVar("T")


class SharedError(UserError):
    """A UserError that every rank raises with the same message, so that one of them may print it for all."""


@dataclass(frozen=True)
class Ranks:
    """Place of this process among all. group: a gloo group of all processes, None where there is only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: Group = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: int) -> list[int]:
        """Sums of the integers over all ranks."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        found: list = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.sum(0)

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and give its value to all; a UserError or OSError there is everyone's SharedError."""
        outcome: list = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except (UserError, OSError) as error:
                outcome[1] = str(error), exit_code_of(error)
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise SharedError(*outcome[1])
        return outcome[0]

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it raises anywhere, all raise SharedError with the first such rank's reason.

        The action must not hold collectives that a failing rank would leave others waiting in.
        """
        value, reason = None, None
        try:
            value = action()
        except Exception as error:  # whatever it is, the other ranks must learn of it; it is chained here
            if not isinstance(error, (OSError, UserError)):
                if self.world_size == 1:
                    raise
                with suppress(OSError):  # a full console must not keep this rank from the others
                    traceback.print_exc()  # no user's doing: where it happened is worth more than what it says
            reason, cause = (str(error) or type(error).__name__, exit_code_of(error)), error
        failed = [(rank, why) for rank, why in enumerate(self.gather(reason)) if why is not None]
        if failed:
            rank, (why, code) = failed[0]
            message = why if self.world_size == 1 else f"rank {rank}: {why}"
            raise SharedError(message, code) from (cause if reason else None)
        return value
