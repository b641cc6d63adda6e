"""Likelihoods by teacher forcing, in both directions: how well does a text fit a picture, and a picture a text?"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vilg.model.vilg import Vilg
from vilg.parallel.ops import gather_last
from vilg.tokens.sequence import IGNORE, Sample, SequenceSpec, collate, image_to_text, text_to_image


@torch.inference_mode()
def text_log_likelihood(
    model: Vilg, spec: SequenceSpec, codes: Tensor, texts: Sequence[Sequence[int]], *, batch: int = 64
) -> Tensor:
    """Mean log-probability per token (end token included) of texts[i] under picture codes[i].

    codes: int64 [I, N]; texts: I lists of token ids, at most T - 1 each. Returns float32 [I] on the CPU.
    """
    rows = zip(texts, codes.cpu().numpy(), strict=True)
    samples = [image_to_text(spec, text, code) for text, code in rows]
    return torch.cat([-text_nll for text_nll, _ in _mean_nll(model, samples, batch)])


@torch.inference_mode()
def image_nll(
    model: Vilg, spec: SequenceSpec, codes: Tensor, texts: Sequence[Sequence[int]], *, batch: int = 64
) -> Tensor:
    """Mean negative log-likelihood per image token, in nats, of codes[i] given texts[i].

    codes: int64 [I, N]; texts: I lists of token ids, at most T each (an empty one is the unconditional model).
    Returns float32 [I] on the CPU. The gap between right and wrong captions is what the text contributes.
    """
    rows = zip(texts, codes.cpu().numpy(), strict=True)
    samples = [text_to_image(spec, text, code) for text, code in rows]
    return torch.cat([image_nll for _, image_nll in _mean_nll(model, samples, batch)])


def _mean_nll(model: Vilg, samples: Sequence[Sample], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Per batch the mean loss of each sample's text and image targets, float32 on the CPU; not a number without any."""
    device = next(model.parameters()).device
    for start in range(0, len(samples), batch):
        sequences = collate(samples[start : start + batch]).to(device)
        logits = (gather_last(part, model.grid.tensor_group) for part in model(*sequences.inputs()))
        targets = (sequences.text_target, sequences.image_target)
        yield tuple(_mean_of_targets(*pair) for pair in zip(logits, targets, strict=True))


def _mean_of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    return (losses.sum(1) / (targets != IGNORE).sum(1)).cpu()
