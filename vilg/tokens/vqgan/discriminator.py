"""The patch discriminator and what it learns from. Images are float [B, 3, H, W] in [-1, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDEST = 8  # channels grow to so many times the first layer's


def patch_discriminator(width: int, layers: int, *, seed: int) -> nn.Sequential:
    """Images -> a logit for each patch [B, 1, h, w] (PatchGAN: Isola 2017, arXiv 1611.07004, appendix, as in taming).

    width: channels of the first layer; layers: halvings of the sides. Weights are drawn from `seed` alone. Without batch
    normalisation, which makes a verdict depend on the other images of its rank, and which the gradient penalty R1 does
    not get along with; R1 keeps the logits in bounds instead.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found: list[nn.Module] = []
        channels = 3
        for layer in range(layers):
            wider = width * min(2**layer, _WIDEST)
            found += [nn.Conv2d(channels, wider, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            channels = wider
        found += [nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(channels, 1, 3, padding=1)]
        return nn.Sequential(*found)


def hinge_loss(real: Tensor, decoded: Tensor) -> Tensor:
    """Of logits of real and decoded images: mean of max(0, 1 - real) and max(0, 1 + decoded) (arXiv 1705.02894)."""
    return (F.relu(1 - real).mean() + F.relu(1 + decoded).mean()) / 2


def r1_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """|d D(x) / dx|^2 at real images, mean over the batch, D(x) the mean logit (Mescheder 2018, arXiv 1801.04406, eq. 9).

    With a graph, to be minimised. Lazily, every n-th step, it is multiplied by n (StyleGAN2, arXiv 1912.04958, appendix B).
    """
    images = images.detach().requires_grad_()
    verdict = discriminator(images).mean((1, 2, 3)).sum()
    (slope,) = torch.autograd.grad(verdict, images, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()
