"""What every form of checkpoint files offers: whole parameters and tensor ranks' parts, joined by parallel/layout.py."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from vilg.checkpoint.state import RunState
from vilg.errors import UserError
from vilg.parallel import layout
from vilg.parallel.precision import DTYPES

# master: fp32 weights that the optimizer updates. weight: those the run computes with, in its precision.
# exp_avg, exp_avg_sq: Adam's moments, fp32 (zero before the first optimizer step).
Kind = Literal["master", "weight", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
# Called with the folder, its state and a file's name, once or more, before tensors are taken from that file.
OnOpen = Callable[[Path, RunState, str], None]
_JOINED = 1 << 19  # numbers joined at once: they stay in a core's cache


class Weights(ABC):
    """The tensors of one checkpoint, under the names of `Vilg`, whatever the layout of its files."""

    def __init__(self, folder: Path, state: RunState, on_open: OnOpen | None = None) -> None:
        self.folder, self.state = folder, state
        self._on_open = on_open or (lambda folder, state, name: None)
        self.dtype = DTYPES[state.layout["precision"]]
        self.has_masters = self.dtype != torch.float32

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters, in natural order; the same for every layout."""
        return tuple(sorted(self.state.parameters, key=_natural))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(self.state.parameters[name]["shape"])

    def sizes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every parameter."""
        return ((name, self.shape(name)) for name in self.names)

    def read(self, name: str, *, kind: Kind) -> Tensor:
        """The whole parameter, or its moment; may be a view of the mapped file, so do not write into it."""
        return self.part(name, kind=kind, rank=0, size=1)

    def pieces(self, name: str, *, kind: Kind) -> Iterator[Tensor]:
        """The numbers of the whole parameter in order, flat, some at a time, joined only where the files cut across."""
        dim = layout.rule_of(name).dim
        if self.tensor_size == 1 or dim is None:
            yield from self._fragments(name, kind, 0)
        elif dim == 0:
            for rank in range(self.tensor_size):
                yield from self._fragments(name, kind, rank)
        else:
            parts = [self._checked(name, kind, rank) for rank in range(self.tensor_size)]
            rows = max(1, _JOINED // math.prod(self.shape(name)[1:]))
            for block in zip(*(part.split(rows) for part in parts), strict=True):
                yield torch.cat(block, dim).reshape(-1)

    def _fragments(self, name: str, kind: Kind, rank: int) -> Iterator[Tensor]:
        """What a tensor rank wrote, flat, as it lies in the files."""
        yield self._checked(name, kind, rank).reshape(-1)

    def part(self, name: str, *, kind: Kind, rank: int, size: int) -> Tensor:
        """What tensor rank `rank` of `size` holds, contiguous or a view; touches only the files that it lies in."""
        pieces = self.tensor_size
        dim = layout.rule_of(name).dim
        if dim is None or pieces == size:
            return self._checked(name, kind, rank if dim is not None else 0)
        whole = self.shape(name)[dim]
        if whole % size:
            raise UserError(f"{name}: {whole} rows or columns cannot be cut for {size} tensor ranks")
        first, last = rank * whole // size, (rank + 1) * whole // size
        height = whole // pieces
        found = []
        for piece in range(first // height, -(-last // height)):
            start, stop = max(first, piece * height), min(last, (piece + 1) * height)
            found.append(self._checked(name, kind, piece).narrow(dim, start - piece * height, stop - start))
        return found[0] if len(found) == 1 else torch.cat(found, dim)

    @property
    @abstractmethod
    def tensor_size(self) -> int:
        """Tensor ranks that the files were written by."""

    @property
    @abstractmethod
    def optimizer_steps(self) -> int:
        """Updates that the optimizer has done; skipped steps are not among them."""

    @abstractmethod
    def _local(self, name: str, kind: Kind, rank: int) -> Tensor:
        """What tensor rank `rank` of `tensor_size` wrote."""

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor rank's part in the files."""
        shape, dim = list(self.shape(name)), layout.rule_of(name).dim
        if dim is not None:
            shape[dim] //= self.tensor_size
        return tuple(shape)

    def _checked(self, name: str, kind: Kind, rank: int) -> Tensor:
        tensor = self._local(name, kind, rank)
        if tuple(tensor.shape) != self.local_shape(name):
            raise UserError(
                f"{self.folder}: {kind} of {name} has shape {tuple(tensor.shape)} instead of {self.local_shape(name)}; "
                "the checkpoint is damaged, use an earlier one"
            )
        return tensor.detach()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.10 behind layers.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]
