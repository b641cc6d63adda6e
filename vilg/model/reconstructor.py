"""The end-to-end image decoder: hidden states of the image slots -> pixels (ERNIE-ViLG, 2112.15283, section 3.1.3).

    z_emb = mapping(states)        two layers with a GELU: the paper says "nonlinearly" and no more
    pixels = decoder(z_emb)        the image tokenizer's decoder, from whose weights it starts

The paper calls them the hidden embeddings of the image tokens. In our layout slot n predicts code n and reads code n - 1
(a target is shifted), so code n has two: the state that predicts it, which sends the pixels' gradient where the choice
was made, and the state of slot n + 1, which has read what was chosen. The mapping gets both; the last code has no second.
Legend: B sequences, N = H * W image slots, C hidden, D width of a code vector, f pixels per code along a side.
"""

import hashlib
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vilg.config.schema import ModelConfig
from vilg.errors import UserError
from vilg.tokens.vqgan import ImageTokenizer

FORMAT, FORMAT_VERSION = "vilg-reconstructor", 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class Reconstructor(nn.Module):
    """States [B, N, C] -> pixels fp32 [B, 3, H f, W f] around [-1, 1], not clamped. Weights are fp32 in every precision
    of the run: convolutional decoders under adversarial losses are known to fail in 16 bits.

    It is no part of the list of layers: every rank that holds the heads has it whole (train/reconstruction.py).
    """

    def __init__(self, config: ModelConfig, tokenizer: ImageTokenizer, grid: tuple[int, int]) -> None:
        super().__init__()
        width = mapping_width(config)
        code_dim = tokenizer.config.code_dim
        self.grid = tuple(grid)
        self.mapping = nn.Sequential(nn.Linear(2 * config.hidden_size, width), nn.GELU(), nn.Linear(width, code_dim))
        self.decoder = deepcopy(tokenizer.decoder).requires_grad_(True)

    def forward(self, states: Tensor) -> Tensor:
        """states: any float dtype, taken to fp32."""
        states = states.float()
        vectors = self.mapping(torch.cat([states, F.pad(states[:, 1:], (0, 0, 0, 1))], 2))
        return self.decoder(vectors.transpose(1, 2).unflatten(2, self.grid))

    @torch.no_grad()
    def reset_mapping(self, tokenizer: ImageTokenizer, seed: int) -> None:
        """Draw the mapping of run seed `seed`: its outputs start around the code vectors' mean, at their spread, where the
        decoder is at home."""
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(f"mapping/{seed}".encode()).digest()[:7], "big")
        )
        codes = tokenizer.codebook.vectors.float().cpu()
        first, _, last = self.mapping
        first.weight.normal_(0.0, first.in_features**-0.5, generator=generator)
        first.bias.zero_()
        last.weight.normal_(0.0, last.in_features**-0.5, generator=generator)
        last.weight.mul_(codes.std(0)[:, None])
        last.bias.copy_(codes.mean(0))


def mapping_width(config: ModelConfig) -> int:
    """Hidden width of the mapping network of a model with a `reconstructor` section."""
    return config.reconstructor.mapping_width or config.hidden_size


def save_reconstructor(folder: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a reconstructor's folder, as an export holds it. facts: for people, beside the format."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **facts}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_reconstructor(
    folder: Path, config: ModelConfig, tokenizer: ImageTokenizer, grid: tuple[int, int], device: torch.device | str
) -> Reconstructor:
    """Open such a folder for use. Raises UserError naming the file that is missing, of another kind, or does not fit."""
    path = folder / CONFIG_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = (found.get("format"), found.get("format_version")) if isinstance(found, dict) else (None, None)
        if kind != (FORMAT, FORMAT_VERSION):
            raise UserError(f"{path}: holds {kind[0]} {kind[1]}; this vilg reads {FORMAT} {FORMAT_VERSION}. Export again")
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: no whole reconstructor ({error}); export again") from None
    reconstructor = Reconstructor(config, tokenizer, grid)
    check_weights(folder / WEIGHTS_FILE, reconstructor, weights)
    reconstructor.load_state_dict(weights)
    return reconstructor.eval().requires_grad_(False).to(device)


def check_weights(source: Path, reconstructor: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise UserError, with the first difference, unless the weights have the module's names and shapes."""
    needed = {name: tuple(tensor.shape) for name, tensor in reconstructor.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(needed | found):
        if needed.get(name) != found.get(name):
            raise UserError(
                f"{source}: {name} has shape {found.get(name, 'none')} where {needed.get(name, 'nothing')} is needed: it "
                "belongs to another image tokenizer or another model.reconstructor.mapping_width"
            )
