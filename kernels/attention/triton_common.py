"""Parts shared by the Triton kernels: where a tile lies, which keys its box holds, loads and matmuls.

A program owns M = TILE_ROWS * TILE_COLS slots: text slots in a row, or a rectangle of the window's view of the image;
programs 0 .. text_tiles-1 own text. The window is constexpr: a mask that a pattern does not need is never compiled, and
indices are divided by constants.
"""

import triton
import triton.language as tl

from kernels.triton_rounding import narrow


@triton.jit
def text_range(TEXT_LEN, TEXT_PREFIX, sample, text_slots):
    """text_len and text_prefix, clamped without their signs: what is negative is clamped as well, and registers are scarce."""
    length = tl.load(TEXT_LEN + sample).to(tl.uint32, bitcast=True)
    length = tl.minimum(length, text_slots.to(tl.uint32, bitcast=True))
    prefix = tl.minimum(tl.load(TEXT_PREFIX + sample).to(tl.uint32, bitcast=True), length)
    return length.to(tl.int32, bitcast=True), prefix.to(tl.int32, bitcast=True)


@triton.jit
def sample_info(TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET, sample, text_slots):
    """text_len, text_prefix (clamped: nothing is ever read out of bounds) and whether the image is causal."""
    length, prefix = text_range(TEXT_LEN, TEXT_PREFIX, sample, text_slots)
    causal = tl.load(IMAGE_IS_TARGET + sample) != 0
    return length, prefix, causal


@triton.jit
def image_tile(
    tile, text_slots, ROWS: tl.constexpr, COLS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr
):
    """First row and column of image tile number `tile`; per lane: row, column, slot of the whole sequence, existence."""
    lane = tl.arange(0, TILE_ROWS * TILE_COLS)
    across: tl.constexpr = (COLS + TILE_COLS - 1) // TILE_COLS
    first_row = tile // across * TILE_ROWS
    first_col = tile % across * TILE_COLS
    row = first_row + lane // TILE_COLS
    col = first_col + lane % TILE_COLS
    if ROWS % TILE_ROWS == 0 and COLS % TILE_COLS == 0:
        exists = tl.full([TILE_ROWS * TILE_COLS], True, tl.int1)
    else:
        exists = (row < ROWS) & (col < COLS)
    return first_row, first_col, row, col, text_slots + row * COLS + col, exists


