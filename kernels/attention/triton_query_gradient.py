"""Triton backward kernel of the queries, with the forward's tiling; for closed tiles of the image also of keys and values.

With P = softmax(q k^T scale), delta = rowsum(dO * O):  dS = P * (dO V^T - delta),  dQ = scale * dS K
(FlashAttention-2, arXiv 2307.08691, algorithm 2). A tile is *closed* when its queries read, of the image, only its own
slots: whole rows of `row`, whole columns of `column`. Then the same scores give dQ, dK and dV: five matmuls instead of
seven, and q, k, v and dO are read once.

Legend: M = TILE_ROWS * TILE_COLS queries a tile, N = BLOCK_N keys a chunk.
"""

import triton
import triton.language as tl

from kernels.attention.triton_common import (
    box_chunk, box_mask, dot, image_box, image_tile, load_rows, sample_info, seen_by_all, store_rows,
)  # fmt: skip
from kernels.attention.triton_key_gradient import add_key_gradients
from kernels.triton_rounding import narrow


@triton.jit
def add_query_gradient(
    acc, q, grad, lse, delta, K, V, k_s, v_s, key_slot, key_exists, seen,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc [M, BLOCK_D] += dS K for N more keys. `key_exists` [N], `seen` (broadcasts to [M, N]): bool, or None for all."""
    k = load_rows(K, key_slot, k_s, key_exists, D, BLOCK_D)
    v = load_rows(V, key_slot, v_s, key_exists, D, BLOCK_D)
    p = tl.exp2(dot(q, tl.trans(k), ACC, WIDEN) * QK_SCALE - lse[:, None])
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    ds = p * (dot(grad, tl.trans(v), ACC, WIDEN) - delta[:, None])
    return acc + dot(narrow(ds, k.dtype, WIDEN), k, ACC, WIDEN)


@triton.jit
def add_range(
    acc, q, grad, lse, delta, K, V, k_s, v_s, first, num_keys, SPLIT: tl.constexpr,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`add_query_gradient` of the `num_keys` slots from `first` on, which every query of the tile sees; SPLIT as in
    `triton_forward.attend_range`."""
    if SPLIT:
        whole = num_keys // BLOCK_N * BLOCK_N
        for start in range(0, whole, BLOCK_N):
            key = first + start + tl.arange(0, BLOCK_N)
            acc = add_query_gradient(
                acc, q, grad, lse, delta, K, V, k_s, v_s, key, None, None, QK_SCALE, D, BLOCK_D, ACC, WIDEN
            )
        if whole < num_keys:
            key = first + whole + tl.arange(0, BLOCK_N)
            inside = key < first + num_keys
            acc = add_query_gradient(
                acc, q, grad, lse, delta, K, V, k_s, v_s, key, inside, inside[None, :],
                QK_SCALE, D, BLOCK_D, ACC, WIDEN,
            )  # fmt: skip
    else:
        for start in range(0, num_keys, BLOCK_N):
            key = first + start + tl.arange(0, BLOCK_N)
            inside = key < first + num_keys
            acc = add_query_gradient(
                acc, q, grad, lse, delta, K, V, k_s, v_s, key, inside, inside[None, :],
                QK_SCALE, D, BLOCK_D, ACC, WIDEN,
            )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["heads", "slots", "text_slots", "text_tiles"])
