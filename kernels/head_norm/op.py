"""The public call: checks its input and picks what runs it; the torch path is the reference.

Legend: B samples, S slots, H heads, D channels a head.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime import warn_once, why_no_triton

Kind = Literal["layernorm", "rmsnorm"]
MAX_CHANNELS = 256
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def split_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *, kind: Kind, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, S, D] of a packed projection; queries and keys are normalised over the D channels of
    each head and multiplied by a weight that all heads share (query-key norm: 2302.05442 section 2, 2405.09818 section 2.2).

    qkv: [B, S, H, 3, D], floating, last dimension contiguous. q_weight, k_weight: [D] in its dtype and on its device.
    kind: `layernorm` (mean and variance; no bias) or `rmsnorm`; statistics in fp32 whatever the dtype. eps is added to
    the variance, or to the mean square.

    Returns q, k, v in the dtype of qkv, whose memory is [B, S, H, D]; v is a view of qkv. Differentiable in qkv and
    both weights; the same bits every time. On a GPU one kernel reads the packed queries and keys where they lie, and its
    backward writes the packed gradient in place of three and their stacking. CPU tensors, fp64 and devices before
    capability 8.0 take torch's own norms (a GPU with one warning).
    Raises ValueError, with the values and what would work, for shapes, dtypes or devices that do not fit.
    """
    _check(qkv, q_weight, k_weight, kind)
    if has_kernel(qkv):
        from kernels.head_norm.triton_op import triton_split_heads

        return triton_split_heads(qkv, q_weight, k_weight, kind == "layernorm", eps)
    return torch_split_heads(qkv, q_weight, k_weight, kind=kind, eps=eps)


def torch_split_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *, kind: Kind, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_heads` in plain torch."""
    # Unbound before it is transposed, so that the backward stacks the three gradients in one copy.
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(3))
    return _norm(q, q_weight, kind, eps), _norm(k, k_weight, kind, eps), v


def _norm(x: Tensor, weight: Tensor, kind: Kind, eps: float) -> Tensor:
    if kind == "rmsnorm":
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, None, eps)


def has_kernel(qkv: Tensor) -> bool:
    """Whether `split_heads` of this tensor runs the Triton kernel; where a GPU does not, one warning says why."""
    if not qkv.is_cuda or not qkv.numel():
        return False
    if qkv.dtype in TRITON_DTYPES:
        reason = why_no_triton(qkv.device)
    else:
        reason = f"it is {qkv.dtype}; the Triton kernels take float32, bfloat16 and float16"
    if reason:
        warn_once("the norm of queries and keys", reason)
    return reason is None


def _check(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, kind: str) -> None:
    if kind not in ("layernorm", "rmsnorm"):
        raise ValueError(f"kind={kind!r}; use 'layernorm' or 'rmsnorm'")
    if qkv.dim() != 5 or qkv.shape[3] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected [B, S, H, 3, D]")
    channels = qkv.shape[-1]
    if not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"qkv has {channels} channels a head; use 1 to {MAX_CHANNELS}")
    if channels > 1 and qkv.stride(-1) != 1:
        raise ValueError(f"qkv has stride {qkv.stride(-1)} in its last dimension; call qkv.contiguous() first")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv is {qkv.dtype}; use a floating type")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if (tuple(weight.shape), weight.dtype, weight.device) != ((channels,), qkv.dtype, qkv.device):
            raise ValueError(
                f"{name} is {tuple(weight.shape)} {weight.dtype} on {weight.device}; "
                f"expected [{channels}] {qkv.dtype} on {qkv.device}, as qkv"
            )
