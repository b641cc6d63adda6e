"""What a training step of a tokenizer is to make small: pixel errors, perceptual and adversarial terms."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vilg.tokens.vqgan.adversarial import Adversary
from vilg.tokens.vqgan.config import ReconstructionLossConfig
from vilg.tokens.vqgan.losses import reconstruction_loss
from vilg.tokens.vqgan.perceptual import perceptual_loss


@dataclass
class Cost:
    """loss: to be minimised by the tokenizer. terms: what it is made of, detached scalars for the log."""

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """The terms of `ReconstructionLossConfig`. Raises UserError for perceptual weights that do not fit."""

    def __init__(self, config: ReconstructionLossConfig, *, seed: int, device: torch.device, world_size: int) -> None:
        self.config = config
        self.perceptual: nn.Module | None = None
        if config.perceptual:
            self.perceptual = perceptual_loss(config.perceptual_weights).to(device)
        self.adversary: Adversary | None = None
        if config.adversarial.weight:
            self.adversary = Adversary(config.adversarial, seed=seed, device=device, world_size=world_size)

    def __call__(self, output: Tensor, images: Tensor, *, last_layer: Tensor, step: int) -> Cost:
        """Of one step (counted from 0); output and images are float [B, 3, H, W], last_layer the decoder's."""
        cost = Cost(reconstruction_loss(output, images, self.config))
        if self.perceptual is not None:
            likeness = self.perceptual(output, images)
            cost.loss = cost.loss + self.config.perceptual * likeness
            cost.terms["perceptual"] = likeness.detach()
        if self._plays(step):
            term, factor = self.adversary.term(cost.loss, output, last_layer, step)
            cost.loss = cost.loss + term
            cost.terms |= {"adversarial": term.detach(), "adversarial_factor": output.new_tensor(factor)}
        return cost

    def teach_adversary(self, output: Tensor, images: Tensor, *, step: int, lr_share: float) -> dict[str, Tensor]:
        """The discriminator's own step, after the tokenizer's; {} while there is none."""
        if not self._plays(step):
            return {}
        return {"discriminator_loss": output.new_tensor(self.adversary.learn(output, images, step, lr_share))}

    def _plays(self, step: int) -> bool:
        return self.adversary is not None and self.adversary.weight(step) > 0
