"""Whole weights out of sharded checkpoint files, one tensor at a time, on a CPU and without DeepSpeed.

Files are mapped, not read: memory stays near the largest tensor. Three kinds of files, one way in:
the torch engine's safetensors; ZeRO 0-2, whose module is whole on every data rank and whose fp32 masters are cut flat
over the data ranks; ZeRO 3, where only flat fp32 pieces exist. Tensor ranks are joined by parallel/layout.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vilg.checkpoint.state import RunState, read_state
from vilg.checkpoint.tensors import load_tensors
from vilg.errors import UserError
from vilg.parallel import layout

_SAFE_MODEL, _SAFE_OPTIMIZER = "model.safetensors", "optimizer.safetensors"


class Weights(ABC):
    """The weights of one checkpoint. names: sorted, the same for every kind of files. has_masters: whether there are
    fp32 weights finer than the module's."""

    def __init__(self, folder: Path, state: RunState) -> None:
        self.folder, self.state = folder, state
        self.has_masters = state.layout["precision"] != "fp32"

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole parameter."""

    @abstractmethod
    def read(self, name: str, *, master: bool) -> Tensor:
        """The whole parameter: the fp32 master weights, or the weights in the dtype that the run computes with."""

    def sizes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every parameter."""
        return ((name, self.shape(name)) for name in self.names)


def open_weights(folder: Path) -> Weights:
    """Open a checkpoint folder. Raises UserError naming a file that is missing, cut, damaged or refused."""
    state = read_state(folder)
    if state.layout["engine"] == "torch":
        return TorchWeights(folder, state)
    if state.layout["pipeline"] > 1:
        raise UserError(f"{folder} was saved with pipeline={state.layout['pipeline']}; this vilg reads pipeline=1")
    return Zero3Weights(folder, state) if state.layout["zero_stage"] == 3 else ZeroWeights(folder, state)


class TorchWeights(Weights):
    """Files of `train.engine.TorchEngine`."""

    def __init__(self, folder: Path, state: RunState) -> None:
        super().__init__(folder, state)
        try:
            self.model = safe_open(folder / _SAFE_MODEL, framework="pt")
            self.optimizer = safe_open(folder / _SAFE_OPTIMIZER, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: cannot be read ({error}); use another checkpoint") from None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.model.keys(), key=_natural))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.model.get_slice(name).get_shape())

    def read(self, name: str, *, master: bool) -> Tensor:
        if master and self.has_masters:
            return self.optimizer.get_tensor(f"master.{name}")
        return self.model.get_tensor(name)


class ZeroWeights(Weights):
    """Files of DeepSpeed's ZeRO stages 0 to 2."""

    def __init__(self, folder: Path, state: RunState) -> None:
        super().__init__(folder, state)
        self.tensor_size = state.layout["tensor"]
        self.modules = [
            load_tensors(folder / f"mp_rank_{rank:02d}_model_states.pt", mmap=True)["module"]
            for rank in range(self.tensor_size)
        ]
        # Per tensor rank and data rank: name -> its flat piece of the fp32 masters.
        self.pieces = [self._pieces(rank) for rank in range(self.tensor_size)] if self.has_masters else []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.modules[0], key=_natural))

    def shape(self, name: str) -> tuple[int, ...]:
        return layout.full_shape(name, self.modules[0][name].shape, size=self.tensor_size)

    def read(self, name: str, *, master: bool) -> Tensor:
        if not (master and self.has_masters):
            return layout.merge(name, [module[name] for module in self.modules])
        parts = []
        for module, pieces in zip(self.modules, self.pieces):
            flat = torch.cat([rank[name] for rank in pieces if name in rank])
            if flat.numel() != module[name].numel():
                raise UserError(
                    f"{self.folder}: fp32 weights of {name} are incomplete: {flat.numel()} of {module[name].numel()}"
                )
            parts.append(flat.view(module[name].shape))
        return layout.merge(name, parts)

    def _pieces(self, tensor_rank: int) -> list[dict[str, Tensor]]:
        found = []
        for data_rank in range(self.state.layout["data"]):
            optimizer = _optimizer_file(self.folder, data_rank, tensor_rank)
            found.append(
                {
                    # An address says where in this rank's flat partition the parameter's piece lies.
                    name: partition.detach().narrow(0, address.start, address.numel)
                    for partition, addresses in zip(
                        optimizer["single_partition_of_fp32_groups"], optimizer["param_slice_mappings"], strict=True
                    )
                    for name, address in addresses.items()
                }
            )
        return found


class Zero3Weights(Weights):
    """Files of DeepSpeed's ZeRO stage 3: every parameter is cut flat into `data` equal parts, the last one padded."""

    def __init__(self, folder: Path, state: RunState) -> None:
        super().__init__(folder, state)
        self.has_masters = True  # fp32 is all there is
        self.tensor_size, data = state.layout["tensor"], state.layout["data"]
        self.shapes: list[dict[str, torch.Size]] = []
        self.parts: list[dict[str, list[Tensor]]] = []
        for rank in range(self.tensor_size):
            header = load_tensors(folder / f"zero_pp_rank_0_mp_rank_{rank:02d}_model_states.pt", mmap=True)
            shapes = {name: shape for group in header["param_shapes"] for name, shape in group.items()}
            parts: dict[str, list[Tensor]] = {name: [] for name in shapes}
            for data_rank in range(data):
                _take_apart(_optimizer_file(folder, data_rank, rank)["fp32_flat_groups"], shapes, data, parts)
            self.shapes.append(shapes)
            self.parts.append(parts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.shapes[0], key=_natural))

    def shape(self, name: str) -> tuple[int, ...]:
        return layout.full_shape(name, self.shapes[0][name], size=self.tensor_size)

    def read(self, name: str, *, master: bool) -> Tensor:
        whole = [
            torch.cat(parts[name])[: math.prod(shapes[name])].view(shapes[name])
            for parts, shapes in zip(self.parts, self.shapes)
        ]
        joined = layout.merge(name, whole)
        return joined if master else joined.to(_DTYPES[self.state.layout["precision"]])


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _optimizer_file(folder: Path, data_rank: int, tensor_rank: int) -> dict[str, Any]:
    name = f"zero_pp_rank_{data_rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"
    # DeepSpeed's separate bf16 optimizer puts its name before.
    path = next((p for p in (folder / f"bf16_{name}", folder / name) if p.exists()), folder / name)
    return load_tensors(path, mmap=True)["optimizer_state_dict"]


def _take_apart(groups: list[Tensor], shapes: dict[str, torch.Size], data: int, parts: dict[str, list[Tensor]]) -> None:
    """Append one data rank's piece of every parameter, which lie one after another in its flat groups."""
    group, offset = 0, 0
    for name, shape in shapes.items():
        size = -(-math.prod(shape) // data)
        while offset + size > groups[group].numel():
            group, offset = group + 1, 0
        parts[name].append(groups[group].detach().narrow(0, offset, size))
        offset += size


def _natural(name: str) -> tuple:
    """Sort key that puts layers.10 behind layers.9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))
