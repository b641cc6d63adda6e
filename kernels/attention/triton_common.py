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
    tile, text_slots, ROWS: tl.constexpr, COLS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
    ROW_STEP: tl.constexpr, COL_STEP: tl.constexpr,
):  # fmt: skip
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
    return first_row, first_col, row, col, text_slots + row * ROW_STEP + col * COL_STEP, exists


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
def box_row(
    index, width,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """Row, within the box, of its slots number `index`, counted along its rows."""
    one_row: tl.constexpr = ROWS == 1 or (REACH_ROWS == 0 and TILE_ROWS == 1)
    height: tl.constexpr = TILE_ROWS + 2 * REACH_ROWS
    breadth: tl.constexpr = TILE_COLS + 2 * REACH_COLS
    if one_row:
        row = tl.zeros_like(index)
    elif (height * breadth + 2**7) * breadth < 2**20 and height < 2**10:
        # index / width as a product: exact while index * (rounding error of the reciprocal, below width) < 2**20, also
        # for what a chunk holds beyond the box
        row = (index * ((2**20 + width - 1) // width)) >> 20
    else:
        row = index // width
    return row


@triton.jit
def box_mask(
    index, count, row, col, causal, row_start, col_start, width,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """[M, N]: is slot number `index` [N] of a box of `count` slots seen by the slots (row, col) [M] of its tile, or, if
    TRANSPOSED, does it see them?

    A thread repeats every instruction for each of its 32 pairs (tiles of 64, four warps). So where a slot's share of the box
    is a run of numbers one comparison does; else row, column and number are compared together, unless the box is too large.
    """
    height: tl.constexpr = min(TILE_ROWS + 2 * REACH_ROWS, max(ROWS, TILE_ROWS))
    breadth: tl.constexpr = min(TILE_COLS + 2 * REACH_COLS, max(COLS, TILE_COLS))
    own_row, own_col = row - row_start, col - col_start
    own = own_row * width + own_col
    low_row, high_row = tl.maximum(own_row - REACH_ROWS, 0), tl.minimum(own_row + REACH_ROWS, ROWS - 1 - row_start)
    low_col, high_col = tl.maximum(own_col - REACH_COLS, 0), tl.minimum(own_col + REACH_COLS, COLS - 1 - col_start)
    if TRANSPOSED:  # the causal side is the later one
        low, high = tl.where(causal, own, 0), tl.zeros_like(own) + (count - 1)
    else:
        low, high = tl.zeros_like(own), tl.where(causal, own, count - 1)
    if REACH_ROWS == 0:
        first = tl.maximum(low, low_row * width + low_col)
        last = tl.minimum(high, high_row * width + high_col)
        # what lies before the first wraps round, to beyond the last
        after = (index[None, :] - first[:, None]).to(tl.uint32, bitcast=True)
        seen = after <= (last - first).to(tl.uint32, bitcast=True)[:, None]
    else:
        inner_row = box_row(index, width, ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS)
        if max(height, breadth) <= 2**7 and height * breadth + 2**7 <= 2**13:
            # Row, column and number in one int32, 7, 7 and 13 bits with a guard bit above each. A guard that is set before a
            # subtraction is still set after it where no more was taken away than there was. No sum overflows.
            GUARDS: tl.constexpr = 2**29 + 2**15 + 2**7
            place = (index * (2**16 + 2**8) + inner_row * (1 - width * 2**8))[None, :]
            lowest = (GUARDS - (low_row + low_col * 2**8 + low * 2**16))[:, None]
            highest = (GUARDS + (high_row + high_col * 2**8 + high * 2**16))[:, None] + lowest
            above = place + lowest
            seen = (above & (highest - above) & GUARDS) == GUARDS
        else:
            inner_col = index - inner_row * width
            seen = (inner_row[None, :] >= low_row[:, None]) & (inner_row[None, :] <= high_row[:, None])
            seen = seen & (inner_col[None, :] >= low_col[:, None]) & (inner_col[None, :] <= high_col[:, None])
            seen = seen & (index[None, :] >= low[:, None]) & (index[None, :] <= high[:, None])
    return seen


@triton.jit
def box_chunk(
    start, count, row, col, causal, row_start, col_start, width, text_slots, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, ROW_STEP: tl.constexpr, COL_STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Slots number `start` to `start` + N of a box of `count`: slot of the whole sequence [N], is it of the box [N], and
    `box_mask` [M, N]."""
    index = start + tl.arange(0, BLOCK_N)
    inner_row = box_row(index, width, ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS)
    key = text_slots + row_start * ROW_STEP + (col_start + index) * COL_STEP + inner_row * (ROW_STEP - width * COL_STEP)
    seen = box_mask(
        index, count, row, col, causal, row_start, col_start, width,
        ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, TRANSPOSED,
    )  # fmt: skip
    return key, index < count, seen


@triton.jit
def seen_by_all(first_col, causal, BLOCK: tl.constexpr, COLS: tl.constexpr, LONG_ROWS: tl.constexpr):
    """How many of its box's first slots every query of a tile sees, in whole chunks of BLOCK; none unless LONG_ROWS."""
    if LONG_ROWS:
        slots = tl.where(causal, first_col, COLS) // BLOCK * BLOCK
    else:
        slots = 0
    return slots


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
