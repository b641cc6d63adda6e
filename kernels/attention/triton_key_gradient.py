"""Triton backward kernels of keys and values: a tile of keys, the queries that read it by the transposed pattern.

With P = softmax(q k^T scale), delta = rowsum(dO * O):  dV = P^T dO,  dS = P * (dO V^T - delta),  dK = scale * dS^T Q
(FlashAttention-2, arXiv 2307.08691, algorithm 2). A text key is read by every image query; on large grids those are cut
into `chunks`, whose partial sums are written in fp32 and added in a fixed order afterwards: deterministic, no atomics.

Rows that see nothing have lse = +inf, hence P = 0, and so do queries that do not exist: masks name only the rest.

Two kernels rather than one with two branches: each needs fewer registers, so more of its programs share a multiprocessor.

Legend: M keys a tile (image: TILE_ROWS * TILE_COLS), N = BLOCK_N queries a step.
"""

import triton
import triton.language as tl

from kernels.attention.triton_common import (
    box_chunk, dot, image_box, image_tile, load_rows, sample_info, store_rows, text_range,
)  # fmt: skip
from kernels.triton_rounding import narrow


@triton.jit
def add_key_gradients(
    dk, dv, k, v, q, grad, lse, delta, seen,
    QK_SCALE: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dk, dv [M keys, BLOCK_D] += the share of N queries. `seen`: bool, broadcasts to [M keys, N queries]; None: all."""
    p = tl.exp2(dot(k, tl.trans(q), ACC, WIDEN) * QK_SCALE - lse[None, :])
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    dv += dot(narrow(p, grad.dtype, WIDEN), grad, ACC, WIDEN)
    ds = p * (dot(v, tl.trans(grad), ACC, WIDEN) - delta[None, :])
    dk += dot(narrow(ds, q.dtype, WIDEN), q, ACC, WIDEN)
    return dk, dv


@triton.jit
def add_queries(
    dk, dv, k, v, Q, GRAD, LSE, DELTA, q_s, g_s, query, exists, seen,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`add_key_gradients` of the N slots `query`; `exists`: bool [N] or None: all."""
    q = load_rows(Q, query, q_s, exists, D, BLOCK_D)
    grad = load_rows(GRAD, query, g_s, exists, D, BLOCK_D)
    if exists is None:
        lse = tl.load(LSE + query)
        delta = tl.load(DELTA + query)
    else:
        lse = tl.load(LSE + query, mask=exists, other=float("inf"))
        delta = tl.load(DELTA + query, mask=exists, other=0.0)
    return add_key_gradients(dk, dv, k, v, q, grad, lse, delta, seen, QK_SCALE, ACC, WIDEN)


@triton.jit(do_not_specialize=["heads", "slots", "text_slots"])
def text_key_gradient_kernel(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, DK_PARTS, DV_PARTS, TEXT_LEN, TEXT_PREFIX,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    heads, slots, text_slots,
    CHUNKS: tl.constexpr, CHUNK_SLOTS: tl.constexpr, M: tl.constexpr, IMAGE_SLOTS: tl.constexpr,
    SCALE: tl.constexpr, QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """DK, DV [B, H, S, D] of the text's slots. With more than one chunk partial sums go to DK_PARTS, DV_PARTS
    [CHUNKS, B, H, T, D] in ACC instead."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1) // CHUNKS
    chunk = tl.program_id(1) % CHUNKS
    length, prefix = text_range(TEXT_LEN, TEXT_PREFIX, sample, text_slots)
    Q += sample * q_b + head * q_h
    GRAD += sample * g_b + head * g_h
    LSE += (sample * heads + head) * slots
    DELTA += (sample * heads + head) * slots
    slot = tile * M + tl.arange(0, M)
    exists, is_source = slot < text_slots, (slot < prefix)[:, None]
    first_reader = tl.where(slot < prefix, 0, slot)  # of the text's queries
    k = load_rows(K + sample * k_b + head * k_h, slot, k_s, slot < length, D, BLOCK_D)
    v = load_rows(V + sample * v_b + head * v_h, slot, v_s, slot < length, D, BLOCK_D)
    dk = tl.zeros([M, BLOCK_D], ACC)
    dv = tl.zeros([M, BLOCK_D], ACC)

    holds_source = tile * M < prefix
    first = chunk * CHUNK_SLOTS
    stop = tl.where(holds_source, tl.minimum(first + CHUNK_SLOTS, IMAGE_SLOTS), 0)
    for start in range(first, stop, BLOCK_N):  # for all keys of the tile, though target keys are read by no image
        query = text_slots + start + tl.arange(0, BLOCK_N)
        if IMAGE_SLOTS % BLOCK_N == 0 and CHUNK_SLOTS % BLOCK_N == 0:
            dk, dv = add_queries(
                dk, dv, k, v, Q, GRAD, LSE, DELTA, q_s, g_s, query, None, None, QK_SCALE, D, BLOCK_D, ACC, WIDEN
            )
        else:
            dk, dv = add_queries(
                dk, dv, k, v, Q, GRAD, LSE, DELTA, q_s, g_s, query, query < text_slots + stop, None,
                QK_SCALE, D, BLOCK_D, ACC, WIDEN,
            )  # fmt: skip
    dk, dv = tl.where(is_source, dk, 0.0), tl.where(is_source, dv, 0.0)
    text_start = tl.where(holds_source, 0, tile * M)  # target keys are read from themselves onwards
    text_stop = tl.where((chunk == 0) & (tile * M < length), length, 0)
    for start in tl.range(text_start, text_stop, BLOCK_N, num_stages=1):  # prefetching here takes registers: 3 programs, not 4
        query = start + tl.arange(0, BLOCK_N)
        seen = first_reader[:, None] <= query[None, :]
        dk, dv = add_queries(
            dk, dv, k, v, Q, GRAD, LSE, DELTA, q_s, g_s, query, query < length, seen,
            QK_SCALE, D, BLOCK_D, ACC, WIDEN,
        )  # fmt: skip
    if CHUNKS == 1:
        store_rows(DK + sample * dk_b + head * dk_h, slot, dk_s, exists, dk * SCALE, D, BLOCK_D, WIDEN)
        store_rows(DV + sample * dv_b + head * dv_h, slot, dv_s, exists, dv, D, BLOCK_D, WIDEN)
    else:
        part = ((chunk * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * text_slots) * D
        store_rows(DK_PARTS + part, slot, D, exists, dk * SCALE, D, BLOCK_D, WIDEN)
        store_rows(DV_PARTS + part, slot, D, exists, dv, D, BLOCK_D, WIDEN)


@triton.jit(do_not_specialize=["heads", "slots", "text_slots"])
def image_key_gradient_kernel(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    heads, slots, text_slots,
    SCALE: tl.constexpr, QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, ROW_STEP: tl.constexpr, COL_STEP: tl.constexpr,
    LONG_ROWS: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """DK, DV [B, H, S, D] of the image's slots."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    length, prefix, causal = sample_info(TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET, sample, text_slots)
    Q += sample * q_b + head * q_h
    GRAD += sample * g_b + head * g_h
    LSE += (sample * heads + head) * slots
    DELTA += (sample * heads + head) * slots
    first_row, first_col, row, col, slot, exists = image_tile(
        tl.program_id(1), text_slots, ROWS, COLS, TILE_ROWS, TILE_COLS, ROW_STEP, COL_STEP
    )
    k = load_rows(K + sample * k_b + head * k_h, slot, k_s, exists, D, BLOCK_D)
    v = load_rows(V + sample * v_b + head * v_h, slot, v_s, exists, D, BLOCK_D)
    dk = tl.zeros([TILE_ROWS * TILE_COLS, BLOCK_D], ACC)
    dv = tl.zeros([TILE_ROWS * TILE_COLS, BLOCK_D], ACC)

    for start in range(0, tl.where(causal, 0, length), BLOCK_N):  # every text query reads a source image
        query = start + tl.arange(0, BLOCK_N)
        dk, dv = add_queries(
            dk, dv, k, v, Q, GRAD, LSE, DELTA, q_s, g_s, query, query < length, None, QK_SCALE, D, BLOCK_D, ACC, WIDEN
        )
    row_start, col_start, width, count = image_box(
        first_row, first_col, causal, ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, True
    )
    masked = count
    if LONG_ROWS:
        tl.static_assert(TILE_COLS % BLOCK_N == 0)
        masked = tl.where(causal, tl.minimum(TILE_COLS, count), 0)  # what comes after the tile sees all of it
    for start in range(0, masked, BLOCK_N):
        query, inside, seen = box_chunk(
            start, count, row, col, causal, row_start, col_start, width, text_slots, BLOCK_N,
            ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, ROW_STEP, COL_STEP, True,
        )  # fmt: skip
        dk, dv = add_queries(
            dk, dv, k, v, Q, GRAD, LSE, DELTA, q_s, g_s, query, inside, seen, QK_SCALE, D, BLOCK_D, ACC, WIDEN
        )
    for start in range(masked, count, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        query = text_slots + first_row * ROW_STEP + (col_start + index) * COL_STEP
        dk, dv = add_queries(
            dk, dv, k, v, Q, GRAD, LSE, DELTA, q_s, g_s, query, index < count, None, QK_SCALE, D, BLOCK_D, ACC, WIDEN
        )
    store_rows(DK + sample * dk_b + head * dk_h, slot, dk_s, exists, dk * SCALE, D, BLOCK_D, WIDEN)
    store_rows(DV + sample * dv_b + head * dv_h, slot, dv_s, exists, dv, D, BLOCK_D, WIDEN)
