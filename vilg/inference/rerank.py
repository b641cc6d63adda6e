"""Scores of candidates: which of the pictures drawn for a prompt shows it best?

Inverse prompting (CogView, arXiv 2105.13290, section 3.3.2) asks the model itself: the better a picture is, the likelier the
model is to write the prompt under it. A CLIP model asks another one.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from vilg.data.filters.similarity import Scorer
from vilg.inference.likelihood import text_log_likelihood
from vilg.inference.load import Bundle
from vilg.tokens.vqgan.images import prepare_image


def rerank_scores(bundle: Bundle, prompts: Sequence[str], codes: Tensor, *, batch: int = 64) -> np.ndarray:
    """Inverse-prompting scores float32 [P, K] of codes int64 [P, K, N]: mean log-probability per prompt token.

    A prompt that fills the whole text segment, or is longer, is cut to T - 1 tokens here: as a target it shares the
    segment with the begin token. batch: pictures judged together.
    """
    num = codes.shape[1]
    most = bundle.spec.text_slots - 1
    texts = [bundle.encode_prompt(prompt, truncate=True)[:most] for prompt in prompts for _ in range(num)]
    scores = text_log_likelihood(bundle.model, bundle.spec, codes.flatten(0, 1), texts, batch=batch)
    return scores.view(len(prompts), num).numpy()


def clip_scores(scorer: Scorer, prompts: Sequence[str], images: np.ndarray, *, batch: int = 64) -> np.ndarray:
    """What `scorer` says of each prompt and its pictures uint8 [P, K, height, width, 3]: float32 [P, K]."""
    flat = images.reshape(-1, *images.shape[2:])
    texts = [prompt for prompt in prompts for _ in range(images.shape[1])]
    found = []
    for start in range(0, len(flat), batch):
        part = slice(start, start + batch)
        pictures = np.stack([prepare_image(Image.fromarray(image), scorer.image_size) for image in flat[part]])
        found.append(scorer.score(pictures, texts[part]))
    return np.concatenate(found).astype(np.float32).reshape(images.shape[:2])
