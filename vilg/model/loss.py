"""The two losses of the paper (ERNIE-ViLG eq. 3-5): cross entropy over target tokens, per direction, as sums."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vilg.parallel.loss import cross_entropy_and_z_sums, cross_entropy_sum
from vilg.parallel.ops import Group
from vilg.tokens.sequence import IGNORE


def direction_losses(
    text_logits: Tensor, image_logits: Tensor, text_target: Tensor, image_target: Tensor, *, group: Group = None
) -> tuple[Tensor, Tensor]:
    """Sums of -log p over the text targets (image -> text) and the image targets (text -> image): two fp32 scalars.

    text_logits [B, T, Vt / size], image_logits [B, N, Vi / size], any float dtype; targets int64 [B, T], [B, N] with
    `IGNORE` where there is no loss. group: the tensor-parallel group whose ranks hold the columns.
    A direction without targets gives 0 with a gradient of zeros, so ranks with other mixes never wait for each other.
    """
    return (
        cross_entropy_sum(text_logits, text_target, group=group, ignore=IGNORE),
        cross_entropy_sum(image_logits, image_target, group=group, ignore=IGNORE),
    )


# What `loss_sums` adds up, in its order; the last two are end-to-end training's, of the decoded pixels.
LOSS_SUMS = ("text", "image", "text z", "image z", "reconstruction", "adversarial")
# States [B, N, C], image_is_target [B], images uint8 [b, S, S, 3] -> those last two sums, fp32 [2].
Reconstruct = Callable[[Tensor, Tensor, Tensor], Tensor]


def loss_sums(
    text_logits: Tensor, image_logits: Tensor, text_target: Tensor, image_target: Tensor,
    *, z_loss: bool, group: Group = None, reconstructed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`LOSS_SUMS`, fp32 [6]: the two `direction_losses`, both directions' sums of log^2 Z (0 unless `z_loss`), and
    `reconstructed` [2], or 0."""
    if z_loss:
        text, text_z = cross_entropy_and_z_sums(text_logits, text_target, group=group, ignore=IGNORE)
        image, image_z = cross_entropy_and_z_sums(image_logits, image_target, group=group, ignore=IGNORE)
    else:
        text, image = direction_losses(text_logits, image_logits, text_target, image_target, group=group)
        text_z, image_z = torch.zeros_like(text), torch.zeros_like(image)
    pixels = text.new_zeros(2) if reconstructed is None else reconstructed
    return torch.cat([torch.stack([text, image, text_z, image_z]), pixels])


def nan_unless_finite(loss: Tensor) -> Tensor:
    """The same number, but NaN with gradients of NaN for an infinite one.

    An infinite loss can have finite gradients (a target's logit at -inf). Spoilt without asking the device, so that the
    one check of the gradient norm sees every kind of failure on every rank.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
