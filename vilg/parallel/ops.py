"""Collectives with gradients: each is the conjugate of another, as in Megatron-LM (1909.08053 section 3, 2205.05198).

    forward            backward           function
    identity           all-reduce         copy_to_group       (`f` of the papers)
    all-reduce         identity           reduce_from_group   (`g`)
    all-gather         reduce-scatter     gather_slots        (`g` with sequence parallelism)
    reduce-scatter     all-gather         scatter_slots_sum   (its conjugate)
    slice              all-gather         split_slots
    all-gather         slice              gather_last, join_slots

"Slots" is dim 1 of [B, S, C]. Groups are arguments; `None` is a group of one, for which every function is the identity.
"""

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def group_size(group: Group) -> int:
    """Ranks in `group`; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """This process's rank in `group`; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """The same tensor; its gradient is summed over the group (input of a column-split layer, or a shared vector)."""
    return x if group is None else _Copy.apply(x, group)


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Sum of the ranks' tensors; the gradient passes unchanged (the output of a row-split layer)."""
    return x if group is None else _Reduce.apply(x, group)


def gather_slots(x: Tensor, group: Group) -> Tensor:
    """[B, S / size, C] -> [B, S, C]; the gradient is summed and cut back to this rank's slots."""
    return x if group is None else _GatherSlots.apply(x, group)


def scatter_slots_sum(x: Tensor, group: Group) -> Tensor:
    """Partial sums [B, S, C] -> this rank's slots [B, S / size, C] of their total."""
    return x if group is None else _ScatterSlotsSum.apply(x, group)


def split_slots(x: Tensor, group: Group) -> Tensor:
    """[B, S, C], equal on all ranks -> this rank's slots [B, S / size, C]; the gradient is gathered to [B, S, C]."""
    return x if group is None else _SplitSlots.apply(x, group)


def gather_last(x: Tensor, group: Group) -> Tensor:
    """[..., V / size] -> [..., V]; the gradient is cut back (logits of a vocabulary-split head, for sampling)."""
    return x if group is None else _Join.apply(x, group, x.dim() - 1)


def join_slots(x: Tensor, group: Group) -> Tensor:
    """[B, S / size, C] -> [B, S, C]; the gradient is cut back. For what every rank then computes alike (`gather_slots`
    is for what each computes a part of)."""
    return x if group is None else _Join.apply(x, group, 1)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _GatherSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_gather(x, group, dim=1)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter_slots(grad, ctx.group), None


class _ScatterSlotsSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _reduce_scatter_slots(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _all_gather(grad, ctx.group, dim=1), None


class _SplitSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _own_part(x, group, dim=1)

    @staticmethod
    def backward(ctx, grad):
        return _all_gather(grad, ctx.group, dim=1), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return _all_gather(x, group, dim=dim)

    @staticmethod
    def backward(ctx, grad):
        return _own_part(grad, ctx.group, dim=ctx.dim), None, None


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # A copy: autograd may hand the same gradient tensor to another branch, which must not see the sum.
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _all_gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    x = x.contiguous()
    size = dist.get_world_size(group)
    parts = x.new_empty((size * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(parts, x, group=group)
    return torch.cat(parts.chunk(size), dim)


def _reduce_scatter_slots(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    parts = torch.cat(x.chunk(size, dim=1))  # [size * B, S / size, C]
    out = x.new_empty((x.shape[0], x.shape[1] // size, *x.shape[2:]))
    dist.reduce_scatter_tensor(out, parts, group=group)
    return out


def _own_part(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()
