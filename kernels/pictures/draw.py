"""Draws the block layouts of the README, one PNG a pattern:  python -m kernels.pictures.draw

Left and middle: a query tile on the 32 x 32 image, the keys its program reads and those one of its queries sees, when
the image is the target and when it is the source. Right: the whole mask for 16 text slots (12 valid) and 8 x 8 image.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from kernels.attention.tiles import choose_tile, image_box, score_tiles
from kernels.patterns import PATTERNS, dense_mask, image_mask, window

GRID = (32, 32)
COLOURS = ("#ffffff", "#cfe3f5", "#2f74b5")  # not read, read by the tile, seen by the query
TILE, QUERY, TARGET, SOURCE = "#e07b00", "#c00000", "#2f74b5", "#8fb8de"


def draw_tile(axes, pattern: str, causal: bool) -> None:
    """One query tile near the middle of the image, the box its program reads and what one query sees."""
    view = window(pattern, GRID)
    tile = choose_tile(view)
    first_row = view.rows // 2 // tile.rows * tile.rows
    first_col = view.cols // 2 // tile.cols * tile.cols
    query = (first_row + tile.rows // 2) * view.cols + first_col + tile.cols // 2
    a, b, c, d = image_box(view, first_row, first_col, tile, causal)
    levels = torch.zeros(view.rows, view.cols, dtype=torch.int64)
    levels[a:b, c:d] = 1
    levels.flatten()[image_mask(pattern, GRID, causal=causal)[query]] = 2
    axes.imshow(levels.view(GRID), cmap=ListedColormap(COLOURS), vmin=0, vmax=2)
    owned = torch.zeros(view.rows, view.cols, dtype=torch.bool)
    owned[first_row : first_row + tile.rows, first_col : first_col + tile.cols] = True
    for row, col in owned.view(GRID).nonzero().tolist():
        axes.add_patch(Rectangle((col - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=TILE, linewidth=0.8))
    row, col = divmod(query, GRID[1])
    axes.add_patch(Rectangle((col - 0.5, row - 0.5), 1, 1, color=QUERY))
    kind = "target: causal" if causal else "source: both ways"
    axes.set_title(f"image is the {kind}\n{score_tiles(view, tile, causal)} image tiles of 64 x 64 a head", fontsize=9)
    axes.set_xticks([0, 31], ["0", "31"])
    axes.set_yticks([0, 31], ["0", "31"])


def draw_mask(axes, pattern: str) -> None:
    """The mask of the whole sequence, text -> image over image -> text."""
    length, prefix, target = (torch.tensor([n], dtype=torch.int32) for n in (12, 12, 1))
    levels = torch.zeros(80, 80, dtype=torch.int64)
    levels[dense_mask(pattern, (8, 8), 16, length, prefix * 0, target * 0, conv_size=5)[0]] = 1
    levels[dense_mask(pattern, (8, 8), 16, length, prefix, target, conv_size=5)[0]] = 2
    axes.imshow(levels, cmap=ListedColormap(("#ffffff", SOURCE, TARGET)), vmin=0, vmax=2)
    axes.axhline(15.5, color="black", linewidth=0.6)
    axes.axvline(15.5, color="black", linewidth=0.6)
    axes.set_title("mask, 16 text slots (12 valid) + 8 x 8\n(conv: k = 5)", fontsize=9)
    axes.set_xticks([8, 48], ["text", "image keys"])
    axes.set_yticks([8, 48], ["text", "image queries"], rotation=90, va="center")


def draw(pattern: str, folder: Path) -> Path:
    """Write `<pattern>.png` into `folder` and return its path."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.4))
    tile = choose_tile(window(pattern, GRID))
    draw_tile(axes[0], pattern, True)
    draw_tile(axes[1], pattern, False)
    draw_mask(axes[2], pattern)
    legend = [
        Patch(edgecolor=TILE, facecolor="none", label="query tile"),
        Patch(color=QUERY, label="one query"),
        Patch(color=COLOURS[2], label="keys it sees"),
        Patch(facecolor=COLOURS[1], edgecolor="grey", label="further keys the tile reads"),
        Patch(color=TARGET, label="mask: text to image"),
        Patch(color=SOURCE, label="mask: image to text only"),
    ]
    figure.legend(handles=legend, loc="lower center", ncol=6, fontsize=8, frameon=False)
    figure.suptitle(f"{pattern}: tile of {tile.rows} x {tile.cols} in the window's view", fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path = folder / f"{pattern}.png"
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    return path


def main() -> None:
    """Redraw all pictures beside this file."""
    for pattern in PATTERNS:
        print(draw(pattern, Path(__file__).parent))


if __name__ == "__main__":
    main()
