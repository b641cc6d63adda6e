"""DeepSpeed's files (0.19), for every ZeRO stage, tensor and pipeline size.

    mp_rank_MM_model_states.pt                            weights of model rank MM = stage * tensor size + tensor rank
    layer_LL-model_TT-model_states.pt                     weights of one layer, instead, under a pipeline
    [bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt      ZeRO 1-3: data rank D's cut of fp32 weights and moments
    zero_pp_rank_D_mp_rank_MM_model_states.pt             ZeRO 3: no weights, but the order in which they are cut

ZeRO 1 and 2 lay the parameters of a group end to end and cut that line over the data ranks: an address per parameter
says where in a rank's piece its fragment lies. ZeRO 3 cuts every parameter by itself into equal parts, the last padded,
and lays a rank's parts end to end. Without ZeRO the moments lie in the model file under running numbers.
"""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vilg.checkpoint.reader.base import MOMENTS, Kind, OnOpen, Weights
from vilg.checkpoint.state import RunState
from vilg.checkpoint.tensors import load_tensors
from vilg.errors import UserError
from vilg.parallel.layout import rule_of

Address = tuple[int, int]  # start, count


class DeepSpeedWeights(Weights):
    """Reads them tensor by tensor; a file is mapped when something in it is first asked for."""

    def __init__(self, folder: Path, state: RunState, on_open: OnOpen | None = None) -> None:
        super().__init__(folder, state, on_open)
        self.data, self.pipeline, self.stage = (state.layout[key] for key in ("data", "pipeline", "zero_stage"))
        self._open = cache(self._open_file)
        self._pieces = cache(self._pieces_of)
        self._numbered = cache(self._numbered_states)

    @property
    def tensor_size(self) -> int:
        return self.state.layout["tensor"]

    @property
    def optimizer_steps(self) -> int:
        name = self.names[0]
        if self.stage == 0:
            entry, group = self._numbered(self._model_rank(name, 0))[name]
        else:
            (_, entry, group), *_ = self._pieces(self._model_rank(name, 0))[name]
        return int(entry.get("step", group.get("step", 0)))  # apex counts in the group

    def _local(self, name: str, kind: Kind, rank: int) -> Tensor:
        if not self._in_fragments(kind):
            return self._whole(name, kind, rank)
        flats = list(self._fragments(name, kind, rank))
        return (flats[0] if len(flats) == 1 else torch.cat(flats)).view(self.local_shape(name))

    def _in_fragments(self, kind: Kind) -> bool:
        """Whether data ranks hold pieces of what a tensor rank has of a parameter."""
        if kind in MOMENTS:
            return self.stage > 0 and self.optimizer_steps > 0
        return self.stage == 3 or (self.stage > 0 and kind == "master" and self.has_masters)

    def _whole(self, name: str, kind: Kind, rank: int) -> Tensor:
        if kind in MOMENTS and not self.optimizer_steps:
            return torch.zeros(self.local_shape(name))
        if kind == "weight" or (kind == "master" and not self.has_masters):
            return self._module(name, rank)
        return self._numbered(self._model_rank(name, rank))[name][0][kind]

    def _fragments(self, name: str, kind: Kind, rank: int) -> Iterator[Tensor]:
        if not self._in_fragments(kind):
            yield from super()._fragments(name, kind, rank)
            return
        count = missing = math.prod(self.local_shape(name))
        for address, entry, _ in self._pieces(self._model_rank(name, rank))[name]:
            flat = _cut(address, entry, kind)[:missing]  # ZeRO 3 pads the last part
            missing -= flat.numel()
            yield flat.to(self.dtype) if kind == "weight" else flat
        if missing:
            raise UserError(f"{self.folder}: {kind} of {name} is incomplete: {count - missing} of {count} numbers")

    def _module(self, name: str, rank: int) -> Tensor:
        if self.pipeline == 1:
            file, key = f"mp_rank_{rank:02d}_model_states.pt", name
            found = self._open(file)["module"]
        else:
            _, layer, key = name.split(".", 2)
            file = f"layer_{int(layer):02d}-model_{rank:02d}-model_states.pt"
            found = self._open(file)
        if key not in found:
            raise UserError(f"{self.folder / file}: holds no {key}; the checkpoint is damaged, use an earlier one")
        return found[key]

    def _model_rank(self, name: str, rank: int) -> int:
        return self.state.parameters[name]["stage"] * self.tensor_size + rank

    def _open_file(self, name: str) -> dict[str, Any]:
        self._on_open(self.folder, self.state, name)
        return load_tensors(self.folder / name, mmap=True)

    def _optimizer(self, mp_rank: int, data_rank: int) -> dict[str, Any]:
        name = f"zero_pp_rank_{data_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"
        if f"bf16_{name}" in self.state.files:  # DeepSpeed's separate bf16 optimizer puts its name before
            name = f"bf16_{name}"
        return self._open(name)["optimizer_state_dict"]

    def _pieces_of(self, mp_rank: int) -> dict[str, list[tuple[Address, dict, dict]]]:
        """Name -> for each data rank that holds some of it: ((start, count), tensors of that flat group, its settings)."""
        found: dict[str, list[tuple[Address, dict, dict]]] = {}
        for data_rank in range(self.data):
            optimizer = self._optimizer(mp_rank, data_rank)
            flats = optimizer["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"]
            base = optimizer["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
            for group, addresses in enumerate(self._addresses(optimizer, mp_rank)):
                tensors = {"master": flats[group], **base["state"].get(group, {})}
                # ZeRO 3 may cut a group into several flat ones; the count that apex keeps here is the same in all.
                settings = base["param_groups"][0]
                for name, address in addresses:
                    found.setdefault(name, []).append((address, tensors, settings))
        return found

    def _addresses(self, optimizer: dict[str, Any], mp_rank: int) -> Iterator[list[tuple[str, Address]]]:
        """For each flat group: (name, (start, count)) of every parameter's piece in it."""
        if self.stage < 3:
            for addresses in optimizer["param_slice_mappings"]:
                yield [(name, (address.start, address.numel)) for name, address in addresses.items()]
            return
        for shapes in self._open(f"zero_pp_rank_0_mp_rank_{mp_rank:02d}_model_states.pt")["param_shapes"]:
            found, offset = [], 0
            for name, shape in shapes.items():
                count = -(-math.prod(shape) // self.data)
                found.append((name, (offset, count)))
                offset += count
            yield found

    def _numbered_states(self, mp_rank: int) -> dict[str, tuple[dict, dict]]:
        """Without ZeRO: name -> (tensors of that parameter, settings of its group)."""
        optimizer = self._open(f"mp_rank_{mp_rank:02d}_model_states.pt")["optimizer"]
        stage = mp_rank // self.tensor_size
        here = [name for name, entry in self.state.parameters.items() if entry["stage"] == stage]
        # train/optim.py makes two groups, decayed and not; DeepSpeed drops an empty one.
        groups = [[name for name in here if rule_of(name).decay is decay] for decay in (True, False)]
        groups = [group for group in groups if group]
        return {
            name: (optimizer["state"].get(number, {}), settings)
            for names, settings in zip(groups, optimizer["param_groups"], strict=True)
            for name, number in zip(names, settings["params"], strict=True)
        }


def _cut(address: Address, tensors: dict[str, Tensor], kind: Kind) -> Tensor:
    start, count = address
    return tensors["master" if kind == "weight" else kind].detach().narrow(0, start, count)
