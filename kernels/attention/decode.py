"""Decoding: the one new image slot of every sequence against its text prefix and the cache entries its pattern reads.

The image cache of a layer is a ring of C = `patterns.cache_capacity` entries: slot n lives in entry n mod C, and nothing
that is still read is ever overwritten. What a slot reads is a box of the window's view in closed form, so no index
tables are kept. Text and image -> text decoding read everything: there torch's own attention does.

Legend: B sequences = samples x G candidates that share a text prefix, H heads, T text slots, C ring entries, D channels.
"""

from __future__ import annotations

import torch

from kernels.patterns import Window, cache_capacity, check_grid, window


def decode_attention(
    q: torch.Tensor,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    image_k: torch.Tensor,
    image_v: torch.Tensor,
    *,
    grid: tuple[int, int],
    pattern: str,
    text_prefix: torch.Tensor,
    image_slot: torch.Tensor,
    conv_size: int = 11,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention output [B, H, D] of image slot `image_slot[b]` of every sequence; text -> image, no gradient.

    q: [B, H, D]. text_k, text_v: [B / G, H, T, D]; sequences b*G .. b*G + G - 1 share sample b's text.
    image_k, image_v: [B, H, C, D] rings that already hold the new slot's own key and value.
    text_prefix: int32 [B / G], readable text slots. image_slot: int32 [B], 0 .. N - 1 (not checked on a GPU: no sync).
    Raises ValueError for shapes and dtypes that do not fit.
    """
    view = window(pattern, check_grid(grid), conv_size)
    capacity = cache_capacity(pattern, tuple(grid), conv_size=conv_size)
    _check(q, text_k, text_v, image_k, image_v, text_prefix, image_slot, capacity)
    if not q.is_cuda and not bool(((image_slot >= 0) & (image_slot < view.num_slots)).all()):
        raise ValueError(f"image_slot={image_slot.tolist()} leaves 0 .. {view.num_slots - 1}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    from kernels.attention.op import can_run_triton

    if can_run_triton(q):
        from kernels.attention.triton_decode import decode

        shape = [view.rows, view.cols, view.reach_rows, view.reach_cols]
        return decode(q, text_k, text_v, image_k, image_v, text_prefix, image_slot, shape, scale)
    return torch_decode(q, text_k, text_v, image_k, image_v, text_prefix, image_slot, view, scale)


def read_slots(view: Window, image_slot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots that each new slot may read, [B, R], and which of them it does read (bool): its causal box, row by row."""
    num_cols = min(2 * view.reach_cols + 1, view.cols)
    row, col = (image_slot // view.cols)[:, None, None], (image_slot % view.cols)[:, None, None]
    rows = row - torch.arange(view.reach_rows, -1, -1, device=image_slot.device)[None, :, None]
    cols = (col - view.reach_cols).clamp(min=0) + torch.arange(num_cols, device=image_slot.device)
    slots = (rows * view.cols + cols).flatten(1)
    new = image_slot[:, None]
    read = ((rows >= 0) & (cols < view.cols)).flatten(1) & (slots <= new) & view.joins(new, slots)
    return slots, read


def torch_decode(q, text_k, text_v, image_k, image_v, text_prefix, image_slot, view: Window, scale: float):
    """`decode_attention` in plain torch, any device: gathers the box where it is smaller than the ring."""
    batch, heads, channels = q.shape
    samples, text_slots, capacity = text_k.shape[0], text_k.shape[2], image_k.shape[2]
    slots, read = read_slots(view, image_slot)
    if slots.shape[1] < capacity:
        index = (slots % capacity)[:, None, :, None].expand(batch, heads, slots.shape[1], channels)
        image_k, image_v = image_k.gather(2, index), image_v.gather(2, index)
    else:
        entry = torch.arange(capacity, device=q.device)
        held = image_slot[:, None] - (image_slot[:, None] - entry) % capacity  # the slot each entry holds
        read = (held >= 0) & view.joins(image_slot[:, None], held)
    q_shared = (q * scale).view(samples, batch // samples, heads, channels).transpose(1, 2)  # [samples, H, G, D]
    text = q_shared @ text_k.transpose(-1, -2)
    unread = torch.arange(text_slots, device=q.device) >= text_prefix[:, None]
    text = text.masked_fill(unread[:, None, None], float("-inf")).transpose(1, 2).reshape(batch, heads, text_slots)
    image = ((q * scale)[:, :, None] @ image_k.transpose(-1, -2))[:, :, 0]
    image = image.masked_fill(~read[:, None], float("-inf"))
    compute = torch.promote_types(q.dtype, torch.float32)
    probabilities = torch.cat([text, image], -1).softmax(-1, dtype=compute).to(q.dtype)
    text_p = probabilities[..., :text_slots].view(samples, batch // samples, heads, text_slots).transpose(1, 2)
    out = (text_p @ text_v).transpose(1, 2).reshape(batch, heads, channels)
    unread_image = (~read)[:, None, :, None]
    return out + (probabilities[:, :, None, text_slots:] @ image_v.masked_fill(unread_image, 0))[:, :, 0]


def _check(q, text_k, text_v, image_k, image_v, text_prefix, image_slot, capacity: int) -> None:
    if q.dim() != 3 or text_k.dim() != 4 or image_k.dim() != 4:
        raise ValueError(
            f"q {tuple(q.shape)}, text_k {tuple(text_k.shape)}, image_k {tuple(image_k.shape)}; "
            "expected [B, H, D], [B / G, H, T, D], [B, H, C, D]"
        )
    batch, heads, channels = q.shape
    samples = text_k.shape[0]
    if samples == 0 or batch % samples:
        raise ValueError(f"q has {batch} sequences, text_k {samples} samples; the first must be a multiple of the second")
    expected = {
        "text_k": (text_k, (samples, heads, text_k.shape[2], channels)),
        "text_v": (text_v, (samples, heads, text_k.shape[2], channels)),
        "image_k": (image_k, (batch, heads, capacity, channels)),
        "image_v": (image_v, (batch, heads, capacity, channels)),
        "text_prefix": (text_prefix, (samples,)),
        "image_slot": (image_slot, (batch,)),
    }
    for name, (x, shape) in expected.items():
        dtype = torch.int32 if len(shape) == 1 else q.dtype
        if tuple(x.shape) != shape or x.dtype != dtype or x.device != q.device:
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}; needed {shape} {dtype} on {q.device}")
        if x.dim() == 4 and x.stride(-1) != 1:
            raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension; call {name}.contiguous() first")
