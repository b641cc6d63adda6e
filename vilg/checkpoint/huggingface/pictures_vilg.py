"""The image tokenizer of an export folder: pictures to codes and back. Needs torch, safetensors and transformers only.

Legend: B pictures, f factor, D code width.
"""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

FOLDER = "image_tokenizer"


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PatchEncoder(nn.Module):
    """f x f patches, each through the same perceptron: [B, 3, H, W] -> [B, h, w, D]."""

    def __init__(self, shape: dict):
        super().__init__()
        width, self.factor = shape["encoder_width"], shape["factor"]
        self.stem = nn.Linear(3 * self.factor**2, width)
        self.blocks = nn.ModuleList(
            Residual(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(shape["encoder_blocks"])
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, shape["code_dim"]))

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.stem(F.pixel_unshuffle(pixels, self.factor).permute(0, 2, 3, 1))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class DecoderBlock(nn.Module):
    """x + conv1x1(gelu(conv3x3(gelu(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.spread, self.mix = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.gelu(self.spread(F.gelu(x))))


class ConvDecoder(nn.Module):
    """Residual convolutions, then every position paints its patch: [B, D, h, w] -> [B, 3, H, W]."""

    def __init__(self, shape: dict):
        super().__init__()
        width, self.factor = shape["decoder_width"], shape["factor"]
        self.stem = nn.Conv2d(shape["code_dim"], width, 1)
        self.blocks = nn.ModuleList(DecoderBlock(width) for _ in range(shape["decoder_blocks"]))
        self.mix, self.head = nn.Conv2d(width, width, 1), nn.Conv2d(width, 3 * self.factor**2, 1)

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = self.stem(vectors)
        for block in self.blocks:
            hidden = block(hidden)
        return F.pixel_shuffle(self.head(F.gelu(self.mix(F.gelu(hidden)))), self.factor)


class Codebook(nn.Module):
    """The code vectors, [codes, D]."""

    def __init__(self, shape: dict):
        super().__init__()
        self.cosine = shape["lookup"] == "cosine"
        self.register_buffer("vectors", torch.empty(shape["num_codes"], shape["code_dim"]))


class ImageTokenizer(nn.Module):
    """Pictures are uint8 [B, height, width, 3]; codes int64 [B, height / f, width / f]."""

    def __init__(self, shape: dict):
        super().__init__()
        if shape["architecture"] != "patch":
            raise ValueError(f"image tokenizer of architecture {shape['architecture']!r}: use vilg itself for it")
        self.encoder, self.codebook, self.decoder = PatchEncoder(shape), Codebook(shape), ConvDecoder(shape)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        vectors = self.encoder(torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1)
        scores = vectors @ self.codebook.vectors.T
        if not self.codebook.cosine:
            scores = scores - self.codebook.vectors.square().sum(1) / 2
        return scores.argmax(-1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        vectors = F.embedding(codes.to(self.codebook.vectors.device), self.codebook.vectors).permute(0, 3, 1, 2)
        pixels = ((self.decoder(vectors).clamp(-1, 1) + 1) * 127.5).round()
        return pixels.to(torch.uint8).permute(0, 2, 3, 1)


def load_image_tokenizer(folder: str) -> ImageTokenizer:
    """From an export folder or a repository of one."""
    with open(cached_file(folder, f"{FOLDER}/config.json"), encoding="utf-8") as stream:
        tokenizer = ImageTokenizer(json.load(stream)["model"])
    tokenizer.load_state_dict(load_file(cached_file(folder, f"{FOLDER}/model.safetensors")))
    return tokenizer.eval()
