"""The one definition of who may see whom: text segment, image patterns, KV-cache entries and kernel tiles.

Everything that attends reads this file: the dense mask of the reference, the bands of the CPU path, the tiles of the
Triton kernels and the cache entries that decoding keeps.

Legend: B samples, T text slots, N = H_img * W_img image slots in raster order, S = T + N slots, text first.

Every pattern is a *box window* over a view of the image as `rows x cols`: slot (r, c) is joined with (r', c') when
|r' - r| <= reach_rows and |c' - c| <= reach_cols.

    pattern    view        reach_rows  reach_cols      source
    row        H x W       0           W - 1           ERNIE-ViLG 3.1.2, strict ("same row")
    row_wrap   1 x (H*W)   0           W               DALL-E: the slot itself and the W raster slots before it
    column     H x W       H - 1       0               ERNIE-ViLG 3.1.2
    conv       H x W       k // 2      k // 2          ERNIE-ViLG Fig. 2, k = 11, centred, no wrap-around
    dense      1 x (H*W)   0           H*W - 1

ERNIE-ViLG says that its text -> image pattern is DALL-E's, whose "row" is the wrapping raster window, and that its
image -> text pattern is the *same row*, bidirectionally; the paper does not settle which of the two its row layers used
in which direction. Both are offered under their own names. For a source image (bidirectional) `row_wrap` is read
symmetrically, |n - n'| <= W, so that a causal mask is always the bidirectional one cut at the diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

PATTERNS = ("row", "row_wrap", "column", "conv", "dense")


@dataclass(frozen=True)
class Window:
    """A box window over the image seen as `rows x cols`; reaches are in slots of that view, not beyond its size."""

    rows: int
    cols: int
    reach_rows: int
    reach_cols: int

    @property
    def num_slots(self) -> int:
        return self.rows * self.cols

    @property
    def reach(self) -> int:
        """Largest distance in raster slots between two joined slots."""
        return self.reach_rows * self.cols + self.reach_cols

    def joins(self, query, key):
        """Are two image slots joined, causality aside? Integers or broadcasting integer tensors."""
        row_distance = abs(query // self.cols - key // self.cols)
        col_distance = abs(query % self.cols - key % self.cols)
        return (row_distance <= self.reach_rows) & (col_distance <= self.reach_cols)

    def last_reader(self, slot):
        """The last raster slot joined with `slot` (the lower right corner of its box). Integer or integer tensor."""
        row, col = slot // self.cols + self.reach_rows, slot % self.cols + self.reach_cols
        if isinstance(slot, int):
            return min(row, self.rows - 1) * self.cols + min(col, self.cols - 1)
        return row.clamp(max=self.rows - 1) * self.cols + col.clamp(max=self.cols - 1)


def check_grid(grid) -> tuple[int, int]:
    """Return `grid` as (H_img, W_img) or raise ValueError."""
    ok = isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(n, int) and n >= 1 for n in grid)
    if not ok:
        raise ValueError(f"grid={grid!r} is not a pair (height, width) of positive integers, such as (32, 32)")
    return tuple(grid)


@lru_cache(maxsize=256)
def window(pattern: str, grid: tuple[int, int], conv_size: int = 11) -> Window:
    """The box window of `pattern` on an image of `grid` = (H_img, W_img) slots.

    `conv_size` is the odd side of the `conv` window in slots and is ignored by the other patterns.
    Raises ValueError for an unknown pattern, an impossible grid or an even `conv_size`.
    """
    height, width = check_grid(grid)
    slots = height * width
    if pattern == "row":
        return Window(height, width, 0, width - 1)
    if pattern == "row_wrap":
        return Window(1, slots, 0, min(width, slots - 1))
    if pattern == "column":
        return Window(height, width, height - 1, 0)
    if pattern == "conv":
        if not isinstance(conv_size, int) or conv_size < 1 or conv_size % 2 == 0:
            raise ValueError(f"conv_size={conv_size!r} must be an odd positive integer, such as 11: the window is centred")
        half = conv_size // 2
        return Window(height, width, min(half, height - 1), min(half, width - 1))
    if pattern == "dense":
        return Window(1, slots, 0, slots - 1)
    raise ValueError(f"pattern={pattern!r} is unknown; use one of {', '.join(PATTERNS)}")


def visible(view: Window, text_slots: int, query, key, text_len, text_prefix, image_is_target):
    """May slot `query` see slot `key`? The rule of the canonical sequence (UniLM: target sees source and its own past).

    All of `query`, `key` (slots of the whole sequence, 0 .. S-1), `text_len`, `text_prefix`, `image_is_target` are
    integers or broadcasting integer tensors; the answer is a bool (tensor). Slots of padding see and are seen by nobody.
    Usable as FlexAttention's `mask_mod`.
    """
    text_query, image_query = (query < text_slots) & (query < text_len), query >= text_slots
    text_key, image_key = (key < text_slots) & (key < text_len), key >= text_slots
    source_image = image_is_target == 0
    text_text = text_query & text_key & ((key < text_prefix) | ((query >= text_prefix) & (key <= query)))
    text_image = text_query & image_key & source_image
    image_text = image_query & text_key & (key < text_prefix)
    joined = view.joins(query - text_slots, key - text_slots)
    image_image = image_query & image_key & joined & ((key <= query) | source_image)
    return text_text | text_image | image_text | image_image


def image_joined(pattern: str, grid: tuple[int, int], conv_size: int, query_slot: int, key_slot: int) -> bool:
    """Does the pattern join two image slots (0 .. N-1), causality aside?"""
    return bool(window(pattern, tuple(grid), conv_size).joins(query_slot, key_slot))


def image_mask(pattern: str, grid: tuple[int, int], *, conv_size: int = 11, causal: bool, device=None) -> torch.Tensor:
    """Bool [N, N]: image slot (row of the matrix) sees image slot (column). `causal` = the image is the target."""
    view = window(pattern, tuple(grid), conv_size)
    slots = torch.arange(view.num_slots, device=device)
    mask = view.joins(slots[:, None], slots[None, :])
    return mask & (slots[None, :] <= slots[:, None]) if causal else mask


def dense_mask(
    pattern: str,
    grid: tuple[int, int],
    text_slots: int,
    text_len: torch.Tensor,
    text_prefix: torch.Tensor,
    image_is_target: torch.Tensor,
    *,
    conv_size: int = 11,
    query_slots: torch.Tensor | None = None,
    key_slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bool [B, S, S] on the device of `text_len`: slot (second axis) sees slot (last axis).

    `text_len`, `text_prefix`, `image_is_target`: integer tensors [B]. Rows and columns of padding text slots are False.
    `query_slots` [Q] and `key_slots` [K] restrict the mask to those rows and columns: bool [B, Q, K].
    """
    view = window(pattern, tuple(grid), conv_size)
    slots = torch.arange(text_slots + view.num_slots, device=text_len.device)
    query = (slots if query_slots is None else query_slots)[None, :, None]
    key = (slots if key_slots is None else key_slots)[None, None, :]
    per_sample = (t.view(-1, 1, 1) for t in (text_len, text_prefix, image_is_target))
    return visible(view, text_slots, query, key, *per_sample)


