"""Packed projections the tests of `split_heads` run on, and the formula written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NAMES = ("q", "k", "v", "dqkv", "dq_weight", "dk_weight")


def packed(batch: int, slots: int, heads: int, channels: int, *, seed: int = 0, device="cpu") -> list[Tensor]:
    """qkv [B, S, H, 3, D] whose mean is not zero, both weights [D], and gradients of q, k, v [B, H, S, D], in fp64; the last
    three lie in memory in three ways."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    qkv = 2 * draw(batch, slots, heads, 3, channels) + 0.5
    gradients = (draw(batch, slots, heads, channels).transpose(1, 2), draw(batch, heads, slots, channels))
    expanded = draw(batch, heads, slots, 1).expand(batch, heads, slots, channels)
    return [qkv, draw(channels), draw(channels), *gradients, expanded]


def written_out(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *, kind: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As the papers write it: layer norm (1607.06450), root-mean-square norm (1910.07467)."""
    found = []
    for part, weight in enumerate((q_weight, k_weight)):
        x = qkv[:, :, :, part]
        if kind == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        found.append((x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight).permute(0, 2, 1, 3))
    return *found, qkv[:, :, :, 2].permute(0, 2, 1, 3)


def results(function: Callable, inputs: list[Tensor], dtype: torch.dtype, **options) -> list[Tensor]:
    """q, k, v and the gradients of qkv and both weights, in `dtype`."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs[:3]]
    out = function(*leaves, **options)
    gradients = [x.to(dtype) for x in inputs[3:]]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, gradients)]


def largest_errors(found: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """Of each result, relative to its largest number; infinite where one is not finite."""
    errors = {}
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        assert a.shape == b.shape, name
        error = ((a.double() - b).abs().max() / b.abs().max()).item()
        errors[name] = error if a.isfinite().all() else float("inf")
    return errors
