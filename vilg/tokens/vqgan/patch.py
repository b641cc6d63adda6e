"""The `patch` architecture: every code sees its own f x f pixels only, the decoder sees neighbours too.

Identical patches get identical codes wherever they lie. Normalising over the whole image (GroupNorm, as in VQGAN) makes
each code depend on the entire scene, which a transformer then has to learn. Shapes: B batch, H W pixels, f factor, h =
H/f and w = W/f codes, D code width, C channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vilg.tokens.vqgan.config import ImageTokenizerConfig


class PatchEncoder(nn.Module):
    """f x f patches, each through the same perceptron: [B, 3, H, W] -> [B, D, h, w]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.factor, width = config.factor, config.encoder_width
        self.stem = nn.Linear(3 * config.factor**2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(config.encoder_blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.code_dim))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(F.pixel_unshuffle(images, self.factor).permute(0, 2, 3, 1))  # [B, h, w, width]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv1x1(gelu(conv3x3(gelu(x)))), [B, C, h, w]."""

    def __init__(self, width: int):
        super().__init__()
        self.spread = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mix(F.gelu(self.spread(F.gelu(hidden))))


class ConvDecoder(nn.Module):
    """Residual convolutions at code resolution, then every position paints its patch: [B, D, h, w] -> [B, 3, H, W]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.factor, width = config.factor, config.decoder_width
        self.stem = nn.Conv2d(config.code_dim, width, 1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(config.decoder_blocks))
        self.mix = nn.Conv2d(width, width, 1)
        self.head = nn.Conv2d(width, 3 * config.factor**2, 1)

    @property
    def last_layer(self) -> Tensor:
        return self.head.weight

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = self.stem(vectors)
        for block in self.blocks:
            hidden = block(hidden)
        return F.pixel_shuffle(self.head(F.gelu(self.mix(F.gelu(hidden)))), self.factor)
