"""Launching the Triton kernels, as `torch.library` custom ops: `torch.compile` and activation checkpointing see one op.

Legend: B samples, H heads, T text slots, S = T + rows*cols slots of the window's view, D channels a head.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import runtime
from kernels.attention.tiles import choose_tile
from kernels.attention.triton_forward import forward_kernel
from kernels.attention.triton_key_gradient import image_key_gradient_kernel, text_key_gradient_kernel
from kernels.attention.triton_query_gradient import query_gradient_kernel
from kernels.attention.triton_settings import has_room, launch_config, tile_size
from kernels.patterns import Window
from kernels.triton_rounding import INTERPRETED

LOG2_E = 1.0 / math.log(2.0)
CHUNK_SLOTS = 1024  # image queries one program adds up for a tile of text keys


def kernel_constants(channels: int, scale: float, view: Window, dtype: torch.dtype) -> dict:
    """The constexpr arguments that depend on neither the device nor the kernel."""
    tile = choose_tile(view, tile_size(dtype, channels))
    sides = (view.rows, view.cols), (view.reach_rows, view.reach_cols), (tile.rows, tile.cols), (view.cols, 1)
    if view.reach_cols == 0 < view.reach_rows:  # columns are the rows of the image turned on its side
        sides = [pair[::-1] for pair in sides]
    names = ("ROWS", "COLS", "REACH_ROWS", "REACH_COLS", "TILE_ROWS", "TILE_COLS", "ROW_STEP", "COL_STEP")
    return {
        "QK_SCALE": scale * LOG2_E,
        "D": channels,
        "BLOCK_D": max(16, 1 << (channels - 1).bit_length()),
        **dict(zip(names, chain(*sides))),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
    }


def triton_attention(q, k, v, text_len, text_prefix, image_is_target, *, view: Window, scale: float) -> Tensor:
    """Attention of q, k, v [B, H, S, D] by the Triton kernels; arguments as checked by `sparse_attention`."""
    window = [view.rows, view.cols, view.reach_rows, view.reach_cols]
    return attention_forward(q, k, v, text_len, text_prefix, image_is_target, window, scale)[0]


def _heads_last(x: Tensor) -> Tensor:
    """Empty [B, H, S, D] whose memory is [B, S, H, D]: joining the heads afterwards is free."""
    batch, heads, slots, channels = x.shape
    return x.new_empty(batch, slots, heads, channels).transpose(1, 2)


def _statistics(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


class _Launch:
    """What the launches of one call have in common."""

    def __init__(self, tensors: tuple[Tensor, ...], window: list[int], scale: float):
        q = tensors[0]
        self.view = Window(*window)
        self.text_slots = q.shape[2] - self.view.num_slots
        self.tile_slots = tile_size(q.dtype, q.shape[-1])
        self.text_tiles = -(-self.text_slots // self.tile_slots)
        tile = choose_tile(self.view, self.tile_slots)
        self.image_tiles = tile.count(self.view)
        self.programs = q.shape[0] * q.shape[1]
        self.itemsize = q.element_size()
        if max(x.stride(2) for x in tensors) * q.shape[2] >= 2**31:
            raise ValueError(f"a head's {q.shape[2]} slots span 2**31 elements or more; pass smaller strides")
        self.constants = kernel_constants(q.shape[-1], scale, self.view, q.dtype)
        self.capability = runtime.device_capability(q.device)
        roomy = has_room(q.shape[-1], self.itemsize, self.capability)
        self.closed = roomy and tile.closed(self.view)
        sizes = self.constants
        whole_rows = sizes["REACH_ROWS"] == 0 and sizes["REACH_COLS"] >= sizes["COLS"] - 1
        # of whole rows, in a tile of one: what comes before it (for its keys: after it) needs no mask
        self.constants.update(CLOSED=self.closed, SPLIT=roomy, LONG_ROWS=roomy and whole_rows and sizes["TILE_ROWS"] == 1)
        # Ampere's closed gradient holds the tile's own keys instead of a second copy of the loop over the text
        self.split_gradient = roomy and (self.capability >= 90 or not self.closed)
        self.sizes = (q.shape[1], q.shape[2], self.text_slots, self.text_tiles)
        self.device = torch.cuda.device(q.device) if q.is_cuda else nullcontext()

    def run(self, name: str, kernel, tiles: int, *args, **constants) -> None:
        config = launch_config(name, self.constants["BLOCK_D"], self.itemsize, self.capability, self.view)
        sizes = dict(BLOCK_N=config.chunk, M=self.tile_slots, IMAGE_SLOTS=self.view.num_slots)
        constants = self.constants | sizes | constants
        with self.device:
            runtime.start_kernel(kernel, (self.programs, tiles), args, _own(kernel, constants), config)


def _own(kernel, constants: dict) -> dict:
    """Those of `constants` that the kernel takes."""
    return {name: constants[name] for name in kernel.arg_names if name in constants}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


@torch.library.custom_op("vilg_kernels::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, text_len: Tensor, text_prefix: Tensor, image_is_target: Tensor,
    window: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, H, S, D] and log2 denominators [B, H, S]. `window`: the four fields of `patterns.Window`."""
    launch = _Launch((q, k, v), window, scale)
    text_len, text_prefix, image_is_target = (x.contiguous() for x in (text_len, text_prefix, image_is_target))
    out, lse = _heads_last(q), _statistics(q)
    launch.run(
        "closed_forward" if launch.closed else "forward", forward_kernel, launch.text_tiles + launch.image_tiles,
        q, k, v, out, lse, text_len, text_prefix, image_is_target, *_strides(q, k, v, out), *launch.sizes,
    )  # fmt: skip
    return out, lse


