"""Weight files that also hold Python objects, as PyTorch Lightning writes them: their tensors, without the objects.

Nothing is ever unpickled. torch's restricted reader refuses every class it does not know; asked to, we tell it to put an
inert stand-in where one of the names below occurs, and it still refuses all others. Stand-ins keep nothing and do nothing.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from vilg.errors import UserError
from vilg.tokens.vqgan.weights import TORCH, read_weights


class _Inert:
    """Takes the place of any object."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __new__(cls, *_: object, **__: object) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class _InertMapping:
    """Takes the place of a class derived from dict: torch's reader sets items of plain dictionaries only."""

    def __new__(cls, *_: object, **__: object) -> OrderedDict:
        return OrderedDict()


_LIGHTNING = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
_MAPPINGS = (
    "collections.defaultdict",
    *(f"{package}.utilities.{where}.AttributeDict" for package in _LIGHTNING for where in ("parsing", "data")),
)
_OBJECTS = (
    *(f"{package}.callbacks.model_checkpoint.ModelCheckpoint" for package in _LIGHTNING),
    *(f"{package}.callbacks.early_stopping.EarlyStopping" for package in _LIGHTNING),
    *(f"{package}.callbacks.lr_monitor.LearningRateMonitor" for package in _LIGHTNING),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("Metadata", "ContainerMetadata")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Integer", "Float", "String", "Boolean")),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "object")),
    *(f"numpy.{where}.multiarray.scalar" for where in ("core", "_core")),
    "numpy.dtype", "typing.Any", "argparse.Namespace", "pathlib.PosixPath",
)  # fmt: skip
KNOWN = frozenset(_MAPPINGS + _OBJECTS)


def read_untrusted(path: Path, *, allow_pickled_objects: bool) -> Any:
    """Content of a weight file, on the CPU, with stand-ins for the objects named in `KNOWN` if they are allowed.

    Raises UserError naming the objects in it that are not, or what is wrong with the file.
    """
    path = Path(path)
    found = _objects_in(path) if path.suffix in TORCH else set()
    if not found:
        return read_weights(path)
    if not allow_pickled_objects:
        raise UserError(
            f"{path}: holds pickled objects ({_some(found)}), which could run code if they were loaded; "
            "--allow-pickled-objects puts inert stand-ins in the place of known ones and reads the tensors"
        )
    if found - KNOWN:
        raise UserError(
            f"{path}: holds pickled objects that are not on the list of known ones: {_some(found - KNOWN)}; save its "
            "state_dict alone (torch.save(checkpoint['state_dict'], ...)) where you trust the file, and import that"
        )
    stand_ins = [(_InertMapping, name) for name in _MAPPINGS] + [(_Inert, name) for name in _OBJECTS]
    with torch.serialization.safe_globals(stand_ins):
        return read_weights(path)


def _objects_in(path: Path) -> set[str]:
    """Names of what torch's restricted reader would refuse; without running anything."""
    try:
        return {_full(name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)}
    except Exception:  # not a zip file of torch: the restricted reader has the word
        return set()


def _full(name: str) -> str:
    return name.replace("__builtin__.", "builtins.") if "." in name else f"builtins.{name}"


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
