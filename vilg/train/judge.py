"""What decoded pixels cost: distances to the image, and a discriminator that learns beside it.

Images fp32 [b, 3, S, S] in [-1, 1]. Losses are sums over images, of each image's mean: the parts of a global batch can be
added up, however it is split, since nothing in here normalises over images.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilg.config.schema import ReconstructorConfig
from vilg.train.beside import Beside
from vilg.train.step import ramp

_SCALES = 3  # of the edge loss: whole, half and quarter size


@dataclass(frozen=True)
class Verdict:
    """Sums over images, fp32 scalars, and gradients of those sums at the pixels [b, 3, S, S]; None: no adversary yet."""

    pixel_loss: Tensor
    pixel_gradient: Tensor
    adversarial_loss: Tensor
    adversarial_gradient: Tensor | None
    discriminator_loss: Tensor


class Judge:
    """The losses of `ReconstructorConfig`. trained: the discriminator, None without; active: it learns in this step;
    adversarial_weight: of this step, before `adaptive`."""

    def __init__(self, config: ReconstructorConfig, *, seed: int, device: torch.device) -> None:
        self.config = config
        self.trained: Beside | None = None
        self.active, self.adversarial_weight, self._penalised = False, 0.0, False
        adversary = config.adversarial
        if adversary.weight > 0:
            discriminator = patch_discriminator(adversary.width, adversary.layers, seed=seed).to(device)
            self.trained = Beside("discriminator", discriminator, betas=config.betas, grad_clip=adversary.grad_clip)

    def begin(self, step: int) -> None:
        """A new optimizer step."""
        adversary = self.config.adversarial
        self.active = self.trained is not None and step >= adversary.start_step
        if self.active:
            since = step - adversary.start_step + 1
            self.adversarial_weight = adversary.weight * ramp(since, adversary.ramp_steps)
            self._penalised = adversary.r1_weight > 0 and step % adversary.r1_every == 0
            self.trained.begin()

    def __call__(self, pixels: Tensor, images: Tensor, *, share: float) -> Verdict:
        """pixels: decoded, without a graph. share: what a sum is multiplied by to be the global batch's mean; the
        discriminator's gradients, which are added up here, are those of its mean loss."""
        count, none = len(images), pixels.new_zeros(())
        pixels = pixels.requires_grad_()
        loss = count * self._distance(pixels, images)
        (gradient,) = torch.autograd.grad(loss, pixels)
        if not self.active:
            return Verdict(loss.detach(), gradient, none, None, none)
        judged = count * self._discriminator_loss(pixels.detach(), images)
        (judged * share).backward()
        adversarial = -count * self.trained.module(pixels).mean()
        (adversarial_gradient,) = torch.autograd.grad(adversarial, pixels)
        return Verdict(loss.detach(), gradient, adversarial.detach(), adversarial_gradient, judged.detach())

    def _distance(self, pixels: Tensor, images: Tensor) -> Tensor:
        config, error = self.config, pixels - images
        loss = config.l1 * error.abs().mean() + config.mse * error.square().mean()
        return loss + config.perceptual * edge_loss(pixels, images) if config.perceptual else loss

    def _discriminator_loss(self, pixels: Tensor, images: Tensor) -> Tensor:
        """Hinge loss (Lim and Ye, 1705.02894), and in every `r1_every`-th step the penalty R1 (1801.04406, equation 9)."""
        images = images.requires_grad_(self._penalised)
        real, drawn = self.trained.module(images), self.trained.module(pixels)
        loss = (F.relu(1 - real).mean() + F.relu(1 + drawn).mean()) / 2
        if self._penalised:
            per_image = real.mean((1, 2, 3)).sum()
            (slope,) = torch.autograd.grad(per_image, images, create_graph=True)
            adversary = self.config.adversarial
            loss = loss + adversary.r1_weight / 2 * adversary.r1_every * slope.square().sum((1, 2, 3)).mean()
        return loss

    def state(self) -> dict[str, Tensor]:
        """As `Beside.state`; empty without a discriminator."""
        return self.trained.state() if self.trained else {}

    def load(self, tensors: dict[str, Tensor], source: Path) -> None:
        """As `Beside.load`."""
        if self.trained:
            self.trained.load(tensors, source)


def edge_loss(pixels: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of the differences of neighbouring pixels, across and down, summed over whole, half and
    quarter size: what a blurred edge costs at any scale. Stands for a perceptual loss where there are no weights of one."""
    error, total = pixels - images, pixels.new_zeros(())
    for _ in range(_SCALES):
        total = total + error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
        if min(error.shape[2:]) < 4:
            break
        error = F.avg_pool2d(error, 2)
    return total


def patch_discriminator(width: int, layers: int, *, seed: int) -> nn.Sequential:
    """Images -> a logit for each patch [b, 1, h, w] (Isola et al., 1611.07004, appendix): `layers` halvings of the sides.

    Without normalisation: that over a batch would make each image's verdict depend on the others of its rank; R1 keeps it
    in bounds instead. Weights are drawn from `seed` alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found: list[nn.Module] = []
        channels = 3
        for layer in range(layers):
            found += [nn.Conv2d(channels, width << min(layer, 3), 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            channels = width << min(layer, 3)
        found += [nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(channels, 1, 3, padding=1)]
        return nn.Sequential(*found)
