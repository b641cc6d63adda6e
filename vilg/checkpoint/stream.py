"""Weights written and used one tensor at a time, so that memory does not grow with the model."""

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vilg.checkpoint.reader import Weights
from vilg.errors import UserError
from vilg.inference.weights import FolderWeights

_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_CHUNK = 1 << 19  # numbers checked, converted and written at once: they stay in a core's cache
_FLUSH = 1 << 26  # bytes after which the disk is asked to start, or all of it waits for the end

Progress = Callable[[int], None]  # called with bytes done since the last call


def plan_files(sizes: Sequence[tuple[str, int]], *, limit: int) -> list[list[str]]:
    """Names in files of at most `limit` bytes, in order; a larger tensor gets a file of its own."""
    files: list[list[str]] = []
    room = 0
    for name, size in sizes:
        if not files or size > room:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    return files


def write_weights(path: Path, weights: Weights, names: Sequence[str], dtype: torch.dtype, progress: Progress) -> None:
    """A safetensors file of the fp32 master weights, rounded to `dtype`, flushed to the disk.

    The format (github.com/huggingface/safetensors): uint64 length of a JSON header, the header, then the bytes of all
    tensors. Written by hand because the library wants all tensors of a file in memory. Raises UserError for numbers
    that are not finite, OSError.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        shape = weights.shape(name)
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]
        }  # fmt: skip
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as stream:
        _write(stream, struct.pack("<Q", len(text)) + text)
        pending = 0
        for name in names:
            for part in _converted(weights, name, dtype):
                _write(stream, part.view(torch.uint8).numpy())
                progress(part.nbytes)
                pending += part.nbytes
                if pending >= _FLUSH:
                    # On Linux this starts writing without waiting; what is not yet on the disk stays cached.
                    os.posix_fadvise(stream.fileno(), stream.tell() - pending, pending, os.POSIX_FADV_DONTNEED)
                    pending = 0
        os.fsync(stream.fileno())


def _write(stream, data) -> None:
    """All of it: a raw stream may take less, as Linux takes 2 GiB at most."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _converted(weights: Weights, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """The numbers of a parameter in order, some at a time, flat; a chunk holds until the next one is asked for."""
    buffer = torch.empty(_CHUNK, dtype=dtype)
    for piece in weights.pieces(name, kind="master"):
        for chunk in piece.split(_CHUNK):
            if chunk.dtype != dtype:
                chunk = buffer[: chunk.numel()].copy_(chunk)
            least, most = torch.aminmax(chunk)  # both are NaN if anything is
            if not (least.isfinite() and most.isfinite()):
                raise UserError(
                    f"{weights.folder}: {name} holds numbers that are not finite in {dtype}; "
                    "choose another checkpoint or --dtype"
                )
            yield chunk


def load_when_used(model: nn.Module, weights: FolderWeights, dtype: torch.dtype, progress: Progress) -> None:
    """Give a model on the meta device each module's own weights just before the module runs, and take them after."""
    for prefix, module in model.named_modules():
        own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        if own:
            _lend(module, own, prefix, weights, dtype, progress)


def _lend(
    module: nn.Module, empty: dict[str, nn.Parameter], prefix: str, weights: FolderWeights, dtype: torch.dtype,
    progress: Progress,
) -> None:  # fmt: skip
    def fill(*_) -> None:
        for key in empty:
            stored = weights.read(f"{prefix}.{key}")
            progress(stored.nbytes)
            module._parameters[key] = nn.Parameter(stored.to(dtype), requires_grad=False)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(lambda *_: module._parameters.update(empty))
