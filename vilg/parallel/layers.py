"""Layers split over a tensor group (Megatron-LM, 1909.08053 section 3); with `group=None` they are the plain layers.

Weights have the part's shape from the start and are NaN until `reset_parameters` of the model or a checkpoint fills
them, so that a forgotten weight is seen at once. `layout.py` says which dimension is cut; its test compares.
Legend: B batch, S slots, `in` / `out` features of the whole layer, V rows of the whole table, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilg.parallel.ops import (
    Group,
    copy_to_group,
    gather_slots,
    group_rank,
    group_size,
    reduce_from_group,
    scatter_slots_sum,
)


def enter_split(x: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """From the replicated (or slot-split) region [B, S or S / size, C] into the feature-split one [B, S, C]."""
    return gather_slots(x, group) if sequence_parallel else copy_to_group(x, group)


def leave_split(partial: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """Sum partial results [B, S, C] over the group; with sequence parallelism this rank's slots [B, S / size, C]."""
    return scatter_slots_sum(partial, group) if sequence_parallel else reduce_from_group(partial, group)


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W, and b, split: [B, S, in] -> [B, S, out / size].

    `enters=False`: the input has already passed `enter_split` (several heads share one).
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, group: Group = None,
        sequence_parallel: bool = False, enters: bool = True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.group, self.sequence_parallel, self.enters = group, sequence_parallel, enters
        local = part_size("out_features", out_features, group)
        self.weight = blank((local, in_features), device, dtype)
        self.bias = blank((local,), device, dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.enters:
            x = enter_split(x, self.group, self.sequence_parallel)
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the columns of W split: [B, S, in / size] -> [B, S, out], summed over the group; b is whole.

    With sequence parallelism the result is [B, S / size, out] and the gradient of b is summed over the group.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, group: Group = None,
        sequence_parallel: bool = False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.group, self.sequence_parallel = group, sequence_parallel
        self.weight = blank((out_features, part_size("in_features", in_features, group)), device, dtype)
        self.bias = blank((out_features,), device, dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return F.linear(x, self.weight, self.bias)
        y = leave_split(F.linear(x, self.weight), self.group, self.sequence_parallel)
        if self.bias is None:
            return y
        return y + shared(self.bias, self.group, self.sequence_parallel)


class VocabParallelEmbedding(nn.Module):
    """Rows of a table [V, C] split over the group: int64 ids [...] -> [..., C].

    An id outside 0 .. V - 1 gives zeros and no gradient (the begin-of-image id has a vector of its own).
    """

    def __init__(self, num_rows: int, channels: int, *, group: Group = None, device=None, dtype=None):
        super().__init__()
        self.group = group
        self.num_local = part_size("num_rows", num_rows, group)
        self.first = group_rank(group) * self.num_local
        self.weight = blank((self.num_local, channels), device, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.first if self.first else ids
        elsewhere = (local < 0) | (local >= self.num_local)
        rows = F.embedding(local.clamp(0, self.num_local - 1), self.weight)
        return reduce_from_group(rows.masked_fill(elsewhere[..., None], 0), self.group)


class Norm(nn.Module):
    """`layernorm` or `rmsnorm` (no bias) over the last dimension; statistics in fp32 whatever the dtype.

    `partial`: each rank of the group sees other slots or heads, so the gradient of the weights is summed over it.
    """

    def __init__(
        self, channels: int, kind: str, *, bias: bool = True, group: Group = None, partial: bool = False,
        eps: float = 1e-5, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.kind, self.group, self.partial, self.eps = kind, group, partial, eps
        self.weight = blank((channels,), device, dtype)
        self.bias = blank((channels,), device, dtype) if bias and kind == "layernorm" else None

    def factor(self) -> Tensor:
        """The weight [C] as a computation uses it."""
        return shared(self.weight, self.group, self.partial)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.factor()
        if self.kind == "rmsnorm":
            return F.rms_norm(x, weight.shape, weight, self.eps)
        bias = None if self.bias is None else shared(self.bias, self.group, self.partial)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def shared(parameter: Tensor, group: Group, partial: bool) -> Tensor:
    """A replicated parameter of which each rank sees a part of the uses: its gradient is summed over the group."""
    return copy_to_group(parameter, group) if partial else parameter


def part_size(name: str, whole: int, group: Group) -> int:
    """Size of one rank's part. Raises ValueError if the parts would be unequal."""
    size = group_size(group)
    if whole % size:
        raise ValueError(f"{name}={whole} is not divisible by the tensor-parallel size {size}")
    return whole // size


def blank(shape: tuple[int, ...], device, dtype) -> nn.Parameter:
    """A parameter of NaN, to be filled."""
    return nn.Parameter(torch.full(shape, float("nan"), device=device, dtype=dtype))
