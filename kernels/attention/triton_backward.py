"""Triton backward kernels: dQ with the forward's tiling, dK and dV by the transposed pattern. No atomics.

With P = softmax(q k^T scale), delta = rowsum(dO * O):  dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale * dS K,
dK = scale * dS^T Q  (FlashAttention-2, arXiv 2307.08691, algorithm 2). A text key is read by every image query; those
are cut into `chunks`, whose partial sums are written in fp32 and added in a fixed order afterwards: deterministic.

Rows that see nothing have lse = +inf, hence P = 0: masks name only what that does not already settle.

Legend: as in `triton_forward`; in the second kernel the tile holds keys and the loop runs over queries.
"""

import triton
import triton.language as tl

from kernels.attention.triton_common import dot, image_box, joined, load_rows, narrow, sample_info, store_rows, tile_slots


@triton.jit
def add_query_gradient(
    acc, q, grad, lse, delta, K, V, k_s, v_s, key_slot, key_exists, seen,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc [M, BLOCK_D] += dS K for N more keys."""
    k = load_rows(K, key_slot, k_s, key_exists, D, BLOCK_D)
    v = load_rows(V, key_slot, v_s, key_exists, D, BLOCK_D)
    p = tl.where(seen, tl.exp2(dot(q, tl.trans(k), ACC, WIDEN) * QK_SCALE - lse[:, None]), 0.0)
    ds = p * (dot(grad, tl.trans(v), ACC, WIDEN) - delta[:, None])
    return acc + dot(narrow(ds, k.dtype, WIDEN), k, ACC, WIDEN)


@triton.jit
def query_gradient_kernel(
    Q, K, V, OUT, GRAD, LSE, DELTA, DQ, TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, g_b, g_h, g_s, dq_b, dq_h, dq_s,
    heads, slots, text_slots, rows, cols, reach_rows, reach_cols, text_tiles, tiles_across,
    SCALE: tl.constexpr, QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """DQ [B, H, S, D] and DELTA [B, H, S] (read by the second kernel)."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)
    length, prefix, causal = sample_info(TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET, sample, text_slots)
    first_row, first_col, row, col, slot, exists = tile_slots(
        tile, text_tiles, tiles_across, text_slots, rows, cols, TILE_ROWS, TILE_COLS
    )
    is_text = tile < text_tiles
    valid = exists & ((slot < length) | (slot >= text_slots))
    K += sample * k_b + head * k_h
    V += sample * v_b + head * v_h
    q = load_rows(Q + sample * q_b + head * q_h, slot, q_s, valid, D, BLOCK_D)
    grad = load_rows(GRAD + sample * g_b + head * g_h, slot, g_s, valid, D, BLOCK_D)
    out = load_rows(OUT + sample * o_b + head * o_h, slot, o_s, valid, D, BLOCK_D)
    per_row = (sample * heads + head) * slots + slot
    lse = tl.load(LSE + per_row, mask=exists, other=float("inf"))
    delta = tl.sum(grad.to(ACC) * out.to(ACC), 1)
    tl.store(DELTA + per_row, delta, mask=exists)
    acc = tl.zeros([TILE_ROWS * TILE_COLS, BLOCK_D], ACC)

    text_start = tile * (TILE_ROWS * TILE_COLS)
    has_text_query = is_text & (text_start < length)
    text_stop = tl.maximum(prefix, tl.minimum(text_start + TILE_ROWS * TILE_COLS, length))
    text_stop = tl.where(is_text, tl.where(has_text_query, text_stop, 0), prefix)
    for start in range(0, text_stop, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        past = is_text & (slot >= prefix)[:, None] & (key[None, :] <= slot[:, None])
        seen = (key < text_stop)[None, :] & ((key < prefix)[None, :] | past)
        acc = add_query_gradient(
            acc, q, grad, lse, delta, K, V, k_s, v_s, key, key < text_stop, seen, QK_SCALE, D, BLOCK_D, ACC, WIDEN
        )

    row_start, col_start, width, count = image_box(
        first_row, first_col, rows, cols, reach_rows, reach_cols, causal, TILE_ROWS, TILE_COLS, False
    )
    row_start = tl.where(is_text, 0, row_start)
    col_start = tl.where(is_text, 0, col_start)
    width = tl.where(is_text, cols, width)
    count = tl.where(is_text, tl.where(has_text_query & (causal == 0), rows * cols, 0), count)
    for start in range(0, count, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        key_row = row_start + index // width
        key_col = col_start + index % width
        key = text_slots + key_row * cols + key_col
        near = joined(row[:, None], col[:, None], key_row[None, :], key_col[None, :], reach_rows, reach_cols)
        near = near & ((causal == 0) | (key[None, :] <= slot[:, None]))
        seen = (index < count)[None, :] & (is_text | near)
        acc = add_query_gradient(
            acc, q, grad, lse, delta, K, V, k_s, v_s, key, index < count, seen, QK_SCALE, D, BLOCK_D, ACC, WIDEN
        )
    store_rows(DQ + sample * dq_b + head * dq_h, slot, dq_s, exists, acc * SCALE, D, BLOCK_D, WIDEN)


@triton.jit
def add_key_gradients(
    dk, dv, k, v, Q, GRAD, LSE, DELTA, q_s, g_s, query_slot, query_exists, seen,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dk, dv [M keys, BLOCK_D] += the share of N more queries. `seen`: bool [M keys, N queries] (transposed)."""
    q = load_rows(Q, query_slot, q_s, query_exists, D, BLOCK_D)
    grad = load_rows(GRAD, query_slot, g_s, query_exists, D, BLOCK_D)
    lse = tl.load(LSE + query_slot, mask=query_exists, other=float("inf"))
    delta = tl.load(DELTA + query_slot, mask=query_exists, other=0.0)
    p = tl.where(seen, tl.exp2(dot(k, tl.trans(q), ACC, WIDEN) * QK_SCALE - lse[None, :]), 0.0)
    dv += dot(narrow(p, grad.dtype, WIDEN), grad, ACC, WIDEN)
    ds = p * (dot(v, tl.trans(grad), ACC, WIDEN) - delta[None, :])
    dk += dot(narrow(ds, q.dtype, WIDEN), q, ACC, WIDEN)
    return dk, dv


@triton.jit
def key_gradient_kernel(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, DK_TEXT, DV_TEXT, TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    heads, slots, text_slots, rows, cols, reach_rows, reach_cols, text_tiles, tiles_across, chunks, chunk_slots,
    SCALE: tl.constexpr, QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """DK, DV [B, H, S, D] for image keys; DK_TEXT, DV_TEXT [chunks, B, H, T, D] in ACC: partial sums of text keys."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    text_programs = text_tiles * chunks
    is_text = tl.program_id(1) < text_programs
    tile = tl.where(is_text, tl.program_id(1) // chunks, tl.program_id(1) - text_programs + text_tiles)
    chunk = tl.where(is_text, tl.program_id(1) % chunks, 0)
    length, prefix, causal = sample_info(TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET, sample, text_slots)
    first_row, first_col, row, col, slot, exists = tile_slots(
        tile, text_tiles, tiles_across, text_slots, rows, cols, TILE_ROWS, TILE_COLS
    )
    valid = exists & ((slot < length) | (slot >= text_slots))
    Q += sample * q_b + head * q_h
    GRAD += sample * g_b + head * g_h
    LSE += (sample * heads + head) * slots
    DELTA += (sample * heads + head) * slots
    k = load_rows(K + sample * k_b + head * k_h, slot, k_s, valid, D, BLOCK_D)
    v = load_rows(V + sample * v_b + head * v_h, slot, v_s, valid, D, BLOCK_D)
    dk = tl.zeros([TILE_ROWS * TILE_COLS, BLOCK_D], ACC)
    dv = tl.zeros([TILE_ROWS * TILE_COLS, BLOCK_D], ACC)

    key_start = tile * (TILE_ROWS * TILE_COLS)
    holds_source = is_text & (key_start < prefix)
    text_start = tl.where(is_text & (key_start >= prefix), key_start, 0)  # target keys are read from themselves onwards
    reads_text = tl.where(is_text, (chunk == 0) & (key_start < length), causal == 0)
    text_stop = tl.where(reads_text, length, 0)
    for start in range(text_start, text_stop, BLOCK_N):
        query = start + tl.arange(0, BLOCK_N)
        past = (query >= prefix)[None, :] & (slot[:, None] <= query[None, :])
        seen = (is_text == 0) | (slot < prefix)[:, None] | past
        dk, dv = add_key_gradients(
            dk, dv, k, v, Q, GRAD, LSE, DELTA, q_s, g_s, query, query < text_stop, seen,
            QK_SCALE, D, BLOCK_D, ACC, WIDEN,
        )  # fmt: skip

    row_start, col_start, width, count = image_box(
        first_row, first_col, rows, cols, reach_rows, reach_cols, causal, TILE_ROWS, TILE_COLS, True
    )
    row_start = tl.where(is_text, 0, row_start)
    col_start = tl.where(is_text, 0, col_start)
    width = tl.where(is_text, cols, width)
    first = tl.where(is_text, chunk * chunk_slots, 0)
    count = tl.where(is_text, tl.where(holds_source, tl.minimum(first + chunk_slots, rows * cols), 0), count)
    for start in range(first, count, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        query_row = row_start + index // width
        query_col = col_start + index % width
        query = text_slots + query_row * cols + query_col
        near = joined(row[:, None], col[:, None], query_row[None, :], query_col[None, :], reach_rows, reach_cols)
        near = near & ((causal == 0) | (slot[:, None] <= query[None, :]))
        seen = tl.where(is_text, (slot < prefix)[:, None], near)
        dk, dv = add_key_gradients(
            dk, dv, k, v, Q, GRAD, LSE, DELTA, q_s, g_s, query, index < count, seen,
            QK_SCALE, D, BLOCK_D, ACC, WIDEN,
        )  # fmt: skip

    dk *= SCALE
    if is_text:
        part = ((chunk * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * text_slots) * D
        store_rows(DK_TEXT + part, slot, D, exists, dk, D, BLOCK_D, WIDEN)
        store_rows(DV_TEXT + part, slot, D, exists, dv, D, BLOCK_D, WIDEN)
    else:
        store_rows(DK + sample * dk_b + head * dk_h, slot, dk_s, exists, dk, D, BLOCK_D, WIDEN)
        store_rows(DV + sample * dv_b + head * dv_h, slot, dv_s, exists, dv, D, BLOCK_D, WIDEN)
