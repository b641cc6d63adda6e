"""Sparse attention on CPU tensors in plain torch: many small dense attentions instead of one large masked one.

A plan (made once per batch, shared by all layers of one pattern) cuts the queries into pieces that together read little
more than what their pattern allows:

- `Band`: a contiguous range of query slots against the leading text keys and one contiguous range of image keys, with an
  additive bias. The text queries are one band; `conv`, `row_wrap` and `dense` images are a few.
- `Lines`: all rows (or columns) of the image at once, each against the text source and itself: one batched matmul,
  text and image logits in one softmax.
- Up to `WHOLE_SLOTS` slots (the demo's 16 + 8x8) a single band over the whole sequence, whose matmuls are already tiny:
  torch's fused attention with the mask in fp32, plain matmuls in bf16.

Padding is trimmed: only text slots below the batch's longest text are queries, only those below its longest source are
keys of the image. Autograd would fill a zero tensor for every slice taken; one Function that writes into whole
gradients avoids that.

Legend: B samples, H heads, T text slots, N image slots, S = T + N, D channels; G lines of L slots; P leading text keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.patterns import dense_mask, window

BAND_QUERIES = 128  # image queries a band; larger reads more keys in vain, smaller means more calls (measured, README)
WHOLE_SLOTS = 160  # up to so many slots one masked attention over everything beats any cut (measured, README)


@dataclass(frozen=True)
class Band:
    """Query slots [start, stop) see text keys [0, text_keys) and image keys [key_start, key_stop), all whole-sequence slots."""

    start: int
    stop: int
    text_keys: int
    key_start: int
    key_stop: int
    bias: torch.Tensor | None  # [B or 1, 1, Q, text_keys + image keys], 0 or -inf; None: all visible


@dataclass(frozen=True)
class Lines:
    """Every line of the image sees text keys [0, text_keys) and itself."""

    columns: bool
    num_lines: int
    length: int
    text_keys: int
    bias: torch.Tensor | None  # [B or 1, 1, 1, L, text_keys + L]


@dataclass(frozen=True)
class CpuPlan:
    """How the CPU path cuts one batch. `padding`: bool [B, 1, T, 1] of text rows to be zeroed, None if there are none."""

    text_slots: int
    whole: bool  # one band over the whole sequence
    pieces: tuple[Band | Lines, ...]
    padding: torch.Tensor | None


def cpu_plan(
    pattern: str,
    grid: tuple[int, int],
    text_slots: int,
    text_len: torch.Tensor,
    text_prefix: torch.Tensor,
    image_is_target: torch.Tensor,
    *,
    conv_size: int,
    dtype: torch.dtype,
) -> CpuPlan:
    """Cut one batch; the three integer tensors [B] are read here (CPU), never again."""
    view = window(pattern, grid, conv_size)
    longest, source = (int(t.max()) if text_slots else 0 for t in (text_len, text_prefix))
    any_source_image = bool((image_is_target == 0).any())
    stop = text_slots + view.num_slots
    device = text_len.device

    def slots(first: int, last: int) -> torch.Tensor:
        return torch.arange(first, last, device=device)

    def bias_of(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        mask = dense_mask(
            pattern, grid, text_slots, text_len, text_prefix, image_is_target,
            conv_size=conv_size, query_slots=queries, key_slots=keys,
        )  # fmt: skip
        mask[..., 0] |= ~mask.any(-1)  # an empty row (padding) sees something: no NaN; its output is zeroed afterwards
        if bool((mask == mask[:1]).all()):
            mask = mask[:1]
        if bool(mask.all()):
            return None
        return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, float("-inf"))[:, None]

    def band(start: int, end: int, text_keys: int, key_start: int, key_stop: int) -> Band:
        keys = torch.cat([slots(0, text_keys), slots(key_start, key_stop)])
        return Band(start, end, text_keys, key_start, key_stop, bias_of(slots(start, end), keys))

    pieces: list[Band | Lines] = []
    whole = stop <= WHOLE_SLOTS
    if whole:
        pieces.append(band(0, stop, text_slots, text_slots, stop))
    elif longest:
        pieces.append(band(0, longest, longest, text_slots, stop if any_source_image else text_slots))
    if not whole and pattern in ("row", "column"):
        columns = pattern == "column"
        num_lines, length = (grid[1], grid[0]) if columns else grid
        line = text_slots + slots(0, length) * (grid[1] if columns else 1)  # the first line stands for all
        bias = bias_of(line, torch.cat([slots(0, source), line]))
        pieces.append(Lines(columns, num_lines, length, source, None if bias is None else bias[:, :, None]))
    elif not whole:
        for first in range(0, view.num_slots, BAND_QUERIES):
            last = min(first + BAND_QUERIES, view.num_slots)
            key_last = min(last + view.reach, view.num_slots) if any_source_image else last
            key_first = max(first - view.reach, 0)
            pieces.append(
                band(text_slots + first, text_slots + last, source, text_slots + key_first, text_slots + key_last)
            )
    padding = None
    if text_slots and int(text_len.min()) < text_slots:
        padding = (slots(0, text_slots) >= text_len[:, None])[:, None, :, None]
    return CpuPlan(text_slots, whole, tuple(pieces), padding)


def cpu_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: CpuPlan, scale: float) -> torch.Tensor:
    """Attention of q, k, v [B, H, S, D] (any strides, one floating dtype) by `plan`; returns [B, H, S, D]."""
    if plan.whole and q.dtype != torch.bfloat16:
        # one fused pass that packs nothing; in bf16 it is three times slower than the matmuls below
        bias = plan.pieces[0].bias
        out = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype), scale=scale)
        if plan.padding is None:
            return out
        keep = F.pad(~plan.padding, (0, 0, 0, q.shape[2] - plan.text_slots), value=True)
        return out * keep.to(q.dtype)  # a product: several times faster than masked_fill, and the rows are finite
    return _CpuAttention.apply(q, k, v, plan, scale)


class _CpuAttention(torch.autograd.Function):
    """Saves the probabilities of every piece: on a CPU a matmul and an exp cost more than reading them back."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # every matmul in the dtype of q, the backward's as well
    def forward(ctx, q, k, v, plan, scale):
        batch, heads, slots, channels = q.shape
        flat = (batch * heads, slots, channels)
        scaled = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        torch.mul(q, scale, out=scaled)  # scales and packs in one pass
        q, k, v = scaled.view(flat), k.reshape(flat), v.reshape(flat)
        out = q.new_empty(flat)
        saved = []
        for piece in plan.pieces:
            step = _lines_forward if isinstance(piece, Lines) else _band_forward
            saved.append(step(q, k, v, out, piece, plan.text_slots, heads))
        out = out.view(batch, heads, slots, channels)
        _zero_padding(out, plan)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.plan, ctx.scale, ctx.shape = plan, scale, (batch, heads, slots, channels)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, *saved = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        if ctx.plan.padding is not None:
            grad_out = grad_out.clone()
            _zero_padding(grad_out, ctx.plan)
        grad_out = grad_out.view(q.shape)
        if ctx.plan.whole:
            grads = _band_gradients(q, k, v, grad_out, saved[0], ctx.plan.pieces[0])
        else:
            grads = tuple(torch.zeros_like(t) for t in (q, k, v))  # padding and unseen keys stay exactly zero
            for piece, probabilities in zip(ctx.plan.pieces, saved):
                step = _lines_backward if isinstance(piece, Lines) else _band_backward
                step(q, k, v, grad_out, probabilities, grads, piece, ctx.plan.text_slots)
        grads[0].mul_(ctx.scale)
        return *(g.view(ctx.shape) for g in grads), None, None


