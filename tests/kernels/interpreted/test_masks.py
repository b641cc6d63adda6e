"""The kernels' masks alone, pair by pair against the definition: every tile's box, as queries and as keys."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.attention.tiles import BLOCK
from kernels.attention.triton_common import box_chunk, image_box, image_tile
from kernels.attention.triton_op import kernel_constants
from kernels.patterns import image_mask, window

CHUNK = 64
GRIDS = [(1, 1), (1, 7), (5, 1), (2, 2), (3, 5), (7, 9), (9, 16), (2, 129)]  # the last: beyond packed coordinates
LARGE = [pytest.param(grid, marks=pytest.mark.slow) for grid in ((40, 3), (13, 32), (32, 32), (17, 64), (3, 150))]


@triton.jit
def mask_kernel(
    SEEN, OUTSIDE, causal, slots,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, ROW_STEP: tl.constexpr, COL_STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """SEEN [slots, slots] += 1 where a program's slot (row) and one of its box (column) are joined; OUTSIDE [tiles, slots of
    a tile]: joined with how many that are not of the box."""
    first_row, first_col, row, col, slot, exists = image_tile(
        tl.program_id(0), 0, ROWS, COLS, TILE_ROWS, TILE_COLS, ROW_STEP, COL_STEP
    )
    causal, outside = causal != 0, tl.zeros_like(slot)
    row_start, col_start, width, count = image_box(
        first_row, first_col, causal, ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, TRANSPOSED
    )
    for start in range(0, count, BLOCK_N):
        other, inside, seen = box_chunk(
            start, count, row, col, causal, row_start, col_start, width, 0, BLOCK_N,
            ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, ROW_STEP, COL_STEP, TRANSPOSED,
        )  # fmt: skip
        place = SEEN + slot[:, None] * slots + other[None, :]
        seen = exists[:, None] & seen
        within = seen & inside[None, :]
        tl.store(place, tl.load(place, mask=within, other=0) + 1, mask=within)
        outside += tl.sum((seen & (inside == 0)[None, :]).to(tl.int32), 1)
    tl.store(OUTSIDE + tl.program_id(0) * (TILE_ROWS * TILE_COLS) + tl.arange(0, TILE_ROWS * TILE_COLS), outside)


@pytest.mark.parametrize("grid", [*GRIDS, *LARGE], ids=str)
def test_masks_join_exactly_the_pairs_of_the_definition(grid):
    slots = grid[0] * grid[1]
    calls = [(pattern, 11) for pattern in ("row", "row_wrap", "column", "dense")]
    calls += [("conv", size) for size in (1, 3, 5, 11, 31, 301)]
    for pattern, size in calls:
        constants = kernel_constants(64, 1.0, window(pattern, grid, size), torch.bfloat16)
        constants = {name: constants[name] for name in mask_kernel.arg_names if name in constants}
        tiles = -(-constants["ROWS"] // constants["TILE_ROWS"]) * -(-constants["COLS"] // constants["TILE_COLS"])
        for causal in (True, False):
            want = image_mask(pattern, grid, conv_size=size, causal=causal)
            for transposed in (False, True):
                seen = torch.zeros(slots, slots, dtype=torch.int32)
                outside = torch.empty(tiles, BLOCK, dtype=torch.int32)
                mask_kernel[(tiles,)](seen, outside, int(causal), slots, **constants, TRANSPOSED=transposed, BLOCK_N=CHUNK)
                assert torch.equal(seen.T if transposed else seen, want.int()), (pattern, size, causal, transposed)
                assert (outside == 0).all(), (pattern, size, causal, transposed)
