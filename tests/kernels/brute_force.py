"""The visibility rules as plain loops over pairs, written from the design text alone: the tests' independent witness."""

from __future__ import annotations

import torch

PATTERNS = ("row", "row_wrap", "column", "conv", "dense")


def joined(pattern: str, height: int, width: int, conv_size: int, query: int, key: int) -> bool:
    r, c = query // width, query % width
    r2, c2 = key // width, key % width
    if pattern == "row":
        return r == r2
    if pattern == "row_wrap":
        return -width <= query - key <= width
    if pattern == "column":
        return c == c2
    if pattern == "conv":
        return max(abs(r - r2), abs(c - c2)) <= (conv_size - 1) / 2
    return True


def sees(pattern, grid, conv_size, text_slots, length, prefix, image_is_target, query, key) -> bool:
    height, width = grid
    if query < text_slots and query >= length or key < text_slots and key >= length:
        return False  # padding
    if query < text_slots and key < text_slots:
        both_source, target_reads_source = query < prefix and key < prefix, query >= prefix and key < prefix
        return both_source or target_reads_source or (query >= prefix and prefix <= key <= query)
    if query < text_slots:
        return not image_is_target
    if key < text_slots:
        return key < prefix
    query, key = query - text_slots, key - text_slots
    return joined(pattern, height, width, conv_size, query, key) and (not image_is_target or key <= query)


def mask(pattern, grid, conv_size, text_slots, samples) -> torch.Tensor:
    """Bool [B, S, S]; `samples` = list of (text_len, text_prefix, image_is_target)."""
    slots = range(text_slots + grid[0] * grid[1])
    return torch.tensor(
        [[[sees(pattern, grid, conv_size, text_slots, *s, q, k) for k in slots] for q in slots] for s in samples]
    )
