"""The image tokenizer: pixels to codes and back.

Shapes: B batch, H W pixels, f factor, h = H/f and w = W/f codes, K codebook size, D code width.

An architecture is an encoder [B, 3, H, W] -> [B, D, h, w] and a decoder [B, D, h, w] -> [B, 3, H, W] around one
codebook; `last_layer` of a decoder is the weight of its last layer, to which losses are balanced.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilg.errors import UserError
from vilg.tokens.vqgan.config import ImageTokenizerConfig
from vilg.tokens.vqgan.dvae import DvaeDecoder, DvaeEncoder
from vilg.tokens.vqgan.folder import check_tensors, content_hash, read_folder, write_folder
from vilg.tokens.vqgan.patch import ConvDecoder, PatchEncoder
from vilg.tokens.vqgan.taming import TamingDecoder, TamingEncoder

_ARCHITECTURES = {
    "patch": (PatchEncoder, ConvDecoder),
    "taming": (TamingEncoder, TamingDecoder),
    "dvae": (DvaeEncoder, DvaeDecoder),
}


class Codebook(nn.Module):
    """K code vectors and the rule that chooses one. How they are learned is `quantize.py`'s business.

    lookup: euclidean and cosine choose the nearest code; gumbel the largest of K logits, a linear map of the vector (a
    network trained by Gumbel relaxation draws from them; the most likely code is what it would draw without noise).
    """

    def __init__(self, num_codes: int, code_dim: int, lookup: str):
        super().__init__()
        self.cosine = lookup == "cosine"
        self.logits = nn.Linear(code_dim, num_codes) if lookup == "gumbel" else None
        if self.logits is None:
            self.register_buffer("vectors", torch.zeros(num_codes, code_dim))  # unit length if cosine
        else:
            self.vectors = nn.Parameter(torch.randn(num_codes, code_dim))

    def nearest(self, vectors: Tensor) -> Tensor:
        """vectors fp32 [B, D, h, w] -> codes int64 [B, h, w]; of equally near codes the first."""
        vectors = vectors.permute(0, 2, 3, 1)
        if self.logits is not None:
            return self.logits(vectors).argmax(dim=-1)
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
        self.origin: dict | None = None  # where an imported one comes from
        encoder, decoder = _ARCHITECTURES[config.architecture]
        self.encoder = encoder(config)
        self.codebook = Codebook(config.num_codes, config.code_dim, config.lookup)
        self.decoder = decoder(config)

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> "ImageTokenizer":
        """Read a tokenizer for use: fp32, in eval mode, without gradients.

        Raises UserError naming the file that is missing, of an unknown format, damaged, or does not fit.
        """
        folder = Path(folder)
        config, tensors, description = read_folder(folder)
        tokenizer = cls(config)
        check_tensors(folder / "model.safetensors", tensors, tokenizer.state_dict())
        tokenizer.load_state_dict(tensors)
        if tokenizer.hash != description.get("hash"):
            raise UserError(f"{folder}: config.json and model.safetensors do not belong together, or one is damaged")
        tokenizer.origin = description.get("origin")
        return tokenizer.eval().requires_grad_(False).to(device)

    def save(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors into a folder, which is made if need be."""
        write_folder(Path(folder), self.config, self.state_dict(), self.origin)

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
