"""What decoded pixels cost: distances to the image, and a discriminator that learns beside it.

Images fp32 [b, 3, S, S] in [-1, 1]. Losses are sums over images, of each image's mean: the parts of a global batch can be
added up, however it is split, since nothing in here normalises over images.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vilg.config.schema import ReconstructorConfig
from vilg.tokens.vqgan.discriminator import hinge_loss, patch_discriminator, r1_penalty
from vilg.tokens.vqgan.perceptual import perceptual_loss
from vilg.train.beside import Beside
from vilg.train.step import ramp


@dataclass(frozen=True)
class Verdict:
    """Sums over images, fp32 scalars, and gradients of those sums at the pixels [b, 3, S, S]; None: no adversary yet."""

    pixel_loss: Tensor
    pixel_gradient: Tensor
    adversarial_loss: Tensor
    adversarial_gradient: Tensor | None
    discriminator_loss: Tensor
    r1_penalty: Tensor


class PixelDistance:
    """l1 |e| + mse e^2 + perceptual * edges of `ReconstructorConfig`, a mean over images. e: pixels - images."""

    def __init__(self, config: ReconstructorConfig, *, device: torch.device) -> None:
        self.config = config
        self.perceptual = perceptual_loss(config.perceptual_weights).to(device) if config.perceptual else None

    def __call__(self, pixels: Tensor, images: Tensor) -> Tensor:
        """fp32 scalar of two [b, 3, S, S]."""
        config, error = self.config, pixels - images
        loss = config.l1 * error.abs().mean() + config.mse * error.square().mean()
        return loss if self.perceptual is None else loss + config.perceptual * self.perceptual(pixels, images)


class Judge:
    """The losses of `ReconstructorConfig`. trained: the discriminator, None without; active: it learns in this step;
    adversarial_weight: of this step, before `adaptive`."""

    def __init__(self, config: ReconstructorConfig, *, seed: int, device: torch.device) -> None:
        self.config, self._distance = config, PixelDistance(config, device=device)
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
            # A penalty that stands for n steps may be as long as n: clipped as one, it would hold nothing back.
            self.trained.grad_clip = adversary.grad_clip * (adversary.r1_every if self._penalised else 1)
            self.trained.begin()

    def __call__(self, pixels: Tensor, images: Tensor, *, share: float) -> Verdict:
        """pixels: decoded, without a graph. share: what a sum is multiplied by to be the global batch's mean; the
        discriminator's gradients, which are added up here, are those of its mean loss."""
        count, none = len(images), pixels.new_zeros(())
        pixels = pixels.requires_grad_()
        loss = self.pixel_loss(pixels, images)
        (gradient,) = torch.autograd.grad(loss, pixels)
        if not self.active:
            return Verdict(loss.detach(), gradient, none, None, none, none)
        hinge = count * hinge_loss(self.trained.module(images), self.trained.module(pixels.detach()))
        penalty = count * r1_penalty(self.trained.module, images) if self._penalised else none
        adversary = self.config.adversarial
        ((hinge + adversary.r1_every * adversary.r1_weight / 2 * penalty) * share).backward()
        adversarial = -count * self.trained.module(pixels).mean()
        (adversarial_gradient,) = torch.autograd.grad(adversarial, pixels)
        return Verdict(loss.detach(), gradient, adversarial.detach(), adversarial_gradient, hinge.detach(), penalty.detach())

    def pixel_loss(self, pixels: Tensor, images: Tensor) -> Tensor:
        """The distance to the images, a sum over them: fp32 scalar."""
        return len(images) * self._distance(pixels, images)

    def state(self) -> dict[str, Tensor]:
        """As `Beside.state`; empty without a discriminator."""
        return self.trained.state() if self.trained else {}

    def load(self, tensors: dict[str, Tensor], source: Path) -> None:
        """As `Beside.load`."""
        if self.trained:
            self.trained.load(tensors, source)