def _zero_padding(x: torch.Tensor, plan: CpuPlan) -> None:
    if plan.padding is not None:
        x[:, :, : plan.text_slots].masked_fill_(plan.padding, 0)


def _softmax(logits: torch.Tensor, bias: torch.Tensor | None, heads: int) -> torch.Tensor:
    """Add the bias (its leading axis is B or 1, that of `logits` B * H) and normalise the last axis."""
    if bias is not None:
        logits.view(-1, heads, *logits.shape[1:]).add_(bias.to(logits.dtype))
    return logits.softmax(-1)


def _softmax_backward(grad: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """d logits = p * (dp - sum(p * dp)), torch's own fused kernel."""
    return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


def _band_keys(x: torch.Tensor, band: Band) -> torch.Tensor:
    """The band's keys or values [B*H, K, D], without a copy where they lie together."""
    if band.text_keys == 0 or band.key_start == band.key_stop:
        return x[:, band.key_start : band.key_stop] if band.text_keys == 0 else x[:, : band.text_keys]
    if band.text_keys == band.key_start:
        return x[:, : band.key_stop]
    return torch.cat([x[:, : band.text_keys], x[:, band.key_start : band.key_stop]], 1)


def _add_band(grad: torch.Tensor, part: torch.Tensor, band: Band) -> None:
    grad[:, : band.text_keys] += part[:, : band.text_keys]
    grad[:, band.key_start : band.key_stop] += part[:, band.text_keys :]


def _band_forward(q, k, v, out, band: Band, text_slots: int, heads: int) -> torch.Tensor:
    logits = torch.bmm(q[:, band.start : band.stop], _band_keys(k, band).transpose(1, 2))
    probabilities = _softmax(logits, band.bias, heads)
    rows = out[:, band.start : band.stop]
    if rows.is_contiguous():
        torch.bmm(probabilities, _band_keys(v, band), out=rows)
    else:
        rows.copy_(torch.bmm(probabilities, _band_keys(v, band)))
    return probabilities


def _band_gradients(q, k, v, grad_out, probabilities, band: Band) -> tuple[torch.Tensor, ...]:
    """Gradients of the band's queries, keys and values; that of the queries still lacks the scale."""
    rows = slice(band.start, band.stop)
    grad_values = torch.bmm(probabilities.transpose(1, 2), grad_out[:, rows])
    grad_logits = torch.bmm(grad_out[:, rows], _band_keys(v, band).transpose(1, 2))
    grad_logits = _softmax_backward(grad_logits, probabilities)
    return torch.bmm(grad_logits, _band_keys(k, band)), torch.bmm(grad_logits.transpose(1, 2), q[:, rows]), grad_values


def _band_backward(q, k, v, grad_out, probabilities, grads, band: Band, text_slots: int) -> None:
    grad_queries, grad_keys, grad_values = _band_gradients(q, k, v, grad_out, probabilities, band)
    grads[0][:, band.start : band.stop] = grad_queries
    _add_band(grads[1], grad_keys, band)
    _add_band(grads[2], grad_values, band)


def _split_lines(x: torch.Tensor, lines: Lines, text_slots: int) -> torch.Tensor:
    """Image part of x [B*H, S, D] as [B*H, G, L, D] contiguous lines."""
    image = x[:, text_slots:]
    if lines.columns:
        image = image.unflatten(1, (lines.length, lines.num_lines)).transpose(1, 2)
        return image.contiguous()
    return image.contiguous().unflatten(1, (lines.num_lines, lines.length))


def _join_lines(target: torch.Tensor, lines_part: torch.Tensor, lines: Lines, text_slots: int) -> None:
    """Write [B*H, G, L, D] back into the image part of `target` [B*H, S, D]."""
    image = target[:, text_slots:]
    if lines.columns:
        image.unflatten(1, (lines.length, lines.num_lines)).copy_(lines_part.transpose(1, 2))
    else:
        image.unflatten(1, (lines.num_lines, lines.length)).copy_(lines_part)


def _lines_forward(q, k, v, out, lines: Lines, text_slots: int, heads: int) -> torch.Tensor:
    shape = (-1, lines.length, q.shape[-1])
    q_lines, k_lines, v_lines = (_split_lines(t, lines, text_slots) for t in (q, k, v))
    logits = torch.bmm(q_lines.view(shape), k_lines.view(shape).transpose(1, 2)).view(*q_lines.shape[:3], lines.length)
    if lines.text_keys:
        text = torch.bmm(q_lines.flatten(1, 2), k[:, : lines.text_keys].transpose(1, 2))
        logits = torch.cat([text.view(*q_lines.shape[:3], lines.text_keys), logits], -1)
    probabilities = _softmax(logits, lines.bias, heads)  # [B*H, G, L, P + L]
    result = torch.bmm(probabilities[..., lines.text_keys :].flatten(0, 1), v_lines.view(shape)).view(q_lines.shape)
    if lines.text_keys:
        result = result.flatten(1, 2)
        result.baddbmm_(probabilities[..., : lines.text_keys].flatten(1, 2), v[:, : lines.text_keys])
        result = result.view(q_lines.shape)
    _join_lines(out, result, lines, text_slots)
    return probabilities


def _lines_backward(q, k, v, grad_out, probabilities, grads, lines: Lines, text_slots: int) -> None:
    grad_q, grad_k, grad_v = grads
    shape = (-1, lines.length, q.shape[-1])
    q_lines, k_lines, v_lines, go_lines = (_split_lines(t, lines, text_slots) for t in (q, k, v, grad_out))
    q_flat, k_flat, v_flat, go_flat = (t.view(shape) for t in (q_lines, k_lines, v_lines, go_lines))
    keys = lines.text_keys
    grad_probabilities = torch.bmm(go_flat, v_flat.transpose(1, 2)).view(*q_lines.shape[:3], lines.length)
    if keys:
        text = torch.bmm(go_lines.flatten(1, 2), v[:, :keys].transpose(1, 2)).view(*q_lines.shape[:3], keys)
        grad_probabilities = torch.cat([text, grad_probabilities], -1)
    grad_logits = _softmax_backward(grad_probabilities, probabilities)
    image_logits, image_p = (t[..., keys:].flatten(0, 1) for t in (grad_logits, probabilities))
    line_grad_q = torch.bmm(image_logits, k_flat).view(q_lines.shape).flatten(1, 2)
    if keys:
        text_logits, text_p = (t[..., :keys].flatten(1, 2) for t in (grad_logits, probabilities))
        line_grad_q.baddbmm_(text_logits, k[:, :keys])
        grad_k[:, :keys] += torch.bmm(text_logits.transpose(1, 2), q_lines.flatten(1, 2))
        grad_v[:, :keys] += torch.bmm(text_p.transpose(1, 2), go_lines.flatten(1, 2))
    line_grad_k = torch.bmm(image_logits.transpose(1, 2), q_flat).view(q_lines.shape)
    line_grad_v = torch.bmm(image_p.transpose(1, 2), go_flat).view(q_lines.shape)
    _join_lines(grad_q, line_grad_q.view(q_lines.shape), lines, text_slots)
    _add_lines(grad_k, line_grad_k, lines, text_slots)
    _add_lines(grad_v, line_grad_v, lines, text_slots)


def _add_lines(grad: torch.Tensor, part: torch.Tensor, lines: Lines, text_slots: int) -> None:
    image = grad[:, text_slots:]
    if lines.columns:
        image.unflatten(1, (lines.length, lines.num_lines)).add_(part.transpose(1, 2))
    else:
        image.unflatten(1, (lines.num_lines, lines.length)).add_(part)
