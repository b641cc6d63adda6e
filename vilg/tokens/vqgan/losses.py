"""What a reconstruction costs, and how good it is. Images are float [B, 3, H, W] in [-1, 1]."""

import math

import torch
import torch.nn.functional as F
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


def ssim(output: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each pair, float64 [B], 1 for equal images (Wang 2004, doi 10.1109/TIP.2003.819861, eq. 13).

    With the authors' constants: Gaussian window of 11 x 11 and deviation 1.5, K1 = 0.01, K2 = 0.03, dynamic range 2; every
    colour on its own, mean over colours and all places where the window fits. Smaller images get the largest odd window.
    """
    size = min(11, (min(images.shape[2:]) - 1) // 2 * 2 + 1)
    bell = torch.exp(-((torch.arange(size, dtype=torch.float64, device=images.device) - size // 2) ** 2) / (2 * 1.5**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2
    x, y = (t.double().flatten(0, 1)[:, None] for t in (output, images))  # [B * 3, 1, H, W]
    mean_x, mean_y = F.conv2d(x, window), F.conv2d(y, window)
    var_x, var_y = F.conv2d(x * x, window) - mean_x**2, F.conv2d(y * y, window) - mean_y**2
    together = F.conv2d(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * together + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return alike.reshape(len(images), -1).mean(1)


def code_use(counts: Tensor) -> tuple[int, float]:
    """(codes that occur, perplexity) from counts [K]: perplexity = exp(entropy), the number of equally frequent codes
    that would be as hard to guess."""
    share = counts[counts > 0].double() / counts.sum()
    return int(share.numel()), float(torch.exp(-(share * share.log()).sum()))
