"""Files of tensors and plain containers, the only kind that is ever read.

`torch.load` executes what a pickle says; here it runs with `weights_only=True` and a short list of DeepSpeed's own
plain classes (a number, a pair of integers, a loss scale), and refuses everything else, naming it.
"""

import errno
import os
import pickle
import re
import zlib
from collections.abc import Sequence
from copy import copy as shallow_copy
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vilg.errors import UserError, exit_code_of

# What DeepSpeed 0.19 puts into its checkpoint files beside tensors, containers, numbers and text.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_BLOCK = 1 << 20  # bytes read at once: they stay in a core's cache, and several files may be read at a time
_PLAIN = (str, bytes, int, float, bool, type(None), torch.Tensor, torch.Size, torch.dtype)


class _Record:
    """Stands for an allowed DeepSpeed class where DeepSpeed is not imported: keeps the attributes, does nothing."""


# Enums are pickled as a call of their class with the value.
_STAND_INS = tuple((int if name.endswith("Enum") else type(name, (_Record,), {}), name) for name in DEEPSPEED_CLASSES)


def save_tensors(state: Any, path: Path | str) -> str:
    """Write a nest of containers and tensors and flush it to the disk; its checksum, as `checksum` would find it.

    Raises UserError with the path for a failed write, TypeError naming an object that could not be read back.
    """
    refused = _foreign(state, "")
    if refused:
        raise TypeError(f"{path}: {refused} may not be stored: it could not be read back safely")
    try:
        with open(path, "wb") as stream:
            summed = _Summed(stream)
            torch.save(state, summed)
            stream.flush()
            os.fsync(stream.fileno())
        return summed.checksum
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError for a full disk
        raise UserError(f"cannot write {path}: {write_failure(error)}", write_exit_code(error)) from error


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> str:
    """Write and flush a safetensors file; its checksum. Raises UserError with the path."""
    try:
        save_file(tensors, path, metadata=metadata)
        # It wrote a temporary file that only its owner may read; others may read what they may read of the folder.
        os.chmod(path, os.stat(path.parent).st_mode & 0o666)
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())
        return checksum(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {write_failure(error)}", write_exit_code(error)) from error


def checksum(path: Path) -> str:
    """CRC-32 of a file, eight hexadecimal digits. Raises OSError."""
    value, buffer = 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return f"{value:08x}"


class _Summed:
    """A stream for `torch.save`, which writes from the first byte to the last, that sums what passes through."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._value = stream, 0

    @property
    def checksum(self) -> str:
        return f"{self._value:08x}"

    def write(self, data: Any) -> int:
        self._value = zlib.crc32(data, self._value)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()


def load_tensors(
    path: Path | str, *, map_location: Any = "cpu", mmap: bool = False, classes: Sequence[Any] | None = None
) -> Any:
    """Read what `save_tensors` or DeepSpeed wrote.

    mmap: tensors stay on the disk until they are used. classes: DeepSpeed's real classes for its own use; by default
    stand-ins that only hold attributes. Raises UserError naming the file, and the object if it holds a refused one.
    """
    with torch.serialization.safe_globals(list(_STAND_INS if classes is None else classes)):
        try:
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap or None)
        except FileNotFoundError:
            raise UserError(f"{path}: missing; the checkpoint is not whole. Use an earlier one") from None
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for damaged files
            if isinstance(error, pickle.UnpicklingError):
                found = re.search(r"(?i)unsupported (?:global|class):?(?: GLOBAL)? ([\w.]+)", str(error))
                what = f"an object of {found[1]}" if found else "a pickle of another kind"
                raise UserError(
                    f"{path}: holds {what}; only tensors and plain containers are read, because unpickling "
                    "anything else can run code. This file was not written by vilg, or is damaged"
                ) from None
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: cannot be read ({first_line}); it is damaged or no checkpoint file") from None


def host_copy(value: Any) -> Any:
    """The nest with all tensors copied to the host's memory; tensors that share storage share it still, so that they
    are written once."""
    return _copied(value, {})


def _copied(value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone() if value.device.type == "cpu" else storage.cpu()
        copy = torch.empty(0, dtype=value.dtype)
        return copy.set_(storages[storage.data_ptr()], value.storage_offset(), value.shape, value.stride())
    if isinstance(value, dict):
        return {key: _copied(inner, storages) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(inner, storages) for inner in value)
    return value if isinstance(value, _PLAIN) else shallow_copy(value)  # DeepSpeed's small classes


def write_failure(error: Exception) -> str:
    """A short reason for a failed write."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{first_line} (is the disk full?)"


def write_exit_code(error: Exception) -> int:
    """Of the UserError that tells of a failed write. Safetensors' own exception ends in "(os error 28)"; without a number, as
    in torch's, the disk was full."""
    if not isinstance(error, OSError):
        number = re.search(r"\(os error (\d+)\)", str(error))
        error = OSError(int(number[1]) if number else errno.ENOSPC, str(error))
    return exit_code_of(error)


def _foreign(value: Any, place: str) -> str | None:
    """The first object inside `value` that `load_tensors` would refuse, as text; None if all is plain."""
    kind = type(value)
    if isinstance(value, dict):
        return next(
            (found for k, v in value.items() if (found := _foreign(k, place) or _foreign(v, f"{place}/{k}"))), None
        )
    if isinstance(value, (list, tuple, set)) and kind is not torch.Size:
        return next((found for i, v in enumerate(value) if (found := _foreign(v, f"{place}/{i}"))), None)
    if (
        kind in _PLAIN
        or isinstance(value, torch.Tensor)
        or f"{kind.__module__}.{kind.__qualname__}" in DEEPSPEED_CLASSES
    ):
        return None
    return f"{place.lstrip('/') or 'the object'} of type {kind.__module__}.{kind.__qualname__}"
