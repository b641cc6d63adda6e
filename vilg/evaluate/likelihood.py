"""Negative log-likelihood of image codes under captions: does the model use the text it is given?"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vilg.model.vilg import Vilg
from vilg.tokens.sequence import SequenceSpec, collate, text_to_image


@torch.inference_mode()
def image_nll(
    model: Vilg, spec: SequenceSpec, codes: Tensor, texts: Sequence[Sequence[int]], *, batch: int = 64
) -> Tensor:
    """Mean negative log-likelihood per image token, in nats, of codes[i] given texts[i] (teacher forcing).

    codes: int64 [I, N]; texts: I lists of token ids, at most T each (an empty one is the unconditional model).
    Returns float32 [I] on the CPU. The gap between right and wrong captions is what the text contributes.
    """
    device = next(model.parameters()).device
    losses = []
    for start in range(0, len(texts), batch):
        part = slice(start, start + batch)
        samples = [
            text_to_image(spec, text, code) for text, code in zip(texts[part], codes[part].cpu().numpy(), strict=True)
        ]
        sequences = collate(samples).to(device)
        _, image_logits = model(*sequences.inputs())
        nll = F.cross_entropy(image_logits.float().transpose(1, 2), sequences.image_target, reduction="none")
        losses.append(nll.mean(1))
    return torch.cat(losses).float().cpu()
