"""How the codebook learns. A saved tokenizer holds plain code vectors; only training imports this.

Nearest codes: vector-quantize-pytorch's quantizer (pinned), wrapped so that nothing else depends on it. Moving-average
codes (van den Oord 2017, arXiv 1711.00937, appendix A.1), started by k-means, renewed when dead
(Jukebox, arXiv 2005.00341), with the gradient carried over by rotation (arXiv 2410.06424). Gumbel codes: chosen by
logits, learned by gradients through a relaxed choice (Jang 2016, arXiv 1611.01144; dVAE, arXiv 2102.12092).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from vilg.tokens.vqgan.config import ImageTokenizerConfig, QuantizerConfig
from vilg.tokens.vqgan.model import Codebook


def training_quantizer(
    codebook: Codebook, model: ImageTokenizerConfig, config: QuantizerConfig, *, synchronise: bool
) -> "TrainingQuantizer | GumbelQuantizer":
    """The quantizer that trains this codebook."""
    if model.lookup == "gumbel":
        return GumbelQuantizer(codebook, config)
    return TrainingQuantizer(model, config, synchronise=synchronise)


def carried_over(vectors: Tensor, chosen: Tensor) -> Tensor:
    """`chosen` in value, with a gradient at `vectors`: turned and scaled as the vector has to be to become its code
    (arXiv 2410.06424, section 4.2). Both [B, D, h, w]; `TrainingQuantizer` does the same to what it has chosen itself."""
    b, d, h, w = vectors.shape
    turned = rotate_to(*(x.permute(0, 2, 3, 1).reshape(-1, d) for x in (vectors, chosen)))
    return turned.reshape(b, h, w, d).permute(0, 3, 1, 2)


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

    def set_progress(self, share: float) -> None:
        """Nothing here depends on how much of the training is done."""

    @torch.no_grad()
    def copy_to(self, codebook: Codebook) -> None:
        """Hand the codes learned so far to a tokenizer."""
        codebook.vectors.copy_(self._quantizer.codebook)


class GumbelQuantizer(nn.Module):
    """Draws codes with Gumbel noise from the codebook's logits; its parameters are the codebook's own.

    loss = kl_weight * mean over places of KL(softmax(logits) || uniform) + diversity * KL(mean of softmax(logits) || uniform)

    The first keeps single choices open, and is as small when all places share one code as when they differ; the second
    keeps all codes in play (wav2vec 2.0, arXiv 2006.11477, equation 4). The mean is over a rank's micro-batch.
    """

    def __init__(self, codebook: Codebook, config: QuantizerConfig) -> None:
        super().__init__()
        self._codebook, self._config, self.temperature = codebook, config, config.temperature

    def set_progress(self, share: float) -> None:
        """share of the steps that are done, 0..1: the temperature falls geometrically from first to last."""
        config = self._config
        self.temperature = config.temperature * (config.last_temperature / config.temperature) ** share

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """vectors [B, D, h, w] -> (mixed code vectors [B, D, h, w], likeliest codes int64 [B, h, w], weighted divergences)."""
        logits = self._codebook.logits(vectors.permute(0, 2, 3, 1))  # [B, h, w, K]
        choice = F.gumbel_softmax(logits, self.temperature, hard=self._config.straight_through, dim=-1)
        shares = logits.softmax(-1)
        loss = self._config.kl_weight * _divergence(shares).mean()
        loss = loss + self._config.diversity * _divergence(shares.mean((0, 1, 2)))
        mixed = (choice @ self._codebook.vectors).permute(0, 3, 1, 2)
        return mixed, logits.argmax(-1), loss

    def copy_to(self, codebook: Codebook) -> None:
        """The codebook it was made with has learned already."""
        assert codebook is self._codebook


def _divergence(shares: Tensor) -> Tensor:
    """KL(shares || uniform) in nats along the last axis, from 0 to log K; its gradient is finite where a share is 0."""
    logarithms = shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
    return (shares * logarithms).sum(-1) + math.log(shares.shape[-1])
