"""Norms of queries and keys over the channels of a head, straight from the packed projection, and their gradients.

A row is one head of one slot; row r is head r % heads of slot r // heads. Both kernels are bound by memory: every number is
read once and written once, and the statistics, which are cheap to compute again, are kept nowhere.
Legend: B samples, S slots, H heads, D channels (padded to BLOCK_D), R rows of a step.
"""

import triton
import triton.language as tl

from kernels.triton_rounding import narrow


@triton.jit
def places(row, slots, HEADS: tl.constexpr):
    """Sample, slot and head of rows, as int64 factors of strides. Divided in 32 bits: 64 would cost more than the rest."""
    place = row // HEADS
    sample = place // slots
    return sample.to(tl.int64), (place - sample * slots).to(tl.int64), (row - place * HEADS).to(tl.int64)


@triton.jit
def normalised(x, inside, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, CENTRED: tl.constexpr):
    """x [R, BLOCK_D] over its deviation, and that deviation's reciprocal [R, 1]. Channels beyond D are zero and stay so."""
    if CENTRED:
        x = x - (tl.sum(x, 1) / D)[:, None]
        if BLOCK_D != D:
            x = tl.where(inside, x, 0.0)
    reciprocal = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    return x * reciprocal, reciprocal


@triton.jit
def input_gradient(grad, unit, reciprocal, weight, D: tl.constexpr, CENTRED: tl.constexpr):
    """Gradient of a norm's input [R, BLOCK_D] from that of its output; `unit`, `reciprocal`: as `normalised` gives them."""
    scaled = grad * weight
    along = (tl.sum(scaled * unit, 1) / D)[:, None]
    if CENTRED:
        along = along * unit + (tl.sum(scaled, 1) / D)[:, None]
    else:
        along = along * unit
    return (scaled - along) * reciprocal


@triton.jit(do_not_specialize=["slots", "rows"])
def split_heads_kernel(
    QKV, Q_WEIGHT, K_WEIGHT, Q, K, stride_b, stride_s, stride_h, stride_part, slots, rows, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, CENTRED: tl.constexpr,
    ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """QKV [B, S, H, 3, D] with these strides -> Q, K [B, S, H, D], contiguous. A program: R rows."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    sample, slot, head = places(row, slots, HEADS)
    channel = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    packed = QKV + (sample * stride_b + slot * stride_s + head * stride_h)[:, None] + channel[None, :]
    out = row.to(tl.int64)[:, None] * D + channel[None, :]
    q = tl.load(packed, mask=inside, other=0.0).to(ACC)
    k = tl.load(packed + stride_part, mask=inside, other=0.0).to(ACC)
    q_weight = tl.load(Q_WEIGHT + channel, mask=channel < D, other=0.0).to(ACC)[None, :]
    k_weight = tl.load(K_WEIGHT + channel, mask=channel < D, other=0.0).to(ACC)[None, :]
    q_unit, _ = normalised(q, inside, eps, D, BLOCK_D, CENTRED)
    k_unit, _ = normalised(k, inside, eps, D, BLOCK_D, CENTRED)
    tl.store(Q + out, narrow(q_unit * q_weight, Q.dtype.element_ty, WIDEN), mask=inside)
    tl.store(K + out, narrow(k_unit * k_weight, K.dtype.element_ty, WIDEN), mask=inside)


@triton.jit(do_not_specialize=["slots", "rows"])
def split_heads_gradient_kernel(
    DQ, DK, DV, QKV, Q_WEIGHT, K_WEIGHT, DQKV, PARTS,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, stride_b, stride_s, stride_h, stride_part, slots, rows, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr,
    CENTRED: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """DQ, DK, DV [B, H, S, D] with any strides -> DQKV [B, S, H, 3, D], contiguous, and each program's part of the
    weights' gradients PARTS [programs, 2, D]. A program: STEPS times R rows, in order."""
    channel = tl.arange(0, BLOCK_D)
    q_weight = tl.load(Q_WEIGHT + channel, mask=channel < D, other=0.0).to(ACC)[None, :]
    k_weight = tl.load(K_WEIGHT + channel, mask=channel < D, other=0.0).to(ACC)[None, :]
    q_part = tl.zeros([R, BLOCK_D], ACC)
    k_part = tl.zeros([R, BLOCK_D], ACC)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * R + tl.arange(0, R)
        sample, slot, head = places(row, slots, HEADS)
        inside = (row < rows)[:, None] & (channel < D)[None, :]
        packed = QKV + (sample * stride_b + slot * stride_s + head * stride_h)[:, None] + channel[None, :]
        out = DQKV + row.to(tl.int64)[:, None] * (3 * D) + channel[None, :]

        grad = tl.load(DQ + (sample * q_b + head * q_h + slot * q_s)[:, None] + channel[None, :], mask=inside, other=0.0)
        x = tl.load(packed, mask=inside, other=0.0).to(ACC)
        unit, reciprocal = normalised(x, inside, eps, D, BLOCK_D, CENTRED)
        q_part += grad.to(ACC) * unit
        result = input_gradient(grad.to(ACC), unit, reciprocal, q_weight, D, CENTRED)
        tl.store(out, narrow(result, DQKV.dtype.element_ty, WIDEN), mask=inside)

        grad = tl.load(DK + (sample * k_b + head * k_h + slot * k_s)[:, None] + channel[None, :], mask=inside, other=0.0)
        x = tl.load(packed + stride_part, mask=inside, other=0.0).to(ACC)
        unit, reciprocal = normalised(x, inside, eps, D, BLOCK_D, CENTRED)
        k_part += grad.to(ACC) * unit
        result = input_gradient(grad.to(ACC), unit, reciprocal, k_weight, D, CENTRED)
        tl.store(out + D, narrow(result, DQKV.dtype.element_ty, WIDEN), mask=inside)

        grad = tl.load(DV + (sample * v_b + head * v_h + slot * v_s)[:, None] + channel[None, :], mask=inside, other=0.0)
        tl.store(out + 2 * D, grad, mask=inside)
    part = PARTS + tl.program_id(0) * (2 * D) + channel
    tl.store(part, tl.sum(q_part, 0), mask=channel < D)
    tl.store(part + D, tl.sum(k_part, 0), mask=channel < D)
