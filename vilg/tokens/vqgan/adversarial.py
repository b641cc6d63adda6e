"""Training against a discriminator, stably: when it starts, how much it counts, and its own optimizer step.

    loss(generator) = reconstruction + weight(step) * adaptive * -mean D(output)
    loss(D)         = hinge(D(image), D(output)) + every n-th step n * r1/2 * |dD(image)/d image|^2

weight is 0 before `start_step`, in which time D does not learn either, then grows over `ramp_steps`. adaptive scales the
adversarial gradient to the reconstruction's at the decoder's last layer (VQGAN, arXiv 2012.09841, equation 7).
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vilg.tokens.vqgan.discriminator import hinge_loss, patch_discriminator, r1_penalty

_LARGEST_ADAPTIVE = 1e4
_SMALLEST_NORM = 1e-4


class AdversarialSettings(Protocol):
    """What is read of a section of a recipe; the fields are described there."""

    weight: float
    start_step: int
    ramp_steps: int
    adaptive: bool
    lr: float
    grad_clip: float
    r1_weight: float
    r1_every: int
    width: int
    layers: int


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|d reconstruction / d last_layer| / |d adversarial / d last_layer|, in [0, 1e4], without a gradient.

    Both losses keep their graphs. last_layer: weight of the decoder's last layer (VQGAN, equation 7; delta 1e-4).
    """
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (given.norm() + _SMALLEST_NORM)).clamp(0, _LARGEST_ADAPTIVE).detach()


class Adversary:
    """A discriminator with its optimizer. Steps count from 0; images and outputs are float [B, 3, H, W] in [-1, 1].

    With several ranks its gradients are averaged over all of them, so that it stays the same everywhere.
    """

    def __init__(self, config: AdversarialSettings, *, seed: int, device: torch.device, world_size: int = 1) -> None:
        self.config, self._world_size = config, world_size
        self.discriminator = patch_discriminator(config.width, config.layers, seed=seed).to(device)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), config.lr, betas=(0.5, 0.9), weight_decay=0)

    def weight(self, step: int) -> float:
        """Of the adversarial loss at a step, before `adaptive`; 0 while the discriminator waits."""
        config = self.config
        if step < config.start_step:
            return 0.0
        return config.weight * min(1.0, (step - config.start_step + 1) / max(config.ramp_steps, 1))

    def term(self, reconstruction: Tensor, output: Tensor, last_layer: Tensor, step: int) -> tuple[Tensor, float]:
        """(what is added to the generator's loss, its factor after `adaptive`). Call it at steps of a positive weight.

        The discriminator collects no gradient from it.
        """
        self.discriminator.requires_grad_(False)
        adversarial = -self.discriminator(output).mean()
        self.discriminator.requires_grad_(True)
        factor = torch.as_tensor(self.weight(step), device=output.device)
        if self.config.adaptive:
            ratio = adaptive_weight(reconstruction, adversarial, last_layer)
            if self._world_size > 1:  # one factor everywhere, as one process would have
                dist.all_reduce(ratio)
                ratio = ratio / self._world_size
            factor = factor * ratio
        return factor * adversarial, float(factor)

    def learn(self, output: Tensor, images: Tensor, step: int, lr_share: float = 1.0) -> float:
        """One step of the discriminator; its hinge loss. lr_share: of `lr`, for a schedule.

        A step with gradients that are not finite is left out, on all ranks alike.
        """
        config, parameters = self.config, list(self.discriminator.parameters())
        hinge = hinge_loss(self.discriminator(images), self.discriminator(output.detach()))
        loss = hinge
        limit = config.grad_clip
        if config.r1_weight and (step - config.start_step) % config.r1_every == 0:
            limit *= config.r1_every  # a penalty that stands for n steps: clipped as one, it would hold nothing back
            loss = loss + config.r1_every * config.r1_weight / 2 * r1_penalty(self.discriminator, images)
        self.optimizer.zero_grad()
        loss.backward()
        if self._world_size > 1:
            average_gradients(parameters, self._world_size)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * lr_share
        if torch.isfinite(nn.utils.clip_grad_norm_(parameters, limit)):
            self.optimizer.step()
        return float(hinge.detach())


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Mean over all ranks, in one collective: the networks are small, and many small messages cost more than a step.

    Ranks begin with equal weights (one seed) and stay equal, as each makes the same update.
    """
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
