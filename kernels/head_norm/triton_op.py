"""Launching the Triton kernels: two `torch.library` custom ops and the autograd function around them.

Legend: B samples, S slots, H heads, D channels a head.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import runtime
from kernels.head_norm.triton_kernels import split_heads_gradient_kernel, split_heads_kernel
from kernels.runtime import LaunchConfig
from kernels.triton_rounding import INTERPRETED

NUMBERS = 2048  # of a tensor in a program's step: 16 for each thread of four warps
GRADIENT_NUMBERS = 1024  # the sums for the weights take registers too
GRADIENT_CONFIG = LaunchConfig(4, 1, registers=96)  # without a limit ptxas chooses 64 for some types, and spills
STEPS = 16  # of a gradient program, which sums the weights' gradients over their rows


def triton_split_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, centred: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_heads` on checked arguments by the Triton kernels; `centred`: layer norm."""
    return _SplitHeads.apply(qkv, q_weight, k_weight, centred, eps)


class _SplitHeads(torch.autograd.Function):
    """One function for all three, since v must remain a view (which a custom op may not return) and yet have its gradient
    packed with the others'."""

    @staticmethod
    def forward(ctx, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, centred: bool, eps: float):
        ctx.save_for_backward(qkv, q_weight, k_weight)
        ctx.centred, ctx.eps = centred, eps
        q, k = split_heads(qkv, q_weight, k_weight, centred, eps)
        return q, k, qkv.select(3, 2).transpose(1, 2)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
        dqkv, dq_weight, dk_weight = split_heads_gradient(dq, dk, dv, *ctx.saved_tensors, ctx.centred, ctx.eps)
        return dqkv, dq_weight, dk_weight, None, None


def _constants(qkv: Tensor, centred: bool, numbers: int) -> dict:
    channels = qkv.shape[-1]
    block_d = max(16, triton.next_power_of_2(channels))
    return {
        "HEADS": qkv.shape[2],
        "D": channels,
        "BLOCK_D": block_d,
        "R": numbers // block_d,
        "CENTRED": centred,
        "ACC": tl.float64 if qkv.dtype == torch.float64 else tl.float32,
        "WIDEN": INTERPRETED and qkv.dtype == torch.bfloat16,
    }


def _count_rows(qkv: Tensor) -> int:
    rows = qkv.shape[0] * qkv.shape[1] * qkv.shape[2]
    if rows >= 2**31 - 2**16:  # a program's last rows may lie beyond
        raise ValueError(f"qkv of {tuple(qkv.shape)} holds {rows} rows of a head, 2**31 or more; pass fewer samples")
    return rows


def _start(kernel, programs: int, args: tuple, constants: dict, config: LaunchConfig, device: torch.device) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        runtime.start_kernel(kernel, (programs,), args, constants, config)


def _rows_last(qkv: Tensor) -> Tensor:
    """Empty [B, H, S, D] whose memory is [B, S, H, D], where the rows of the kernels lie one after the other."""
    batch, slots, heads, _, channels = qkv.shape
    return qkv.new_empty(batch, slots, heads, channels).transpose(1, 2)


@torch.library.custom_op("vilg_kernels::split_heads", mutates_args=())
def split_heads(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, centred: bool, eps: float) -> tuple[Tensor, Tensor]:
    """q and k [B, H, S, D] of qkv [B, S, H, 3, D], normalised."""
    q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    q, k, constants = _rows_last(qkv), _rows_last(qkv), _constants(qkv, centred, NUMBERS)
    rows, slots = _count_rows(qkv), qkv.shape[1]
    args = (qkv, q_weight, k_weight, q, k, *qkv.stride()[:4], slots, rows, eps)
    _start(split_heads_kernel, triton.cdiv(rows, constants["R"]), args, constants, LaunchConfig(4, 1), qkv.device)
    return q, k


@split_heads.register_fake
def _(qkv, q_weight, k_weight, centred, eps):
    return _rows_last(qkv), _rows_last(qkv)


@torch.library.custom_op("vilg_kernels::split_heads_gradient", mutates_args=())
def split_heads_gradient(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, centred: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv [B, S, H, 3, D] and of both weights [D]; deterministic."""
    q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    dq, dk, dv = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv))  # sum().backward() expands
    constants = _constants(qkv, centred, GRADIENT_NUMBERS) | {"STEPS": STEPS}
    rows, slots = _count_rows(qkv), qkv.shape[1]
    programs = triton.cdiv(rows, STEPS * constants["R"])
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    sums = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    parts = torch.empty(programs, 2, qkv.shape[-1], dtype=sums, device=qkv.device)
    strides = [stride for x in (dq, dk, dv) for stride in x.stride()[:3]]
    args = (dq, dk, dv, qkv, q_weight, k_weight, dqkv, parts, *strides, *qkv.stride()[:4], slots, rows, eps)
    _start(split_heads_gradient_kernel, programs, args, constants, GRADIENT_CONFIG, qkv.device)
    q_sum, k_sum = parts.sum(0).to(q_weight.dtype).unbind()
    return dqkv, q_sum.clone(), k_sum.clone()  # an op's results may not share memory


@split_heads_gradient.register_fake
def _(dq, dk, dv, qkv, q_weight, k_weight, centred, eps):
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), torch.empty_like(q_weight), torch.empty_like(k_weight)
