"""Probes: a fixed tiny batch and its logits, stored in every checkpoint, recomputed by whoever converts the weights."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vilg.checkpoint.tensors import save_safetensors
from vilg.errors import UserError
from vilg.model.vilg import Vilg
from vilg.parallel.ops import gather_last
from vilg.parallel.precision import dtype_name
from vilg.tokens.sequence import SequenceBatch, SequenceSpec, collate, image_to_text, text_to_image

PROBE_FILE = "probes.safetensors"
_SPECIAL_IDS = 4
# Largest difference, as a share of the largest logit, that another machine's rounding explains. A wrongly converted
# weight moves logits by about their own size.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Probes:
    """inputs: a batch of one sequence per direction. Logits in fp32: text [2, T, Vt], image [2, N, Vi]; dtype: of the
    weights that gave them."""

    inputs: SequenceBatch
    text_logits: Tensor
    image_logits: Tensor
    dtype: str


def probe_batch(spec: SequenceSpec) -> SequenceBatch:
    """One text -> image and one image -> text sequence: a function of the spec alone."""
    draw = np.random.Generator(np.random.Philox(key=0))
    codes = draw.integers(0, spec.image_vocab_size, (2, spec.image_slots))
    length = max(1, spec.text_slots // 2)
    texts = draw.integers(min(_SPECIAL_IDS, spec.text_vocab_size - 1), spec.text_vocab_size, (2, length)).tolist()
    return collate(
        [text_to_image(spec, texts[0], codes[0]), image_to_text(spec, texts[1][: spec.text_slots - 1], codes[1])]
    )


@torch.no_grad()
def compute_probes(
    model: Vilg, inputs: SequenceBatch | None = None, *, device: torch.device | str | None = None
) -> Probes:
    """Run the probe batch (or stored inputs) through a model as it stands; every tensor rank must call it.

    device: of the inputs; by default that of the weights.
    """
    inputs = inputs or probe_batch(model.spec)
    first = next(model.parameters())
    training = model.training
    model.eval()
    text, image = model(*inputs.to(device or first.device).inputs())
    model.train(training)
    group = model.grid.tensor_group
    text, image = (gather_last(logits, group).float().cpu() for logits in (text, image))
    # Padding slots mean nothing; zero, so that nobody compares them.
    seen = torch.arange(text.shape[1]) < inputs.text_len[:, None]
    return Probes(inputs, text.masked_fill(~seen[..., None], 0.0), image, dtype_name(first.dtype))


def save_probes(probes: Probes, path: Path) -> str:
    """Write and flush them; the file's checksum."""
    tensors = {f"inputs.{name}": tensor for name, tensor in probes.inputs.tensors().items()}
    tensors |= {"text_logits": probes.text_logits.contiguous(), "image_logits": probes.image_logits.contiguous()}
    return save_safetensors(tensors, path, metadata={"format_version": "1", "dtype": probes.dtype})


def load_probes(folder: Path) -> Probes:
    """Read them. Raises UserError naming the file."""
    path = folder / PROBE_FILE
    try:
        with safe_open(path, framework="pt") as stream:
            version, dtype = stream.metadata().get("format_version"), stream.metadata()["dtype"]
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use another checkpoint, or --no-verify") from None
    if version != "1":
        raise UserError(f"{path}: format_version {version!r}; this vilg reads 1")
    inputs = SequenceBatch(**{f.name: tensors.get(f"inputs.{f.name}") for f in fields(SequenceBatch)})
    return Probes(inputs, tensors["text_logits"], tensors["image_logits"], dtype)


def largest_difference(a: Probes, b: Probes) -> float:
    """Largest absolute difference of any logit."""
    return max(float((a.text_logits - b.text_logits).abs().max()), float((a.image_logits - b.image_logits).abs().max()))


def largest_logit(probes: Probes) -> float:
    """Largest absolute logit: the scale that differences are judged by."""
    return max(float(probes.text_logits.abs().max()), float(probes.image_logits.abs().max()))
