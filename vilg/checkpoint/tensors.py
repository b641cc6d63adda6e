"""Files of tensors and plain containers, the only kind that is ever read.

`torch.load` executes what a pickle says; here it runs with `weights_only=True` and a short list of DeepSpeed's own
plain classes (a number, a pair of integers, a loss scale), and refuses everything else, naming it.
"""

import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vilg.errors import UserError

# What DeepSpeed 0.19 puts into its checkpoint files beside tensors, containers, numbers and text.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_PLAIN = (str, bytes, int, float, bool, type(None), torch.Tensor, torch.Size, torch.dtype)


class _Record:
    """Stands for an allowed DeepSpeed class where DeepSpeed is not imported: keeps the attributes, does nothing."""


# Enums are pickled as a call of their class with the value.
_STAND_INS = tuple((int if name.endswith("Enum") else type(name, (_Record,), {}), name) for name in DEEPSPEED_CLASSES)


def save_tensors(state: Any, path: Path | str) -> None:
    """Write a nest of containers and tensors and flush it to the disk.

    Raises UserError with the path for a failed write, TypeError naming an object that could not be read back.
    """
    refused = _foreign(state, "")
    if refused:
        raise TypeError(f"{path}: {refused} may not be stored: it could not be read back safely")
    try:
        with open(path, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError for a full disk
        raise UserError(f"cannot write {path}: {write_failure(error)}") from error


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


def write_failure(error: Exception) -> str:
    """A short reason for a failed write."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{first_line} (is the disk full?)"


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
