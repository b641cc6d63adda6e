"""Batches the attention tests run on: directions, lengths and poisoned memory."""

from __future__ import annotations

import torch

from kernels.attention.reference import reference_attention


def samples(direction: str, text_slots: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Three samples (text_len, text_prefix, image_is_target): empty, full and some length, in one direction or mixed."""
    some = int(torch.randint(0, text_slots + 1, (1,), generator=torch.Generator().manual_seed(seed)))
    lengths = [0, text_slots, some]
    if direction == "text_to_image":
        return [(n, n, 1) for n in lengths]
    if direction == "image_to_text":
        return [(n, 0, 0) for n in lengths]
    if direction == "question":
        return [(n, n // 2, 0) for n in lengths]
    assert direction == "mixed"
    return [(text_slots, text_slots, 1), (some, 0, 0), (text_slots, text_slots // 3, 0), (some, some, 1)]


def sample_tensors(batch: list[tuple[int, int, int]], device="cpu") -> dict[str, torch.Tensor]:
    columns = zip(*batch)
    names = ("text_len", "text_prefix", "image_is_target")
    return {name: torch.tensor(column, dtype=torch.int32, device=device) for name, column in zip(names, columns)}


def qkv(batch: int, heads: int, slots: int, channels: int, *, seed: int = 0, device="cpu") -> list[torch.Tensor]:
    """q, k, v and an output gradient [B, H, S, D] in fp64, q, k, v cut out of one packed projection."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, slots, 3, heads, channels, generator=generator, dtype=torch.float64).to(device)
    grad = torch.randn(batch, heads, slots, channels, generator=generator, dtype=torch.float64).to(device)
    return [*packed.permute(2, 0, 3, 1, 4), grad]


def output_and_gradients(function, q, k, v, grad, **call) -> list[torch.Tensor]:
    """[out, dq, dk, dv] of `function(q, k, v, **call)` for the output gradient `grad`."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves, **call)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_matches_reference(function, inputs, dtype, tolerance: float, **call) -> None:
    """Output and every gradient in `dtype` against the dense reference in fp64, relative to its largest entry."""
    got = output_and_gradients(function, *(t.to(dtype) for t in inputs), **call)
    want = output_and_gradients(reference_attention, *inputs, **call)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), got, want):
        assert ours.dtype == dtype, name
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1)
        assert torch.isfinite(ours).all() and error <= tolerance, f"{name}: error {error:.2e} > {tolerance:.0e}"
