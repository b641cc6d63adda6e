"""Block layout of the Triton kernels: which rectangle of the image a program owns and how many score tiles that costs.

A program owns TILE_ROWS x TILE_COLS image slots of the window's view (64 in all) or 64 text slots. What it reads is a
box in closed form, enumerated slot by slot in chunks of 64 keys: the exact halo, nothing rounded to aligned tiles.
`image_box` is the box; `triton_common.image_box` is its twin on the device, and a test compares both with the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kernels.patterns import Window

BLOCK = 64  # slots in a query tile and keys in a chunk; 128 x 128 tiles mostly spill registers (README, register table)


@dataclass(frozen=True)
class Tile:
    """Shape of a program's rectangle in slots of the view; both are powers of two."""

    rows: int
    cols: int

    def across(self, view: Window) -> int:
        return -(-view.cols // self.cols)

    def count(self, view: Window) -> int:
        return -(-view.rows // self.rows) * self.across(view)

    def closed(self, view: Window) -> bool:
        """Do the queries of every tile read, of the image, their own tile only?"""
        whole_rows = self.cols >= view.cols or view.reach_cols == 0
        whole_cols = self.rows >= view.rows or view.reach_rows == 0
        return whole_rows and whole_cols


def image_box(view: Window, first_row: int, first_col: int, tile: Tile, causal: bool) -> tuple[int, int, int, int]:
    """Rows [a, b) and columns [c, d) that hold every image key of the query tile at (first_row, first_col)."""
    row_stop = first_row + tile.rows + (0 if causal else view.reach_rows)
    same_row_only = causal and view.reach_rows == 0  # then "earlier" means "to the left"
    col_stop = first_col + tile.cols + (0 if same_row_only else view.reach_cols)
    return (
        max(first_row - view.reach_rows, 0),
        min(row_stop, view.rows),
        max(first_col - view.reach_cols, 0),
        min(col_stop, view.cols),
    )


def score_tiles(view: Window, tile: Tile, causal: bool) -> int:
    """Number of image-image score tiles (a tile of queries x 64 keys) one head of one sample computes."""
    total = 0
    for first_row in range(0, view.rows, tile.rows):
        for first_col in range(0, view.cols, tile.cols):
            a, b, c, d = image_box(view, first_row, first_col, tile, causal)
            total += -(-(b - a) * (d - c) // BLOCK)
    return total


@lru_cache(maxsize=256)
def choose_tile(view: Window, slots: int = BLOCK) -> Tile:
    """The rectangle of `slots` (a power of two) with the fewest score tiles over both directions; squarest among equals.

    Row and column tiles become flat and tall (2 x 32 and 32 x 2 on 32 x 32), conv tiles compact, one-row views 1 x 64.
    """
    shapes = [Tile(1 << i, slots >> i) for i in range(slots.bit_length())]
    fitting = [t for t in shapes if t.rows < 2 * view.rows and t.cols < 2 * view.cols]

    def cost(tile: Tile) -> tuple[int, int, int]:
        scores = score_tiles(view, tile, True) + score_tiles(view, tile, False)
        return scores + tile.count(view), abs(tile.rows - tile.cols), tile.rows

    return min(fitting or shapes, key=cost)
