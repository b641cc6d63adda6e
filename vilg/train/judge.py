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

    def _discriminator_loss(self, pixels: Tensor, images: Tensor) -> Tensor:
        """Hinge loss, and in every `r1_every`-th step the penalty R1."""
        adversary, discriminator = self.config.adversarial, self.trained.module
        loss = hinge_loss(discriminator(images), discriminator(pixels))
        if not self._penalised:
            return loss
        return loss + adversary.r1_weight / 2 * adversary.r1_every * r1_penalty(discriminator, images)

    def state(self) -> dict[str, Tensor]:
        """As `Beside.state`; empty without a discriminator."""
        return self.trained.state() if self.trained else {}

    def load(self, tensors: dict[str, Tensor], source: Path) -> None:
        """As `Beside.load`."""
        if self.trained:
            self.trained.load(tensors, source)