@attention_forward.register_fake
def _(q, k, v, text_len, text_prefix, image_is_target, window, scale):
    return _heads_last(q), _statistics(q)


@torch.library.custom_op("vilg_kernels::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    text_len: Tensor, text_prefix: Tensor, image_is_target: Tensor, window: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv [B, H, S, D]; deterministic."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()  # an expanded gradient, as sum().backward() makes it
    launch = _Launch((q, k, v, out, grad), window, scale)
    dq, dk, dv = (_heads_last(x) for x in (q, k, v))
    delta = torch.empty_like(lse)
    samples = tuple(x.contiguous() for x in (text_len, text_prefix, image_is_target))
    launch.run(
        "closed_gradient" if launch.closed else "query_gradient", query_gradient_kernel,
        launch.text_tiles + launch.image_tiles,
        q, k, v, out, grad, lse, delta, dq, dk, dv, *samples, *_strides(q, k, v, out, grad, dq, dk, dv), *launch.sizes,
        SPLIT=launch.split_gradient, SCALE=scale,
    )  # fmt: skip
    keys = (q, k, v, grad, lse, delta, dk, dv)
    strides = (*_strides(q, k, v, grad, dk, dv), *q.shape[1:3], launch.text_slots)
    if not launch.closed:
        launch.run(
            "image_key_gradient", image_key_gradient_kernel, launch.image_tiles, *keys, *samples, *strides, SCALE=scale
        )
    if launch.text_slots:
        chunks = -(-launch.view.num_slots // CHUNK_SLOTS)
        text_shape = (chunks, *q.shape[:2], launch.text_slots, q.shape[-1])
        parts = [lse.new_empty(text_shape) for _ in range(2)] if chunks > 1 else [dk, dv]
        launch.run(
            "text_key_gradient", text_key_gradient_kernel, launch.text_tiles * chunks,
            *keys, *parts, *samples[:2], *strides, CHUNKS=chunks, CHUNK_SLOTS=CHUNK_SLOTS, SCALE=scale,
        )  # fmt: skip
        if chunks > 1:
            for whole, part in zip((dk, dv), parts):
                whole[:, :, : launch.text_slots] = part.sum(0)
    return dq, dk, dv


@attention_backward.register_fake
def _(grad, q, k, v, out, lse, text_len, text_prefix, image_is_target, window, scale):
    return _heads_last(q), _heads_last(k), _heads_last(v)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _grad_lse):
    q, k, v, text_len, text_prefix, image_is_target, out, lse = ctx.saved_tensors
    grads = attention_backward(
        grad, q, k, v, out, lse, text_len, text_prefix, image_is_target, ctx.window, ctx.scale
    )
    return *grads, None, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)