@triton.jit
def image_box(
    first_row, first_col, causal,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """First row, first column, width and number of slots of the box joined with an image tile.

    Not transposed: the keys of a query tile. Transposed: the queries of a key tile, whose causal side is the later one.
    """
    row_reach_causal = tl.where(causal, 0, REACH_ROWS)
    same_row_only = causal & (REACH_ROWS == 0)
    col_reach_causal = tl.where(same_row_only, 0, REACH_COLS)
    if TRANSPOSED:
        row_start = tl.maximum(first_row - row_reach_causal, 0)
        row_stop = tl.minimum(first_row + TILE_ROWS + REACH_ROWS, ROWS)
        col_start = tl.maximum(first_col - col_reach_causal, 0)
        col_stop = tl.minimum(first_col + TILE_COLS + REACH_COLS, COLS)
    else:
        row_start = tl.maximum(first_row - REACH_ROWS, 0)
        row_stop = tl.minimum(first_row + TILE_ROWS + row_reach_causal, ROWS)
        col_start = tl.maximum(first_col - REACH_COLS, 0)
        col_stop = tl.minimum(first_col + TILE_COLS + col_reach_causal, COLS)
    width = col_stop - col_start
    return row_start, col_start, width, (row_stop - row_start) * width


@triton.jit
def box_slots(
    index, row_start, col_start, width,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """Row and column of the box's slots number `index`, counted along its rows."""
    one_row: tl.constexpr = ROWS == 1 or (REACH_ROWS == 0 and TILE_ROWS == 1)
    height: tl.constexpr = TILE_ROWS + 2 * REACH_ROWS
    breadth: tl.constexpr = TILE_COLS + 2 * REACH_COLS
    if one_row:
        row = tl.zeros_like(index)
    elif REACH_COLS == 0 and COLS % TILE_COLS == 0:
        row = index // TILE_COLS
    elif height * breadth * breadth < 2**20 and height < 2**10:
        # index / width as a product: exact while index * (rounding error of the reciprocal, below width) < 2**20
        row = (index * ((2**20 + width - 1) // width)) >> 20
    else:
        row = index // width
    return row_start + row, col_start + index - row * width


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
def box_mask(
    index, count, row, col, causal, row_start, col_start, width,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """[M, N]: is slot number `index` [N] of a box of `count` slots seen by the slots (row, col) [M] of its tile, or, if
    TRANSPOSED, does it see them?

    Where a slot's share of the box is a run of numbers, or every TILE_COLS-th of a run, its bounds do: two numbers per
    slot of the tile instead of coordinates per slot of the box, of which a thread would hold sixteen.
    """
    if TRANSPOSED:  # the causal side is the later one
        back_rows = tl.where(causal, 0, REACH_ROWS)
        back_cols = tl.where(causal, 0, REACH_COLS)
        ahead_rows, ahead_cols = REACH_ROWS, REACH_COLS
    else:
        back_rows, back_cols = REACH_ROWS, REACH_COLS
        ahead_rows = tl.where(causal, 0, REACH_ROWS)
        ahead_cols = tl.where(causal, 0, REACH_COLS)
    if REACH_ROWS == 0:
        begin = (row - row_start) * width - col_start
        first = begin + tl.maximum(col - back_cols, 0)
        last = begin + tl.minimum(col + ahead_cols, COLS - 1)
        seen = (index[None, :] >= first[:, None]) & (index[None, :] <= last[:, None])
    elif REACH_COLS == 0 and COLS % TILE_COLS == 0:
        first = (tl.maximum(row - back_rows, 0) - row_start) * TILE_COLS
        last = (tl.minimum(row + ahead_rows, ROWS - 1) - row_start) * TILE_COLS + (TILE_COLS - 1)
        seen = (index[None, :] >= first[:, None]) & (index[None, :] <= last[:, None])
        if TILE_COLS > 1:
            seen = seen & ((index % TILE_COLS)[None, :] == (col - col_start)[:, None])
    else:
        box_row, box_col = box_slots(
            index, row_start, col_start, width, ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS
        )
        near = joined(row[:, None], col[:, None], box_row[None, :], box_col[None, :], ROWS, COLS, REACH_ROWS, REACH_COLS)
        place, box_place = row * COLS + col, box_row * COLS + box_col
        if TRANSPOSED:
            allowed = box_place[None, :] >= tl.where(causal, place, 0)[:, None]
        else:
            allowed = box_place[None, :] <= tl.where(causal, place, ROWS * COLS)[:, None]
        seen = near & allowed & (index < count)[None, :]
    return seen


@triton.jit
def box_chunk(
    start, count, row, col, causal, row_start, col_start, width, text_slots, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Slots number `start` to `start` + N of a box of `count`: slot of the whole sequence [N], is it of the box [N], and
    `box_mask` [M, N]."""
    index = start + tl.arange(0, BLOCK_N)
    box_row, box_col = box_slots(
        index, row_start, col_start, width, ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS
    )
    seen = box_mask(
        index, count, row, col, causal, row_start, col_start, width,
        ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, TRANSPOSED,
    )  # fmt: skip
    return text_slots + box_row * COLS + box_col, index < count, seen


@triton.jit
def load_rows(BASE, slot, row_stride, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[slots, BLOCK_D] of one head; rows that do not exist and channels beyond D are zero. `exists` None: all do.

    BASE is that of the head (64-bit arithmetic); within a head 32 bits do, which the launch checks: fewer registers.
    """
    channel = tl.arange(0, BLOCK_D)
    pointers = BASE + slot[:, None] * row_stride + channel[None, :]
    if exists is None and BLOCK_D == D:
        rows = tl.load(pointers)
    elif exists is None:
        rows = tl.load(pointers, mask=(channel < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        rows = tl.load(pointers, mask=exists[:, None], other=0.0)
    else:
        rows = tl.load(pointers, mask=exists[:, None] & (channel < D)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows(
    BASE, slot, row_stride, exists, value, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr
):
    """Write [slots, BLOCK_D] of one head in the dtype of BASE; only rows that exist and channels below D."""
    channel = tl.arange(0, BLOCK_D)
    pointers = BASE + slot[:, None] * row_stride + channel[None, :]
    tl.store(pointers, narrow(value, BASE.dtype.element_ty, WIDEN), mask=exists[:, None] & (channel < D)[None, :])


@triton.jit
def dot(a, b, ACC: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b accumulated in ACC; fp32 inputs as three TF32 products (fp32 accuracy on tensor cores).

    WIDEN: bf16 as fp32, for Triton's interpreter only, whose bf16 matmul is wrong.
    """
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3", out_dtype=ACC)
    return tl.dot(a, b, out_dtype=ACC)
