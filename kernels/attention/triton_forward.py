"""Triton forward kernel: one program per (sample, head, tile), text and image keys in one online softmax.

Legend: M = TILE_ROWS * TILE_COLS queries a tile, N = BLOCK_N keys a chunk, BLOCK_D = D rounded up to a power of two.
The softmax is one of base 2: `QK_SCALE` = scale * log2(e).
"""

import triton
import triton.language as tl

from kernels.attention.triton_common import (
    box_chunk, box_mask, dot, image_box, image_tile, load_rows, sample_info, seen_by_all, store_rows,
)  # fmt: skip
from kernels.triton_rounding import narrow


@triton.jit
def fold(
    acc, running_max, running_sum, q, k, v, seen, QK_SCALE: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr
):
    """Fold keys k, v [N, BLOCK_D] into (acc [M, BLOCK_D], running_max [M], running_sum [M]).

    `seen`: bool, broadcasts to [M, N]; None: all. The maximum is that of the bare products q k, or, if QK_SCALE is not
    positive, of the logits.
    """
    scores = dot(q, tl.trans(k), ACC, WIDEN)
    if QK_SCALE > 0:  # the factor rides on the subtraction below: one instruction
        FACTOR: tl.constexpr = QK_SCALE
    else:
        FACTOR: tl.constexpr = 1.0
        scores *= QK_SCALE
    if seen is None:
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        safe_max = new_max
    else:
        scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have seen nothing yet: no inf - inf
    offset = safe_max * FACTOR
    rescale = tl.exp2((running_max - safe_max) * FACTOR)  # exactly 1 where the maximum stays, though a GPU fuses the above
    p = tl.exp2(scores * FACTOR - offset[:, None])
    acc = acc * rescale[:, None] + dot(narrow(p, v.dtype, WIDEN), v, ACC, WIDEN)
    return acc, new_max, running_sum * rescale + tl.sum(p, 1)


