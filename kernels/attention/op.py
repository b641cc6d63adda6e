"""The public call: checks its input, picks what runs it, and lets one plan serve every layer of a batch.

Legend: B samples, H heads, T text slots, N = H_img * W_img image slots, S = T + N, D channels a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.attention.cpu import CpuPlan, cpu_attention, cpu_plan
from kernels.patterns import check_grid, window
from kernels.runtime import warn_once, why_no_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON_CHANNELS = (32, 64, 80, 128)


@dataclass(frozen=True)
class AttentionPlan:
    """What depends on the batch and the pattern but not on the layer. Made by `attention_plan`, used by every layer."""

    pattern: str
    grid: tuple[int, int]
    conv_size: int
    text_slots: int
    text_len: torch.Tensor
    text_prefix: torch.Tensor
    image_is_target: torch.Tensor
    torch_plan: CpuPlan | None  # None where the Triton kernels run: they need no preparation


def can_run_triton(q: torch.Tensor, *, raise_error: bool = False) -> bool:
    """Do the Triton kernels run for a tensor like `q`? If not, the reason is warned of once (CUDA) or raised.

    They need a CUDA device of capability 8.0 or more, Triton, fp32, bf16 or fp16, and 32, 64, 80 or 128 channels.
    CPU tensors take the CPU path by design, without a warning.
    """
    reason = None
    if not q.is_cuda:
        reason = f"q is on {q.device}; the Triton kernels need a CUDA device"
    elif q.dtype == torch.float64:
        reason = "q is float64; the Triton kernels take float32, bfloat16 and float16"
    elif q.shape[-1] not in TRITON_CHANNELS:
        reason = f"q has {q.shape[-1]} channels a head; the Triton kernels take 32, 64, 80 and 128"
    else:
        reason = why_no_triton(q.device)
    if reason and raise_error:
        raise ValueError(reason)
    if reason and q.is_cuda:
        warn_once("sparse attention", reason)
    return reason is None


def attention_plan(
    *,
    grid: tuple[int, int],
    pattern: str,
    text_slots: int,
    text_len: torch.Tensor,
    text_prefix: torch.Tensor,
    image_is_target: torch.Tensor,
    conv_size: int = 11,
    dtype: torch.dtype = torch.float32,
    checked: bool = False,
) -> AttentionPlan:
    """Prepare attention of one batch: masks and cuts, shared by all layers of the same pattern.

    `text_slots` = T; `text_len`, `text_prefix`, `image_is_target`: int32 [B] on one device (meaning: `sparse_attention`).
    `dtype` is that of q, k, v (another one works, at the price of converting a mask in every call).
    The values are read here (on a GPU: one synchronisation) and never again. `checked`: a plan of another pattern of the
    same batch was made before, so that on a GPU they need not be read at all.
    Raises ValueError naming the value for an unknown pattern, an impossible grid, lengths with
    0 <= text_prefix <= text_len <= T violated, or image_is_target other than 0 and 1.
    """
    grid = check_grid(grid)
    window(pattern, grid, conv_size)
    if text_slots < 0:
        raise ValueError(f"text_slots={text_slots} is negative")
    _check_samples(text_len, text_prefix, image_is_target)
    if not checked:
        _check_values(text_slots, text_len, text_prefix, image_is_target)
    samples = (text_len, text_prefix, image_is_target)
    torch_plan = None
    if not text_len.is_cuda or dtype == torch.float64 or why_no_triton(text_len.device):
        torch_plan = cpu_plan(pattern, grid, text_slots, *samples, conv_size=conv_size, dtype=_compute_dtype(dtype))
    return AttentionPlan(pattern, grid, conv_size, text_slots, *samples, torch_plan)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    grid: tuple[int, int],
    pattern: str,
    text_len: torch.Tensor,
    text_prefix: torch.Tensor,
    image_is_target: torch.Tensor,
    conv_size: int = 11,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
) -> torch.Tensor:
    """Attention over the canonical sequence [text segment: T slots][image segment: H_img * W_img slots, raster order].

    q, k, v: [B, H, T + H_img*W_img, D], floating, last dimension contiguous (any other strides); contents finite.
    grid: (H_img, W_img). pattern: `row`, `row_wrap`, `column`, `conv` (odd side `conv_size`), `dense`.
    text_len, text_prefix, image_is_target: int32 [B] on the device of q; directions may be mixed in a batch. Valid text
    slots, leading text slots that are source, and 1 for text -> image or 0 for image -> text.
    scale: factor of q k^T, by default D ** -0.5. plan: `attention_plan` of the same batch and pattern; with it the
    three tensors are not read again.

    Returns [B, H, S, D] in the dtype of q, differentiable in q, k and v; rows of padding text slots are zero.
    Raises ValueError, with the values and what would work, for shapes, dtypes or devices that do not fit. The lengths'
    values are checked on CPU tensors and by `attention_plan`; on a GPU that check would stall every layer, so without a
    plan the kernels only clamp them.
    """
    grid = check_grid(grid)
    window(pattern, grid, conv_size)
    text_slots = _check_qkv(q, k, v, grid)
    _check_samples(text_len, text_prefix, image_is_target)
    if text_len.shape[0] != q.shape[0] or text_len.device != q.device:
        raise ValueError(
            f"text_len has {text_len.shape[0]} samples on {text_len.device}, q has {q.shape[0]} on {q.device}; "
            "give one integer per sample on the device of q"
        )
    if plan is not None:
        _check_plan(plan, pattern, grid, conv_size, text_slots, q.shape[0])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.is_cuda and q.shape[-1] not in TRITON_CHANNELS:
        raise ValueError(f"q has {q.shape[-1]} channels a head; on a GPU use 32, 64, 80 or 128")
    if can_run_triton(q):
        from kernels.attention.triton_op import triton_attention

        view = window(pattern, grid, conv_size)
        return triton_attention(q, k, v, text_len, text_prefix, image_is_target, view=view, scale=scale)
    if plan is None or plan.torch_plan is None:
        _check_values(text_slots, text_len, text_prefix, image_is_target)
        samples = (text_len, text_prefix, image_is_target)
        torch_plan = cpu_plan(pattern, grid, text_slots, *samples, conv_size=conv_size, dtype=_compute_dtype(q.dtype))
    else:
        torch_plan = plan.torch_plan
    compute = _compute_dtype(q.dtype)
    if compute != q.dtype:
        return cpu_attention(q.to(compute), k.to(compute), v.to(compute), torch_plan, scale).to(q.dtype)
    return cpu_attention(q, k, v, torch_plan, scale)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 matmuls are slow and overflow on CPUs: computed in fp32. bf16 matmuls are native (logits rounded to bf16)."""
    return torch.float32 if dtype == torch.float16 else dtype


