"""How the Triton kernels are launched: tiles, warps, pipeline stages and register limits, by head width, type and device."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from kernels.attention.tiles import BLOCK
from kernels.patterns import PATTERNS, Window, window
from kernels.runtime import LaunchConfig

GATED_SIDES = (32, 64, 96, 128)
KEY_GRADIENTS = ("text_key_gradient", "image_key_gradient")
HOPPER = {  # 16 bits, 64 channels: the fastest of those tried on an H200, with the kernels of then (README)
    "forward": LaunchConfig(4, 3, BLOCK, 128),
    "closed_forward": LaunchConfig(4, 2, BLOCK, 128),  # not timed: a stage less, for the tile's own keys
    "query_gradient": LaunchConfig(4, 3, BLOCK // 2, 128),
    "closed_gradient": LaunchConfig(4, 2, BLOCK // 2, 168),
    "text_key_gradient": LaunchConfig(4, 3, BLOCK // 2, 128),
    "image_key_gradient": LaunchConfig(4, 2, BLOCK // 2, 168),  # three programs a multiprocessor; timed without a limit
}


@lru_cache(maxsize=256)
def gated(view: Window) -> bool:
    """Is it the view of a grid (and, for `conv`, of the usual window of 11) that the compile gate compiles with a register
    limit?"""
    return any(view == window(pattern, (side, side)) for pattern in PATTERNS for side in GATED_SIDES)


def launch_config(kernel: str, block_d: int, itemsize: int, capability: int, view: Window) -> LaunchConfig:
    """Warps, pipeline stages and register limit of `forward`, `closed_forward` (of closed tiles), `query_gradient`,
    `closed_gradient` (also gives dK and dV), `text_key_gradient` and `image_key_gradient`; the compile gate checks that
    none spills.

    `capability`: 90 for Hopper, 80 for all others (`runtime.device_capability`). Four warps run a 64 x 64 tile as one warp group of
    Hopper's; the gradients of Ampere spill registers with four.
    """
    config = _usual_config(kernel, block_d, itemsize, capability)
    if gated(view):
        return config
    # Masks of odd tiles take more registers: under a limit some of these kernels spill, and ptxas crashes on some, on grids of
    # less than a tile also because of prefetching. Ampere's have no limit to lift: shorter steps keep them from spilling, and the
    # closed gradient spills without prefetching.
    hopper = capability >= 90
    plain = view.num_slots < BLOCK and (hopper or kernel != "closed_gradient")
    return replace(
        config,
        registers=None,
        num_stages=1 if plain else config.num_stages,
        chunk=config.chunk if hopper else min(config.chunk, BLOCK // 2),
    )


def _usual_config(kernel: str, block_d: int, itemsize: int, capability: int) -> LaunchConfig:
    if itemsize == 4:
        return LaunchConfig(8, 1, BLOCK // 4)
    if capability >= 90 and block_d == 64:
        return HOPPER[kernel]
    # kernels with two more accumulators, and narrow heads, to which ptxas grants few registers, spill in steps of 64
    chunk = BLOCK // 2 if kernel in (*KEY_GRADIENTS, "closed_gradient") or block_d <= 32 else BLOCK
    if kernel == "query_gradient" and block_d <= 32 and capability < 90:
        return LaunchConfig(8, 1, chunk)
    if block_d >= 128 or (not kernel.endswith("forward") and capability < 90):
        return LaunchConfig(8, 2, chunk)
    return LaunchConfig(4, 2, chunk)


def has_room(channels: int, itemsize: int, capability: int) -> bool:
    """Are there registers for closed tiles and for the split of a range into whole chunks and a rest?"""
    if itemsize == 4:
        return channels <= 32
    return capability >= 90 or channels <= 64


def tile_size(dtype: torch.dtype, channels: int) -> int:
    """Slots of a tile. fp32 operands are split into TF32 parts held in registers: they spill in tiles of 64, and wide
    heads in tiles of 32.

    fp64 runs in the interpreter only and takes the tiles and chunks of bf16: its exact tests cover what trains.
    """
    if dtype != torch.float32:
        return BLOCK
    return BLOCK // 2 if channels <= 64 else BLOCK // 4
