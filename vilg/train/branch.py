"""Where reconstruction and generation part, the last layer's states: gradients put in, and looked at, from outside.

The reconstructor is no part of the engine's graph. Its loss is differentiated at once, in the forward pass; what comes
out for the states is handed to the engine's backward as the gradient of a plain number. So its graph is gone before the
transformer's backward begins, loss scales of fp16 never reach it, and any engine and ZeRO stage can carry it.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def attach(states: Tensor, value: Tensor, gradient: Tensor, rows: Tensor, note: Callable[[Tensor], None]) -> Tensor:
    """`value`, a scalar of which `gradient` [b, N, C] is the gradient at `states[rows]`, states [B, N, C], rows int64 [b].

    note: told what the gradient was multiplied with on the way back (loss scale, weights, data size), scalar.
    """
    return _Attach.apply(states, value, gradient, rows, note)


def watched(states: Tensor, first: int, note: Callable[[Tensor], None]) -> Tensor:
    """The same states [B, s, C]; `note` is told the squared norm of their gradient from slot `first` on, fp32 scalar."""
    return _Watched.apply(states, first, note)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, value, gradient, rows, note):
        ctx.kept = states.shape, states.dtype, gradient, rows, note
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        shape, dtype, gradient, rows, note = ctx.kept
        note(upstream.detach())
        full = torch.zeros(shape, dtype=dtype, device=gradient.device)
        full[rows] = (gradient * upstream).to(dtype)
        return full, None, None, None, None


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, first, note):
        ctx.first, ctx.note = first, note
        return states.view_as(states)

    @staticmethod
    def backward(ctx, grad):
        ctx.note(grad[:, ctx.first :].detach().float().square().sum())
        return grad, None, None
