"""What a reconstruction costs, and how good it is. Images are float [B, 3, H, W] in [-1, 1]."""

import math

import torch
from torch import Tensor

from vilg.tokens.vqgan.config import ReconstructionLossConfig


def reconstruction_loss(output: Tensor, images: Tensor, config: ReconstructionLossConfig) -> Tensor:
    """l1 * mean|e| + gradient * (mean|dx e| + mean|dy e|) + mse * mean e^2, with e = output - images.

    dx, dy are differences of neighbouring pixels: the gradient term punishes blurred edges, which the others forgive.
    """
    error = output - images
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return config.l1 * error.abs().mean() + config.gradient * (across + down) + config.mse * error.square().mean()


def psnr_db(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]: 10 log10(2^2 / mse)."""
    return 10 * math.log10(4 / max(mean_squared_error, 1e-12))


def code_use(counts: Tensor) -> tuple[int, float]:
    """(codes that occur, perplexity) from counts [K]: perplexity = exp(entropy), the number of equally frequent codes
    that would be as hard to guess."""
    share = counts[counts > 0].double() / counts.sum()
    return int(share.numel()), float(torch.exp(-(share * share.log()).sum()))
