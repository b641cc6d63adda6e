"""How good a tokenizer is on images it was not trained on: figures and a sheet to look at."""

from pathlib import Path

import numpy as np
import torch

from vilg.tokens.vqgan.images import to_float, to_uint8, write_sheet
from vilg.tokens.vqgan.losses import code_use, psnr_db, ssim
from vilg.tokens.vqgan.model import ImageTokenizer

_BATCH = 64
_SHEET_IMAGES = 16


def evaluate(tokenizer: ImageTokenizer, images: np.ndarray, device: torch.device) -> dict[str, float]:
    """psnr_db (of the mean squared error over all pixels), ssim (mean over images), codebook_used, codebook_size,
    perplexity, num_images.

    images: uint8 [n, S, S, 3]. Outputs are rounded to the 256 levels that a picture file holds.
    """
    squared, alike, counts = 0.0, 0.0, torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for part in np.array_split(images, max(1, -(-len(images) // _BATCH))):
        codes = tokenizer.encode(to_float(part).to(device))
        output = to_uint8(tokenizer.decode(codes))
        squared += float(np.square(output.astype(np.float64) - part).sum())
        alike += float(ssim(to_float(output), to_float(part)).sum())
        counts += torch.bincount(codes.flatten().cpu(), minlength=tokenizer.vocab_size)
    used, perplexity = code_use(counts)
    return {
        "psnr_db": psnr_db(squared / images.size / 127.5**2),
        "ssim": alike / len(images),
        "codebook_used": used,
        "codebook_size": tokenizer.vocab_size,
        "perplexity": perplexity,
        "num_images": len(images),
    }


def draw_sheet(tokenizer: ImageTokenizer, images: np.ndarray, path: Path, device: torch.device) -> None:
    """Write a PNG with the first sixteen images (uint8 [n, S, S, 3]) above their reconstructions."""
    real = images[:_SHEET_IMAGES]
    write_sheet(real, to_uint8(tokenizer.decode(tokenizer.encode(to_float(real).to(device)))), path)
