"""Triton forward kernel: one program per (sample, head, tile), text and image keys in one online softmax.

Legend: M = TILE_ROWS * TILE_COLS queries a tile, N = BLOCK_N keys a chunk, BLOCK_D = D rounded up to a power of two.
Logits are kept in base 2: `QK_SCALE` = scale * log2(e).
"""

import triton
import triton.language as tl

from kernels.attention.triton_common import dot, image_box, joined, load_rows, narrow, sample_info, store_rows, tile_slots


@triton.jit
def attend(
    acc, running_max, running_sum, q, K, V, k_s, v_s, key_slot, key_exists, seen,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Fold N more keys into (acc [M, BLOCK_D], running_max [M], running_sum [M]). `seen`: bool [M, N]."""
    k = load_rows(K, key_slot, k_s, key_exists, D, BLOCK_D)
    v = load_rows(V, key_slot, v_s, key_exists, D, BLOCK_D)
    scores = tl.where(seen, dot(q, tl.trans(k), ACC, WIDEN) * QK_SCALE, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have seen nothing yet: no inf - inf
    rescale = tl.exp2(running_max - safe_max)
    p = tl.exp2(scores - safe_max[:, None])
    acc = acc * rescale[:, None] + dot(narrow(p, v.dtype, WIDEN), v, ACC, WIDEN)
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    heads, slots, text_slots, rows, cols, reach_rows, reach_cols, text_tiles, tiles_across,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """OUT [B, H, S, D] = attention; LSE [B, H, S] = log2 of the softmax denominator, +inf for rows that see nothing."""
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)  # the slow grid axis: text tiles, which may read the whole image, start first
    length, prefix, causal = sample_info(TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET, sample, text_slots)
    first_row, first_col, row, col, slot, exists = tile_slots(
        tile, text_tiles, tiles_across, text_slots, rows, cols, TILE_ROWS, TILE_COLS
    )
    is_text = tile < text_tiles
    valid = exists & ((slot < length) | (slot >= text_slots))
    Q += sample * q_b + head * q_h
    K += sample * k_b + head * k_h
    V += sample * v_b + head * v_h
    q = load_rows(Q, slot, q_s, valid, D, BLOCK_D)
    acc = tl.zeros([TILE_ROWS * TILE_COLS, BLOCK_D], ACC)
    running_max = tl.full([TILE_ROWS * TILE_COLS], float("-inf"), ACC)
    running_sum = tl.zeros([TILE_ROWS * TILE_COLS], ACC)

    text_start = tile * (TILE_ROWS * TILE_COLS)
    has_text_query = is_text & (text_start < length)
    text_stop = tl.maximum(prefix, tl.minimum(text_start + TILE_ROWS * TILE_COLS, length))
    text_stop = tl.where(is_text, tl.where(has_text_query, text_stop, 0), prefix)
    for start in range(0, text_stop, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        past = is_text & (slot >= prefix)[:, None] & (key[None, :] <= slot[:, None])
        seen = valid[:, None] & (key < text_stop)[None, :] & ((key < prefix)[None, :] | past)
        acc, running_max, running_sum = attend(
            acc, running_max, running_sum, q, K, V, k_s, v_s, key, key < text_stop, seen,
            QK_SCALE, D, BLOCK_D, ACC, WIDEN,
        )  # fmt: skip

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
        seen = valid[:, None] & (index < count)[None, :] & (is_text | near)
        acc, running_max, running_sum = attend(
            acc, running_max, running_sum, q, K, V, k_s, v_s, key, index < count, seen,
            QK_SCALE, D, BLOCK_D, ACC, WIDEN,
        )  # fmt: skip

    empty = running_sum == 0
    out = acc / tl.where(empty, 1.0, running_sum)[:, None]
    store_rows(OUT + sample * o_b + head * o_h, slot, o_s, exists, out, D, BLOCK_D, WIDEN)
    lse = tl.where(empty, float("inf"), running_max + tl.log2(tl.where(empty, 1.0, running_sum)))
    tl.store(LSE + (sample * heads + head) * slots + slot, lse, mask=exists)
