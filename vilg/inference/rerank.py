"""Scores of candidates: inverse prompting (CogView, arXiv 2105.13290, section 3.3.2) with the model's own captioning.

The better a picture is, the likelier the model is to write the prompt under it.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vilg.inference.load import Bundle
from vilg.model.vilg import Vilg
from vilg.tokens.sequence import IGNORE, SequenceSpec, collate, image_to_text


@torch.inference_mode()
def text_log_likelihood(
    model: Vilg, spec: SequenceSpec, codes: Tensor, texts: Sequence[Sequence[int]], *, batch: int = 64
) -> Tensor:
    """Mean log-probability per token (end token included) of texts[i] under picture codes[i].

    codes: int64 [I, N]; texts: I lists of token ids, at most T - 1 each. Returns float32 [I] on the CPU.
    """
    device = next(model.parameters()).device
    scores = []
    for start in range(0, len(texts), batch):
        part = slice(start, start + batch)
        samples = [
            image_to_text(spec, text, code) for text, code in zip(texts[part], codes[part].cpu().numpy(), strict=True)
        ]
        sequences = collate(samples).to(device)
        text_logits, _ = model(*sequences.inputs())
        losses = F.cross_entropy(
            text_logits.float().flatten(0, 1), sequences.text_target.flatten(), ignore_index=IGNORE, reduction="none"
        ).view(sequences.text_target.shape)
        scores.append(-losses.sum(1) / (sequences.text_target != IGNORE).sum(1))
    return torch.cat(scores).float().cpu()


def rerank_scores(bundle: Bundle, prompts: Sequence[str], codes: Tensor) -> np.ndarray:
    """Inverse-prompting scores float32 [P, K] of codes int64 [P, K, N]: mean log-probability per prompt token.

    A prompt that fills the whole text segment, or is longer, is cut to T - 1 tokens here: as a target it shares the
    segment with the begin token.
    """
    num = codes.shape[1]
    most = bundle.spec.text_slots - 1
    texts = [bundle.encode_prompt(prompt, truncate=True)[:most] for prompt in prompts for _ in range(num)]
    scores = text_log_likelihood(bundle.model, bundle.spec, codes.flatten(0, 1), texts)
    return scores.view(len(prompts), num).numpy()
