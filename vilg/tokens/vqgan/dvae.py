"""A plain convolutional encoder and decoder, as in discrete VAEs (DALL-E, Ramesh 2021, arXiv 2102.12092, appendix A).

For the paper's ablation (ERNIE-ViLG, section 5, used DALL-E's dVAE): strided convolutions, residual blocks, no
normalisation, no attention, no discriminator; with `lookup: gumbel` it is trained by Gumbel relaxation. Smaller than
DALL-E's own, and of our own shape. B batch, H W pixels, f = 2^n pixels per code along a side, D code width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vilg.tokens.vqgan.config import ImageTokenizerConfig
from vilg.tokens.vqgan.patch import ResidualBlock


class DvaeEncoder(nn.Module):
    """n halvings, then residual blocks: [B, 3, H, W] -> [B, D, h, w]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        width, halvings = config.encoder_width, config.factor.bit_length() - 1
        self.down = nn.ModuleList(nn.Conv2d(width if n else 3, width, 4, stride=2, padding=1) for n in range(halvings))
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(config.encoder_blocks))
        self.head = nn.Conv2d(width, config.code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = images
        for conv in self.down:
            hidden = F.gelu(conv(hidden))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(F.gelu(hidden))


class DvaeDecoder(nn.Module):
    """Residual blocks, then n doublings: [B, D, h, w] -> [B, 3, H, W]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        width, doublings = config.decoder_width, config.factor.bit_length() - 1
        self.stem = nn.Conv2d(config.code_dim, width, 1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(config.decoder_blocks))
        self.up = nn.ModuleList(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1) for _ in range(doublings))
        self.head = nn.Conv2d(width, 3, 1)

    @property
    def last_layer(self) -> Tensor:
        return self.head.weight

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = self.stem(vectors)
        for block in self.blocks:
            hidden = block(hidden)
        for conv in self.up:
            hidden = F.gelu(conv(F.gelu(hidden)))
        return self.head(hidden)
