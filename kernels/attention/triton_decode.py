"""Triton decode kernel: one program per (text sample, head, few candidates), no split along keys, fit for CUDA graphs.

Each step is bound by reading the cache, so scores are sums over a [candidates, keys, D] tile instead of matmuls (which
need 16 rows); the candidates of a program read a text key once between them. Nothing is read back to the host.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import runtime
from kernels.attention import triton_op
from kernels.runtime import LaunchConfig

CANDIDATES = 4  # a program, half as many in fp32; more would spill registers or need 16 for a matmul


@triton.jit
def joined(
    row, col, other_row, other_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
):  # fmt: skip
    """The pattern's box rule, `kernels.patterns.Window.joins`, on coordinates; broadcasts."""
    if REACH_ROWS >= ROWS - 1:
        near = tl.abs(col - other_col) <= REACH_COLS
    elif REACH_COLS >= COLS - 1:
        near = tl.abs(row - other_row) <= REACH_ROWS
    else:
        near = (tl.abs(row - other_row) <= REACH_ROWS) & (tl.abs(col - other_col) <= REACH_COLS)
    return near


@triton.jit
def fold(acc, running_max, running_sum, q, k, v, seen):
    """Fold keys [candidates or 1, N, BLOCK_D] into the online softmax of q [candidates, BLOCK_D] (already scaled)."""
    scores = tl.where(seen, tl.sum(q[:, None, :] * k.to(q.dtype), 2), float("-inf"))
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(running_max - safe_max)
    p = tl.exp2(scores - safe_max[:, None])
    acc = acc * rescale[:, None] + tl.sum(p[:, :, None] * v.to(q.dtype), 1)
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit(do_not_specialize=["heads", "group", "text_slots"])
def decode_kernel(
    Q, TEXT_K, TEXT_V, IMAGE_K, IMAGE_V, OUT, TEXT_PREFIX, IMAGE_SLOT,
    q_b, q_h, tk_b, tk_h, tk_s, tv_b, tv_h, tv_s, ik_b, ik_h, ik_s, iv_b, iv_h, iv_s,
    heads, group, text_slots,
    CAPACITY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CANDIDATES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """OUT [B, H, D] contiguous."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    candidate = tl.program_id(1) * CANDIDATES + tl.arange(0, CANDIDATES)
    exists = candidate < group
    sequence = sample * group + candidate
    channel = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (channel < D)[None, :]
    q = tl.load(Q + sequence[:, None] * q_b + head * q_h + channel[None, :], mask=inside, other=0.0).to(ACC) * QK_SCALE
    acc = tl.zeros([CANDIDATES, BLOCK_D], ACC)
    running_max = tl.full([CANDIDATES], float("-inf"), ACC)
    running_sum = tl.zeros([CANDIDATES], ACC)

    prefix = tl.minimum(tl.load(TEXT_PREFIX + sample), text_slots)
    for start in range(0, prefix, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        readable = (key < prefix)[:, None] & (channel < D)[None, :]
        address = key.to(tl.int64)[:, None]
        k = tl.load(TEXT_K + sample * tk_b + head * tk_h + address * tk_s + channel[None, :], mask=readable, other=0.0)
        v = tl.load(TEXT_V + sample * tv_b + head * tv_h + address * tv_s + channel[None, :], mask=readable, other=0.0)
        seen = exists[:, None] & (key < prefix)[None, :]
        acc, running_max, running_sum = fold(acc, running_max, running_sum, q, k[None, :, :], v[None, :, :], seen)

    slot = tl.load(IMAGE_SLOT + sequence, mask=exists, other=0)
    row, col = slot // COLS, slot % COLS
    row_start = tl.maximum(row - REACH_ROWS, 0)
    col_start = tl.maximum(col - REACH_COLS, 0)
    if REACH_ROWS == 0:
        width = col + 1 - col_start
    else:
        width = tl.minimum(col + REACH_COLS + 1, COLS) - col_start
    count = tl.where(exists, (row - row_start + 1) * width, 0)
    for start in range(0, tl.max(count, 0), BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        if REACH_ROWS == 0:
            index_row = tl.zeros_like(index)[None, :]
        elif REACH_COLS == 0:
            index_row = index[None, :]
        else:
            index_row = index[None, :] // width[:, None]
        key_row = row_start[:, None] + index_row
        key_col = col_start[:, None] + index[None, :] - index_row * width[:, None]
        key = key_row * COLS + key_col
        seen = index[None, :] < count[:, None]
        if REACH_ROWS != 0:  # else the box is the slots seen, no more
            near = joined(row[:, None], col[:, None], key_row, key_col, ROWS, COLS, REACH_ROWS, REACH_COLS)
            seen = seen & near & (key <= slot[:, None])
        entry = (key % CAPACITY).to(tl.int64)[:, :, None]
        readable = seen[:, :, None] & (channel < D)[None, None, :]
        base = sequence[:, None, None]
        k = tl.load(IMAGE_K + base * ik_b + head * ik_h + entry * ik_s + channel[None, None, :], mask=readable, other=0.0)
        v = tl.load(IMAGE_V + base * iv_b + head * iv_h + entry * iv_s + channel[None, None, :], mask=readable, other=0.0)
        acc, running_max, running_sum = fold(acc, running_max, running_sum, q, k, v, seen)

    out = acc / tl.where(exists, running_sum, 1.0)[:, None]
    pointers = OUT + (sequence[:, None] * heads + head) * D + channel[None, :]
    tl.store(pointers, out.to(OUT.dtype.element_ty), mask=inside)


@torch.library.custom_op("vilg_kernels::decode", mutates_args=())
def decode(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor,
    text_prefix: Tensor, image_slot: Tensor, window: list[int], scale: float,
) -> Tensor:  # fmt: skip
    """`decode_attention` on checked arguments; `window`: the four fields of `patterns.Window`."""
    if q.stride(-1) != 1:
        q = q.contiguous()
    text_prefix, image_slot = text_prefix.contiguous(), image_slot.contiguous()
    batch, heads, channels = q.shape
    samples, text_slots = text_k.shape[0], text_k.shape[2]
    group = batch // samples
    out = q.new_empty(batch, heads, channels)
    candidates = min(CANDIDATES if q.element_size() == 2 else CANDIDATES // 2, triton.next_power_of_2(group))
    block_d = max(16, triton.next_power_of_2(channels))
    constants = {
        "CAPACITY": image_k.shape[2],
        **dict(zip(("ROWS", "COLS", "REACH_ROWS", "REACH_COLS"), window)),
        "QK_SCALE": scale * triton_op.LOG2_E,
        "D": channels,
        "BLOCK_D": block_d,
        "BLOCK_N": max(16, 8192 // (q.element_size() * block_d * candidates)),
        "CANDIDATES": candidates,
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
    }
    args = (
        q, text_k, text_v, image_k, image_v, out, text_prefix, image_slot, *q.stride()[:2],
        *(stride for x in (text_k, text_v, image_k, image_v) for stride in x.stride()[:3]),
        heads, group, text_slots,
    )  # fmt: skip
    launch_grid = (samples * heads, triton.cdiv(group, candidates))
    config = _config(q.element_size(), candidates)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        runtime.start_kernel(decode_kernel, launch_grid, args, constants, config)
    return out


def _config(itemsize: int, candidates: int) -> LaunchConfig:
    """As timed for 16 bits and four candidates, else by the compile gate: fp32 spills with four warps, and wide heads where
    ptxas takes all it likes for the addresses; for fewer candidates ptxas by itself stays just below what it needs."""
    if itemsize > 2:
        return LaunchConfig(8, 2, registers=128)
    return LaunchConfig(4, 2, registers=None if candidates == CANDIDATES else 192)


@decode.register_fake
def _(q, text_k, text_v, image_k, image_v, text_prefix, image_slot, window, scale):
    return q.new_empty(q.shape)
