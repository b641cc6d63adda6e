"""The image tokenizer: pixels to codes and back.

Shapes: B batch, H W pixels, f factor, h = H/f and w = W/f codes, K codebook size, D code width.

An architecture is an encoder [B, 3, H, W] -> [B, D, h, w] and a decoder [B, D, h, w] -> [B, 3, H, W] around one
codebook. The `patch` architecture encodes every f x f patch on its own: identical patches get identical codes wherever
they lie. Normalising over the whole image (GroupNorm, as in VQGAN) makes each code depend on the entire scene, which a
transformer then has to learn.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilg.errors import UserError
from vilg.tokens.vqgan.config import ImageTokenizerConfig
from vilg.tokens.vqgan.folder import check_tensors, content_hash, read_folder, write_folder


class PatchEncoder(nn.Module):
    """f x f patches, each through the same perceptron: [B, 3, H, W] -> [B, D, h, w]."""

    def __init__(self, factor: int, width: int, blocks: int, code_dim: int):
        super().__init__()
        self.factor = factor
        self.stem = nn.Linear(3 * factor * factor, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, code_dim))

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

    def __init__(self, factor: int, width: int, blocks: int, code_dim: int):
        super().__init__()
        self.stem = nn.Conv2d(code_dim, width, 1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.mix = nn.Conv2d(width, width, 1)
        self.head = nn.Conv2d(width, 3 * factor * factor, 1)
        self.factor = factor

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = self.stem(vectors)
        for block in self.blocks:
            hidden = block(hidden)
        return F.pixel_shuffle(self.head(F.gelu(self.mix(F.gelu(hidden)))), self.factor)


class Codebook(nn.Module):
    """K code vectors and the rule that finds the nearest one. How they are learned is `quantize.py`'s business."""

    def __init__(self, num_codes: int, code_dim: int, lookup: str):
        super().__init__()
        self.cosine = lookup == "cosine"
        self.register_buffer("vectors", torch.zeros(num_codes, code_dim))  # unit length if cosine

    def nearest(self, vectors: Tensor) -> Tensor:
        """vectors fp32 [B, D, h, w] -> codes int64 [B, h, w]; of equally near codes the first."""
        vectors = vectors.permute(0, 2, 3, 1)
        scores = vectors @ self.vectors.T
        if not self.cosine:  # argmin |v - c|^2 = argmax v.c - |c|^2 / 2; with cosine the length of v changes nothing
            scores = scores - self.vectors.square().sum(1) / 2
        return scores.argmax(dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes int64 [B, h, w] -> vectors [B, D, h, w]."""
        return F.embedding(codes, self.vectors).permute(0, 3, 1, 2)


class ImageTokenizer(nn.Module):
    """Encoder, codebook and decoder. See `folder.py` for what lies on disk."""

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = PatchEncoder(config.factor, config.encoder_width, config.encoder_blocks, config.code_dim)
        self.codebook = Codebook(config.num_codes, config.code_dim, config.lookup)
        self.decoder = ConvDecoder(config.factor, config.decoder_width, config.decoder_blocks, config.code_dim)

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> "ImageTokenizer":
        """Read a tokenizer for use: fp32, in eval mode, without gradients.

        Raises UserError naming the file that is missing, of an unknown format, damaged, or does not fit.
        """
        folder = Path(folder)
        config, tensors, written_hash = read_folder(folder)
        tokenizer = cls(config)
        check_tensors(folder, tensors, tokenizer.state_dict())
        tokenizer.load_state_dict(tensors)
        if tokenizer.hash != written_hash:
            raise UserError(f"{folder}: config.json and model.safetensors do not belong together, or one is damaged")
        return tokenizer.eval().requires_grad_(False).to(device)

    def save(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors into a folder, which is made if need be."""
        write_folder(Path(folder), self.config, self.state_dict())

    @property
    def hash(self) -> str:
        """sha256 in hex of settings and weights: two tokenizers of one hash give the same codes."""
        return content_hash(self.config, self.state_dict())

    @property
    def vocab_size(self) -> int:
        return self.config.num_codes

    @property
    def factor(self) -> int:
        return self.config.factor

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Codes of an image of the size trained on: (rows, columns)."""
        side = self.config.image_size // self.config.factor
        return side, side

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images float32 [B, 3, H, W] in [-1, 1] -> codes int64 [B, h, w].

        Always in fp32, whatever autocast is around: other precisions choose other codes. Raises ValueError for another
        dtype or shape.
        """
        if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be float32 [B, 3, H, W], not {images.dtype} {list(images.shape)}")
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(
                f"image sides {list(images.shape[2:])} are not multiples of the tokenizer's factor {self.factor}"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.codebook.nearest(self.encoder(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes int64 [B, h, w] -> images float32 [B, 3, H, W], clamped to [-1, 1]. ValueError for other codes."""
        if codes.ndim != 3 or codes.dtype != torch.int64:
            raise ValueError(f"codes must be int64 [B, h, w], not {codes.dtype} {list(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
            raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}, outside 0..{self.vocab_size - 1}")
        with torch.autocast(codes.device.type, enabled=False):
            return self.decoder(self.codebook.lookup(codes)).clamp(-1, 1)