@triton.jit
def attend(
    acc, running_max, running_sum, q, K, V, k_s, v_s, key_slot, key_exists, seen,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`fold` of the N slots `key_slot`; `key_exists`: bool [N] or None: all."""
    k = load_rows(K, key_slot, k_s, key_exists, D, BLOCK_D)
    v = load_rows(V, key_slot, v_s, key_exists, D, BLOCK_D)
    return fold(acc, running_max, running_sum, q, k, v, seen, QK_SCALE, ACC, WIDEN)


@triton.jit
def attend_range(
    acc, running_max, running_sum, q, K, V, k_s, v_s, first, num_keys, SPLIT: tl.constexpr,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`attend` to the `num_keys` slots from `first` on, which every query of the tile sees.

    SPLIT: whole chunks take no mask, but what is left needs a copy of the loop's body, and that registers.
    """
    if SPLIT:
        whole = num_keys // BLOCK_N * BLOCK_N
        for start in range(0, whole, BLOCK_N):
            key = first + start + tl.arange(0, BLOCK_N)
            acc, running_max, running_sum = attend(
                acc, running_max, running_sum, q, K, V, k_s, v_s, key, None, None, QK_SCALE, D, BLOCK_D, ACC, WIDEN
            )
        if whole < num_keys:
            key = first + whole + tl.arange(0, BLOCK_N)
            inside = key < first + num_keys
            acc, running_max, running_sum = attend(
                acc, running_max, running_sum, q, K, V, k_s, v_s, key, inside, inside[None, :],
                QK_SCALE, D, BLOCK_D, ACC, WIDEN,
            )  # fmt: skip
    else:
        for start in range(0, num_keys, BLOCK_N):
            key = first + start + tl.arange(0, BLOCK_N)
            inside = key < first + num_keys
            acc, running_max, running_sum = attend(
                acc, running_max, running_sum, q, K, V, k_s, v_s, key, inside, inside[None, :],
                QK_SCALE, D, BLOCK_D, ACC, WIDEN,
            )  # fmt: skip
    return acc, running_max, running_sum


@triton.jit(do_not_specialize=["heads", "slots", "text_slots", "text_tiles"])
def forward_kernel(
    Q, K, V, OUT, LSE, TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, heads, slots, text_slots, text_tiles,
    CLOSED: tl.constexpr, SPLIT: tl.constexpr,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, ROW_STEP: tl.constexpr, COL_STEP: tl.constexpr,
    LONG_ROWS: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """OUT [B, H, S, D] = attention; LSE [B, H, S] = log2 of the softmax denominator, +inf for rows that see nothing."""
    M: tl.constexpr = TILE_ROWS * TILE_COLS
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)  # the slow grid axis: text tiles, which may read the whole image, start first
    length, prefix, causal = sample_info(TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET, sample, text_slots)
    Q += sample * q_b + head * q_h
    K += sample * k_b + head * k_h
    V += sample * v_b + head * v_h
    acc = tl.zeros([M, BLOCK_D], ACC)
    running_max = tl.full([M], float("-inf"), ACC)
    running_sum = tl.zeros([M], ACC)

    if tile < text_tiles:
        slot = tile * M + tl.arange(0, M)
        exists, valid = slot < text_slots, slot < length
        q = load_rows(Q, slot, q_s, valid, D, BLOCK_D)
        any_valid = tile * M < length
        acc, running_max, running_sum = attend_range(
            acc, running_max, running_sum, q, K, V, k_s, v_s, 0, tl.where(any_valid, prefix, 0), SPLIT,
            QK_SCALE, D, BLOCK_D, BLOCK_N, ACC, WIDEN,
        )  # fmt: skip
        for start in range(prefix, tl.minimum(tile * M + M, length), BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            seen = (key < length)[None, :] & (key[None, :] <= slot[:, None])
            acc, running_max, running_sum = attend(
                acc, running_max, running_sum, q, K, V, k_s, v_s, key, key < length, seen,
                QK_SCALE, D, BLOCK_D, ACC, WIDEN,
            )  # fmt: skip
        acc, running_max, running_sum = attend_range(
            acc, running_max, running_sum, q, K, V, k_s, v_s, text_slots,
            tl.where(any_valid & (causal == 0), ROWS * COLS, 0), SPLIT, QK_SCALE, D, BLOCK_D, BLOCK_N, ACC, WIDEN,
        )  # fmt: skip
        acc = tl.where(valid[:, None], acc, 0.0)  # padding sees nothing
        running_sum = tl.where(valid, running_sum, 0.0)
    else:
        first_row, first_col, row, col, slot, exists = image_tile(
            tile - text_tiles, text_slots, ROWS, COLS, TILE_ROWS, TILE_COLS, ROW_STEP, COL_STEP
        )
        q = load_rows(Q, slot, q_s, exists, D, BLOCK_D)
        if CLOSED:  # the tile's own keys, which come from far, with its queries
            k = load_rows(K, slot, k_s, exists, D, BLOCK_D)
            v = load_rows(V, slot, v_s, exists, D, BLOCK_D)
            seen = box_mask(
                tl.arange(0, M), M, row, col, causal, first_row, first_col, TILE_COLS,
                ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, False,
            )  # fmt: skip
            acc, running_max, running_sum = fold(
                acc, running_max, running_sum, q, k, v, seen & exists[None, :], QK_SCALE, ACC, WIDEN
            )
        else:
            row_start, col_start, width, count = image_box(
                first_row, first_col, causal, ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, False
            )
            whole = seen_by_all(first_col, causal, BLOCK_N, COLS, LONG_ROWS)
            for start in range(0, whole, BLOCK_N):
                key = text_slots + first_row * ROW_STEP + (start + tl.arange(0, BLOCK_N)) * COL_STEP
                acc, running_max, running_sum = attend(
                    acc, running_max, running_sum, q, K, V, k_s, v_s, key, None, None, QK_SCALE, D, BLOCK_D, ACC, WIDEN
                )
            for start in range(whole, count, BLOCK_N):
                key, inside, seen = box_chunk(
                    start, count, row, col, causal, row_start, col_start, width, text_slots, BLOCK_N,
                    ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, ROW_STEP, COL_STEP, False,
                )  # fmt: skip
                acc, running_max, running_sum = attend(
                    acc, running_max, running_sum, q, K, V, k_s, v_s, key, inside, seen,
                    QK_SCALE, D, BLOCK_D, ACC, WIDEN,
                )  # fmt: skip
        acc, running_max, running_sum = attend_range(
            acc, running_max, running_sum, q, K, V, k_s, v_s, 0, prefix, SPLIT, QK_SCALE, D, BLOCK_D, BLOCK_N, ACC, WIDEN
        )

    FACTOR: tl.constexpr = QK_SCALE if QK_SCALE > 0 else 1.0
    some = running_sum != 0
    lse = tl.where(some, running_max * FACTOR + tl.log2(tl.where(some, running_sum, 1.0)), float("inf"))
    tl.store(LSE + (sample * heads + head) * slots + slot, lse, mask=exists)
    out = acc * tl.where(some, 1.0 / tl.where(some, running_sum, 1.0), 0.0)[:, None]
    store_rows(OUT + sample * o_b + head * o_h, slot, o_s, exists, out, D, BLOCK_D, WIDEN)
