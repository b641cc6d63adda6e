"""VQGAN's own encoder and decoder (Esser 2021, arXiv 2012.09841), under the tensor names of taming-transformers.

    encoder: conv_in, down.<level>.{block, attn}.<n>, down.<level>.downsample, mid, norm_out, conv_out, quant_conv
    decoder: post_quant_conv, conv_in, mid, up.<level>.{block, attn}.<n>, up.<level>.upsample, norm_out, conv_out

The two 1x1 convolutions around the codebook, which lie beside encoder and decoder there, lie inside them here, so that an
encoder ends and a decoder begins at code vectors. Levels count from the finest. Shapes: B batch, H W pixels, f = 2^(levels
- 1) pixels per code along a side, D code width, C channels. All but the attention is local, so any H, W that are
multiples of f will do; group normalisation and attention make every code depend on the whole image.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vilg.tokens.vqgan.config import ImageTokenizerConfig, TamingConfig

_EPSILON = 1e-6


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on x where the width changes: [B, C, h, w]."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=_EPSILON)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=_EPSILON)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """x + attention over all places, with one head as wide as the layer: [B, C, h, w]."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=_EPSILON)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (conv(normed).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # [B, hw, C]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half the sides; one row and column of zeros is added below and to the right only, as taming does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the sides, nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution, each followed by attention if the level has it."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(outputs if n else inputs, outputs, groups) for n in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(outputs, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResnetBlock(width, width, groups), AttnBlock(width, groups), ResnetBlock(width, width, groups),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def _widths(shape: TamingConfig) -> list[int]:
    return [shape.ch * times for times in shape.ch_mult]


def _has_attention(config: ImageTokenizerConfig, level: int) -> bool:
    return config.image_size >> level in config.taming.attn_resolutions


class TamingEncoder(nn.Module):
    """[B, 3, H, W] -> vectors [B, D, h, w], before the codebook."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        shape, widths = config.taming, _widths(config.taming)
        self.conv_in = nn.Conv2d(3, shape.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = widths[level - 1] if level else shape.ch
            self.down.append(
                Level(inputs, width, shape.num_res_blocks, shape.groups, attention=_has_attention(config, level))
            )
            if level < len(widths) - 1:
                self.down[level].downsample = Downsample(width)
        self.mid = Middle(widths[-1], shape.groups)
        self.norm_out = nn.GroupNorm(shape.groups, widths[-1], eps=_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], shape.z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(shape.z_channels, config.code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv_in(images)
        for level in self.down:
            hidden = level(hidden)
            if hasattr(level, "downsample"):
                hidden = level.downsample(hidden)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(hidden)))))


class TamingDecoder(nn.Module):
    """Code vectors [B, D, h, w] -> [B, 3, H, W]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        shape, widths = config.taming, _widths(config.taming)
        self.post_quant_conv = nn.Conv2d(config.code_dim, shape.z_channels, 1)
        self.conv_in = nn.Conv2d(shape.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], shape.groups)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = widths[min(level + 1, len(widths) - 1)]
            self.up.append(
                Level(inputs, width, shape.num_res_blocks + 1, shape.groups, attention=_has_attention(config, level))
            )
            if level:
                self.up[level].upsample = Upsample(width)
        self.norm_out = nn.GroupNorm(shape.groups, widths[0], eps=_EPSILON)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        return self.conv_out.weight

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(self.post_quant_conv(vectors)))
        for level in reversed(self.up):
            hidden = level(hidden)
            if hasattr(level, "upsample"):
                hidden = level.upsample(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))
