"""The file of a checkpoint that holds what end-to-end training keeps beside the model: the same under every layout.

    OWNER.ENTRY.NAME    owner: reconstructor, discriminator, image_tokenizer (only where it is trained too);
                        entry: weight, ema, exp_avg, exp_avg_sq, step; fp32
    OWNER.ema_updates   how often the moving average was updated
    OWNER.code_uses     of the image tokenizer, [K], moving average of how often each code was used
    norms               fp64 [4], moving averages of the gradient norms that balance the losses

Every rank that needs it has all of it in memory, so one rank writes it and any number of any layout read it.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vilg.checkpoint.tensors import save_safetensors
from vilg.errors import UserError

RECONSTRUCTOR_FILE = "reconstructor.safetensors"
TOKENIZER = "image_tokenizer"  # the owner whose weights are all of an `ImageTokenizer`, code vectors included
_VERSION = "1"


def write_reconstructor_file(tensors: dict[str, Tensor], path: Path) -> str:
    """Write and flush it; its checksum."""
    return save_safetensors(tensors, path, metadata={"format_version": _VERSION})


def read_reconstructor_file(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors, on the CPU. Raises UserError naming the file if it is missing, damaged or of another version."""
    path = checkpoint / RECONSTRUCTOR_FILE
    if not path.exists():
        raise UserError(
            f"{path}: missing, so the checkpoint is of a run without model.reconstructor; take the section out, or export "
            "that checkpoint and begin a new run with init_from"
        )
    try:
        with safe_open(path, framework="pt") as stream:
            version = (stream.metadata() or {}).get("format_version")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use an earlier checkpoint") from None
    if version != _VERSION:
        raise UserError(f"{path}: format_version {version!r}; this vilg reads {_VERSION}. Use the vilg that wrote it")
    return tensors


def entries(tensors: dict[str, Tensor], owner: str, entry: str) -> dict[str, Tensor]:
    """Name -> tensor of one owner's entry; empty if the file has none."""
    prefix = f"{owner}.{entry}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def kept_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reconstructor for use: its moving average if the run keeps one, else its weights."""
    return entries(tensors, "reconstructor", "ema") or entries(tensors, "reconstructor", "weight")


def trained_tokenizer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of an image tokenizer that was trained with the model; empty if it was frozen."""
    return entries(tensors, TOKENIZER, "weight")
