"""The weights of an export folder, tensor by tensor or part by part; files are mapped, not read."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from vilg.errors import UserError
from vilg.inference.format import INDEX_FILE
from vilg.parallel import layout

NO_EXPORT = "not found; expected an export folder made by `vilg export`"


class FolderWeights:
    """The tensors that the index of `folder` names. Raises UserError naming a file that is missing, cut or foreign."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _read_index(folder / INDEX_FILE)
        self._files: dict[str, Any] = {}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor; opens all files."""
        return {name: tuple(self._opened(name).get_slice(name).get_shape()) for name in self.index}

    def read(self, name: str, *, rank: int = 0, size: int = 1) -> Tensor:
        """What tensor rank `rank` of `size` holds of a parameter; only those bytes are read."""
        source = self._opened(name)
        dim = layout.rule_of(name).dim
        if dim is None or size == 1:
            return source.get_tensor(name)
        piece = source.get_slice(name)
        whole = piece.get_shape()[dim]
        if whole % size:
            raise UserError(f"{name}: {whole} rows or columns cannot be cut for {size} tensor ranks")
        return piece[(slice(None),) * dim + (slice(rank * whole // size, (rank + 1) * whole // size),)]

    def _opened(self, name: str) -> Any:
        if name not in self.index:
            raise UserError(f"{self.folder / INDEX_FILE}: names no {name}; export the checkpoint again")
        file = self.index[name]
        path = self.folder / file
        if file not in self._files:
            try:
                self._files[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise UserError(f"{path}: shard named by {INDEX_FILE} is missing; copy it, or export again") from None
            except Exception as error:  # safetensors raises its own type for cut or foreign files
                raise UserError(f"{path}: not a readable safetensors file ({error}); copy it again") from None
        if name not in self._files[file].keys():
            raise UserError(f"{path}: holds no {name}, which {INDEX_FILE} says is there; export again")
        return self._files[file]


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, as Hugging Face's index files hold it."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(file, str) and file == os.path.basename(file) for file in names.values())
    except FileNotFoundError:
        raise UserError(f"{path}: {NO_EXPORT}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no index of weights ({error}); export the checkpoint again") from None
    if not plain:
        raise UserError(f"{path}: names a file outside its folder; only plain file names are read")
    return names