def _check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple[int, int]) -> int:
    """Raise ValueError unless q, k, v fit each other and the grid; return T."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [B, H, T + H_img*W_img, D]")
        if (x.shape, x.dtype, x.device) != (q.shape, q.dtype, q.device):
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device} but q is {tuple(q.shape)} {q.dtype} on {q.device}; "
                "q, k and v must agree"
            )
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension; call {name}.contiguous() first")
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}; use float32, bfloat16, float16 or float64")
    text_slots = q.shape[2] - grid[0] * grid[1]
    if text_slots < 0:
        raise ValueError(f"q has {q.shape[2]} slots, fewer than the {grid[0]}x{grid[1]} = {grid[0] * grid[1]} image slots")
    return text_slots


def _check_samples(text_len: torch.Tensor, text_prefix: torch.Tensor, image_is_target: torch.Tensor) -> None:
    for name, x in (("text_len", text_len), ("text_prefix", text_prefix), ("image_is_target", image_is_target)):
        if x.dim() != 1 or x.dtype != torch.int32:
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}; expected an int32 tensor [B]")
        if x.shape != text_len.shape or x.device != text_len.device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} on {x.device} but text_len is {tuple(text_len.shape)} on {text_len.device}"
            )


def _check_values(text_slots: int, text_len, text_prefix, image_is_target) -> None:
    ordered = (text_prefix >= 0) & (text_prefix <= text_len) & (text_len <= text_slots)
    known = (image_is_target == 0) | (image_is_target == 1)
    if bool((ordered & known).all()):
        return
    sample = int((~(ordered & known)).nonzero()[0])
    raise ValueError(
        f"sample {sample}: text_prefix={int(text_prefix[sample])}, text_len={int(text_len[sample])}, T={text_slots}, "
        f"image_is_target={int(image_is_target[sample])}; needed: 0 <= text_prefix <= text_len <= T, and 0 or 1"
    )


def _check_plan(plan: AttentionPlan, pattern: str, grid, conv_size: int, text_slots: int, batch: int) -> None:
    made = (plan.pattern, plan.grid, plan.conv_size, plan.text_slots, plan.text_len.shape[0])
    asked = (pattern, grid, conv_size, text_slots, batch)
    if made != asked:
        raise ValueError(f"the plan is for (pattern, grid, conv_size, T, B) = {made}, the call for {asked}")
