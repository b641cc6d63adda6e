"""How the codebook learns: vector-quantize-pytorch's quantizer (pinned), wrapped so that nothing else depends on it.

Moving-average codes (van den Oord 2017, arXiv 1711.00937, appendix A.1), started by k-means, renewed when dead
(Jukebox, arXiv 2005.00341), with the gradient carried over by rotation (arXiv 2410.06424). Only training imports this;
a saved tokenizer holds plain code vectors.
"""

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from vilg.tokens.vqgan.config import ImageTokenizerConfig, QuantizerConfig
from vilg.tokens.vqgan.model import Codebook


class TrainingQuantizer(nn.Module):
    """Quantises the encoder's output and updates the codes from it; sums go over all ranks if there are several."""

    def __init__(self, model: ImageTokenizerConfig, config: QuantizerConfig, *, synchronise: bool):
        super().__init__()
        self._quantizer = VectorQuantize(
            dim=model.code_dim,
            codebook_size=model.num_codes,
            decay=config.decay,
            use_cosine_sim=model.lookup == "cosine",
            rotation_trick=True,
            kmeans_init=True,
            kmeans_iters=config.kmeans_steps,
            threshold_ema_dead_code=config.dead_below,
            commitment_weight=config.commitment,
            sync_codebook=synchronise,
        )

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """vectors [B, D, h, w] -> (quantised [B, D, h, w], codes int64 [B, h, w], weighted commitment loss)."""
        b, d, h, w = vectors.shape
        quantised, codes, loss = self._quantizer(vectors.permute(0, 2, 3, 1).reshape(b, h * w, d))
        return quantised.reshape(b, h, w, d).permute(0, 3, 1, 2), codes.reshape(b, h, w), loss.sum()

    @torch.no_grad()
    def copy_to(self, codebook: Codebook) -> None:
        """Hand the codes learned so far to a tokenizer."""
        codebook.vectors.copy_(self._quantizer.codebook)
