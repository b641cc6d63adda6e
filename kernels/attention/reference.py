"""Attention by a dense mask, softmax in fp32 (fp64 for fp64 inputs): what every faster path is compared with.

Legend: B samples, H heads, T text slots, S = T + H_img*W_img slots, D channels a head.
"""

from __future__ import annotations

import torch

from kernels.patterns import dense_mask


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    grid: tuple[int, int],
    pattern: str,
    text_len: torch.Tensor,
    text_prefix: torch.Tensor,
    image_is_target: torch.Tensor,
    conv_size: int = 11,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale, masked) v with every score written out. Same call as `sparse_attention`; any device.

    q, k, v: [B, H, S, D]. Computed in fp64 for fp64 inputs, else in fp32, and returned in the dtype of `q`.
    Rows that see nothing (padding) are zero and pass no gradient.
    """
    text_slots = q.shape[2] - grid[0] * grid[1]
    mask = dense_mask(pattern, grid, text_slots, text_len, text_prefix, image_is_target, conv_size=conv_size)[:, None]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.to(compute) @ k.to(compute).transpose(-1, -2) * scale  # [B, H, S, S]
    seen = mask.any(-1, keepdim=True)
    probabilities = scores.masked_fill(~mask & seen, float("-inf")).softmax(-1).masked_fill(~seen, 0)
    return (probabilities @ v.to(compute)).to(q.dtype)
