"""Parts shared by the Triton kernels: where a tile lies, which keys its box holds, loads and matmuls.

A tile is 64 text slots or TILE_ROWS x TILE_COLS image slots of the window's view; programs 0 .. text_tiles-1 own text.
"""

import triton
import triton.language as tl


@triton.jit
def sample_info(TEXT_LEN, TEXT_PREFIX, IMAGE_IS_TARGET, sample, text_slots):
    """text_len, text_prefix (clamped: nothing is ever read out of bounds) and whether the image is causal."""
    length = tl.minimum(tl.load(TEXT_LEN + sample), text_slots)
    prefix = tl.minimum(tl.load(TEXT_PREFIX + sample), length)
    causal = tl.load(IMAGE_IS_TARGET + sample) != 0
    return length, prefix, causal


@triton.jit
def tile_slots(tile, text_tiles, tiles_across, text_slots, rows, cols, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr):
    """First row and column, and per lane: row, column, slot of the whole sequence, and whether that slot exists."""
    lane = tl.arange(0, TILE_ROWS * TILE_COLS)
    is_text = tile < text_tiles
    image_tile = tl.maximum(tile - text_tiles, 0)
    first_row = image_tile // tiles_across * TILE_ROWS
    first_col = image_tile % tiles_across * TILE_COLS
    row = first_row + lane // TILE_COLS
    col = first_col + lane % TILE_COLS
    text_slot = tile * (TILE_ROWS * TILE_COLS) + lane
    slot = tl.where(is_text, text_slot, text_slots + row * cols + col)
    exists = tl.where(is_text, text_slot < text_slots, (row < rows) & (col < cols))
    return first_row, first_col, row, col, slot, exists


@triton.jit
def image_box(
    first_row, first_col, rows, cols, reach_rows, reach_cols, causal,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """First row, first column, width and number of slots of the box joined with an image tile.

    Not transposed: the keys of a query tile. Transposed: the queries of a key tile, whose causal side is the later one.
    """
    row_reach_causal = tl.where(causal, 0, reach_rows)
    same_row_only = causal & (reach_rows == 0)
    col_reach_causal = tl.where(same_row_only, 0, reach_cols)
    if TRANSPOSED:
        row_start = tl.maximum(first_row - row_reach_causal, 0)
        row_stop = tl.minimum(first_row + TILE_ROWS + reach_rows, rows)
        col_start = tl.maximum(first_col - col_reach_causal, 0)
        col_stop = tl.minimum(first_col + TILE_COLS + reach_cols, cols)
    else:
        row_start = tl.maximum(first_row - reach_rows, 0)
        row_stop = tl.minimum(first_row + TILE_ROWS + row_reach_causal, rows)
        col_start = tl.maximum(first_col - reach_cols, 0)
        col_stop = tl.minimum(first_col + TILE_COLS + col_reach_causal, cols)
    width = col_stop - col_start
    return row_start, col_start, width, (row_stop - row_start) * width


@triton.jit
def joined(row, col, other_row, other_col, reach_rows, reach_cols):
    """The pattern's box rule, `kernels.patterns.Window.joins`, on coordinates; broadcasts."""
    return (tl.abs(row - other_row) <= reach_rows) & (tl.abs(col - other_col) <= reach_cols)


@triton.jit
def load_rows(BASE, slot, row_stride, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[slots, BLOCK_D] of one head; rows that do not exist and channels beyond D are zero.

    BASE is that of the head (64-bit arithmetic); within a head 32 bits do, which the launch checks: fewer registers.
    """
    channel = tl.arange(0, BLOCK_D)
    pointers = BASE + slot[:, None] * row_stride + channel[None, :]
    if BLOCK_D == D:
        return tl.load(pointers, mask=exists[:, None], other=0.0)
    return tl.load(pointers, mask=exists[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def narrow(x, DTYPE: tl.constexpr, WIDEN: tl.constexpr):
    """x rounded to DTYPE. WIDEN: to bf16 in Triton's interpreter, which cuts digits off where a GPU rounds to the nearest."""
    if WIDEN and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


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
