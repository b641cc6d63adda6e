"""The files of `train.engine.TorchEngine`: one process, safetensors, one name per tensor."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vilg.checkpoint.reader.base import Kind, OnOpen, Weights
from vilg.checkpoint.state import RunState
from vilg.errors import UserError

MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"


class TorchWeights(Weights):
    """Reads them tensor by tensor."""

    tensor_size = 1

    def __init__(self, folder: Path, state: RunState, on_open: OnOpen | None = None) -> None:
        super().__init__(folder, state, on_open)
        self._files, self._keys = {}, {}
        for file in (MODEL_FILE, OPTIMIZER_FILE):
            try:
                self._files[file] = safe_open(folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / file}: cannot be read ({error}); use an earlier checkpoint") from None
            self._keys[file] = set(self._files[file].keys())

    @property
    def optimizer_steps(self) -> int:
        key = f"step.{self.names[0]}"
        return int(self._files[OPTIMIZER_FILE].get_tensor(key)) if key in self._keys[OPTIMIZER_FILE] else 0

    def _local(self, name: str, kind: Kind, rank: int) -> Tensor:
        if kind == "weight" or (kind == "master" and not self.has_masters):
            return self._get(MODEL_FILE, name)
        if kind != "master" and not self.optimizer_steps:
            return torch.zeros(self.shape(name))
        return self._get(OPTIMIZER_FILE, f"{kind}.{name}")

    def _get(self, file: str, key: str) -> Tensor:
        if key not in self._keys[file]:
            raise UserError(f"{self.folder / file}: holds no {key}; the checkpoint is damaged, use an earlier one")
        self._on_open(self.folder, self.state, file)
        return self._files[file].get_tensor(key)
