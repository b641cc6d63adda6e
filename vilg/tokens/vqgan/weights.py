"""Tensors out of weight files that others wrote: safetensors, or torch files without running what they may hide."""

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from vilg.errors import UserError

SAFETENSORS = ".safetensors"
TORCH = (".pt", ".pth", ".ckpt", ".bin")


def read_weights(path: Path) -> Any:
    """Content of a file, on the CPU: {name: tensor} of safetensors, whatever a torch file holds.

    Raises UserError for a file that cannot be read, of another kind, damaged, or with pickled objects.
    """
    path = Path(path)
    try:
        if path.suffix == SAFETENSORS:
            return safetensors.torch.load_file(path)
        if path.suffix in TORCH:
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file makes torch and safetensors raise almost anything
        raise UserError(f"{path}: cannot be read as plain tensors: {str(error).splitlines()[0]}") from error
    raise UserError(f"{path}: not a weight file by its name; readable: *{SAFETENSORS}, *{', *'.join(TORCH)}")