def visible_image_slots(pattern: str, grid: tuple[int, int], slot: int, *, conv_size: int = 11) -> list[int]:
    """Image slots <= `slot` that image slot `slot` reads when the image is the target, in raster order."""
    view = window(pattern, tuple(grid), conv_size)
    _check_slot("slot", slot, view.num_slots - 1)
    row, col = divmod(slot, view.cols)
    rows = range(max(row - view.reach_rows, 0), row + 1)
    cols = range(max(col - view.reach_cols, 0), min(col + view.reach_cols, view.cols - 1) + 1)
    return [r * view.cols + c for r in rows for c in cols if r * view.cols + c <= slot]


def kept_image_slots(pattern: str, grid: tuple[int, int], next_slot: int, *, conv_size: int = 11) -> list[int]:
    """Slots < `next_slot` that some slot >= `next_slot` still reads: what the KV cache must hold, in raster order."""
    view = window(pattern, tuple(grid), conv_size)
    _check_slot("next_slot", next_slot, view.num_slots)
    first = max(next_slot - view.reach, 0)
    return [slot for slot in range(first, next_slot) if view.last_reader(slot) >= next_slot]


def cache_capacity(pattern: str, grid: tuple[int, int], *, conv_size: int = 11) -> int:
    """Entries of the smallest ring buffer (slot n lives in entry n mod capacity) that never overwrites a kept slot.

    The new slot's own key and value are written before it reads, so they are counted.
    row: W, row_wrap: W + 1, column: (H-1)*W + 1, conv: (k//2)*(W+1) + 1, dense: N; never more than N.
    """
    view = window(pattern, tuple(grid), conv_size)
    return min(view.reach + 1, view.num_slots)


def _check_slot(name: str, slot: int, last: int) -> None:
    if not 0 <= slot <= last:
        raise ValueError(f"{name}={slot} is outside 0 .. {last}")