def query_gradient_kernel(
    Q, K, V, OUT, GRAD, LSE, DELTA, DQ, DK, DV, TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, g_b, g_h, g_s,
    dq_b, dq_h, dq_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, heads, slots, text_slots, text_tiles,
    CLOSED: tl.constexpr, SPLIT: tl.constexpr,
    SCALE: tl.constexpr, QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, ROW_STEP: tl.constexpr, COL_STEP: tl.constexpr,
    LONG_ROWS: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """DQ [B, H, S, D] and DELTA [B, H, S] (read by the key gradient); if CLOSED also DK and DV of the image's slots."""
    M: tl.constexpr = TILE_ROWS * TILE_COLS
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)
    length, prefix, causal = sample_info(TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET, sample, text_slots)
    Q += sample * q_b + head * q_h
    K += sample * k_b + head * k_h
    V += sample * v_b + head * v_h
    OUT += sample * o_b + head * o_h
    GRAD += sample * g_b + head * g_h
    DQ += sample * dq_b + head * dq_h
    LSE += (sample * heads + head) * slots
    DELTA += (sample * heads + head) * slots
    acc = tl.zeros([M, BLOCK_D], ACC)

    if tile < text_tiles:
        slot = tile * M + tl.arange(0, M)
        exists, valid = slot < text_slots, slot < length
        q = load_rows(Q, slot, q_s, valid, D, BLOCK_D)
        grad = load_rows(GRAD, slot, g_s, valid, D, BLOCK_D)
        out = load_rows(OUT, slot, o_s, valid, D, BLOCK_D)
        lse = tl.load(LSE + slot, mask=exists, other=float("inf"))
        delta = tl.sum(grad.to(ACC) * out.to(ACC), 1)
        tl.store(DELTA + slot, delta, mask=exists)
        any_valid = tile * M < length
        acc = add_range(
            acc, q, grad, lse, delta, K, V, k_s, v_s, 0, tl.where(any_valid, prefix, 0), SPLIT,
            QK_SCALE, D, BLOCK_D, BLOCK_N, ACC, WIDEN,
        )  # fmt: skip
        for start in range(prefix, tl.minimum(tile * M + M, length), BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            acc = add_query_gradient(
                acc, q, grad, lse, delta, K, V, k_s, v_s, key, key < length, key[None, :] <= slot[:, None],
                QK_SCALE, D, BLOCK_D, ACC, WIDEN,
            )  # fmt: skip
        acc = add_range(
            acc, q, grad, lse, delta, K, V, k_s, v_s, text_slots,
            tl.where(any_valid & (causal == 0), ROWS * COLS, 0), SPLIT, QK_SCALE, D, BLOCK_D, BLOCK_N, ACC, WIDEN,
        )  # fmt: skip
        store_rows(DQ, slot, dq_s, exists, acc * SCALE, D, BLOCK_D, WIDEN)
    else:
        first_row, first_col, row, col, slot, exists = image_tile(
            tile - text_tiles, text_slots, ROWS, COLS, TILE_ROWS, TILE_COLS, ROW_STEP, COL_STEP
        )
        q = load_rows(Q, slot, q_s, exists, D, BLOCK_D)
        grad = load_rows(GRAD, slot, g_s, exists, D, BLOCK_D)
        out = load_rows(OUT, slot, o_s, exists, D, BLOCK_D)
        lse = tl.load(LSE + slot, mask=exists, other=float("inf"))
        if CLOSED:  # the tile's own keys and values, which come from far, with its queries
            k = load_rows(K, slot, k_s, exists, D, BLOCK_D)
            v = load_rows(V, slot, v_s, exists, D, BLOCK_D)
        delta = tl.sum(grad.to(ACC) * out.to(ACC), 1)
        tl.store(DELTA + slot, delta, mask=exists)
        acc = add_range(
            acc, q, grad, lse, delta, K, V, k_s, v_s, 0, prefix, SPLIT, QK_SCALE, D, BLOCK_D, BLOCK_N, ACC, WIDEN
        )
        if CLOSED:
            seen = box_mask(
                tl.arange(0, M), M, row, col, causal, first_row, first_col, TILE_COLS,
                ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, False,
            )  # fmt: skip
            seen = seen & exists[None, :]
            p = tl.where(seen, tl.exp2(dot(q, tl.trans(k), ACC, WIDEN) * QK_SCALE - lse[:, None]), 0.0)
            ds = p * (dot(grad, tl.trans(v), ACC, WIDEN) - delta[:, None])
            p, ds = narrow(p, q.dtype, WIDEN), narrow(ds, q.dtype, WIDEN)
            acc += dot(ds, k, ACC, WIDEN)
            store_rows(DQ, slot, dq_s, exists, acc * SCALE, D, BLOCK_D, WIDEN)
            dv = dot(tl.trans(p), grad, ACC, WIDEN)
            dk = dot(tl.trans(ds), q, ACC, WIDEN)
            for start in range(0, tl.where(causal, 0, length), BLOCK_N):  # every text query reads a source image
                query = start + tl.arange(0, BLOCK_N)
                text_exists = query < length
                text_q = load_rows(Q, query, q_s, text_exists, D, BLOCK_D)
                text_grad = load_rows(GRAD, query, g_s, text_exists, D, BLOCK_D)
                text_out = load_rows(OUT, query, o_s, text_exists, D, BLOCK_D)
                text_lse = tl.load(LSE + query, mask=text_exists, other=float("inf"))
                text_delta = tl.sum(text_grad.to(ACC) * text_out.to(ACC), 1)  # its own program may not have written it
                dk, dv = add_key_gradients(
                    dk, dv, k, v, text_q, text_grad, text_lse, text_delta, None, QK_SCALE, ACC, WIDEN
                )
            store_rows(DK + sample * dk_b + head * dk_h, slot, dk_s, exists, dk * SCALE, D, BLOCK_D, WIDEN)
            store_rows(DV + sample * dv_b + head * dv_h, slot, dv_s, exists, dv, D, BLOCK_D, WIDEN)
        else:
            row_start, col_start, width, count = image_box(
                first_row, first_col, causal, ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, False
            )
            whole = seen_by_all(first_col, causal, BLOCK_N, COLS, LONG_ROWS)
            for start in range(0, whole, BLOCK_N):
                key = text_slots + first_row * ROW_STEP + (start + tl.arange(0, BLOCK_N)) * COL_STEP
                acc = add_query_gradient(
                    acc, q, grad, lse, delta, K, V, k_s, v_s, key, None, None, QK_SCALE, D, BLOCK_D, ACC, WIDEN
                )
            for start in range(whole, count, BLOCK_N):
                key, inside, seen = box_chunk(
                    start, count, row, col, causal, row_start, col_start, width, text_slots, BLOCK_N,
                    ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, ROW_STEP, COL_STEP, False,
                )  # fmt: skip
                acc = add_query_gradient(
                    acc, q, grad, lse, delta, K, V, k_s, v_s, key, inside, seen, QK_SCALE, D, BLOCK_D, ACC, WIDEN
                )
            store_rows(DQ, slot, dq_s, exists, acc * SCALE, D, BLOCK_D, WIDEN)
