"""Checkpoints in DeepSpeed's files without a training run: as large as wanted, made one file at a time.

What is not a tensor is taken from a real save of a tiny model under the same ZeRO stage; `check_format` makes such a
save anew from itself and compares keys, types, shapes, addresses and storage sizes, so that nothing here can drift from
DeepSpeed.
Legend: D data ranks, M tensor ranks. Weights have the initial values' scale; Adam's moments are small constants.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.distributed.helpers import run_distributed
from tests.distributed.resume_support import Job, Layout, train_jobs
from tests.golden.make import make_data
from vilg.checkpoint.load import latest_checkpoint
from vilg.checkpoint.probes import PROBE_FILE, compute_probes, save_probes
from vilg.checkpoint.reader import open_weights
from vilg.checkpoint.state import STATE_FILE, RunState, parameter_table, read_state
from vilg.checkpoint.stream import load_when_used
from vilg.checkpoint.tensors import load_tensors, save_tensors
from vilg.config.schema import ModelConfig
from vilg.model.vilg import Vilg
from vilg.parallel import layout
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks
from vilg.tokens.sequence import SequenceSpec

# Four of the 10B model's 48 layers. Few slots, and a text vocabulary cut from 32768, keep the rest small beside them.
TEN_BILLION_LAYERS = {
    "model": {"num_layers": 4, "hidden_size": 4096, "num_heads": 64},
    "tokens": {"text_vocab_size": 4096, "image_vocab_size": 8192},
}
_SHORT = {"schedule.steps": 4, "schedule.warmup_steps": 2, "checkpoint.every_steps": 4, "logging.tensorboard": "false"}
_LAYOUTS = {"zero3": Layout(data=2, zero=3), "tensor": Layout(tensor=2, data=2, zero=1)}


def real_saves(folder: Path) -> dict[str, Path]:
    """Checkpoints of a tiny bf16 model that DeepSpeed itself saved, by layout."""
    folder.mkdir(parents=True)
    data = make_data(folder)
    found = {}
    for name, sizes in _LAYOUTS.items():
        run = folder / name
        overrides = {**data, **_SHORT, **sizes.overrides(), "precision": "bf16", "run_dir": run}
        errors = run_distributed(sizes.processes, train_jobs, ([Job(overrides)],), init=False, timeout=600)
        assert not any(error for rank in errors for error in rank), errors
        found[name] = latest_checkpoint(run)
    return found


def write_checkpoint(
    folder: Path, real: Path, *, data: int, tensor: int, changes: dict[str, dict] = TEN_BILLION_LAYERS
) -> None:
    """Make `folder` a checkpoint like `real`, on D = data and M = tensor ranks, of the model that `changes` make."""
    folder.mkdir(parents=True)
    before = read_state(real)
    recipe = {key: {**value, **changes[key]} if key in changes else value for key, value in before.recipe.items()}
    sequence = {key: recipe["tokens"][key] for key in ("text_slots", "grid", "text_vocab_size", "image_vocab_size")}
    with torch.device("meta"):
        model = Vilg(ModelConfig(**recipe["model"]), SequenceSpec(**sequence))
    state = replace(
        before,
        recipe=recipe,
        layout={**before.layout, "data": data, "tensor": tensor},
        parameters=parameter_table(model, Grid.single(), Ranks()),
    )
    write = _write_zero3 if before.layout["zero_stage"] == 3 else _write_zero1
    checksums = write(folder, real, state)
    _finish(folder, state, checksums)  # the probes need a checkpoint that can be opened
    weights = open_weights(folder)
    load_when_used(model.to(weights.dtype), _Computed(weights), weights.dtype, lambda _: None)
    checksums[PROBE_FILE] = save_probes(compute_probes(model, device="cpu"), folder / PROBE_FILE)
    _finish(folder, state, checksums)


def check_format(real: Path, folder: Path) -> None:
    """Make a copy of a real save and compare. Raises AssertionError naming the file and the first difference."""
    sizes = read_state(real).layout
    write_checkpoint(folder, real, data=sizes["data"], tensor=sizes["tensor"], changes={})
    assert {p.name for p in real.iterdir()} == {p.name for p in folder.iterdir()}
    for path in sorted(real.glob("*.pt")):
        ours, theirs = (dict(_described(_load(place / path.name))) for place in (folder, real))
        differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        assert not differing, f"{path.name}: {differing[0]}: {ours.get(differing[0])} for {theirs.get(differing[0])}"
        assert list(ours) == list(theirs), f"{path.name}: another order"


class _Computed:
    """A checkpoint's weights under the one call that `load_when_used` makes."""

    def __init__(self, weights) -> None:
        self.weights = weights

    def read(self, name: str) -> Tensor:
        return self.weights.read(name, kind="weight")


def _write_zero3(folder: Path, real: Path, state: RunState) -> dict[str, str]:
    data, shapes, checksums = state.layout["data"], _local_shapes(state), {}
    empty = torch.empty(0, dtype=torch.bfloat16)
    model_states = _load(real / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    model_states |= {
        "module": dict.fromkeys(shapes, empty),
        "param_shapes": [{name: shapes[name] for name in group} for group in _groups(shapes)],
        "dp_world_size": data,
    }
    template = _load(real / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for rank in range(data):
        flats = []
        for group in _groups(shapes):
            pieces = [(name, -(-shapes[name].numel() // data)) for name in group]
            flats.append(_filled(pieces, seed=rank))
        optimizer = {
            **template["optimizer_state_dict"],
            "partition_count": data,
            "fp32_flat_groups": flats,
            "optimizer_state_dict": _adam(template["optimizer_state_dict"]["optimizer_state_dict"], flats),
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        checksums |= _saved(folder, f"bf16_{name}_optim_states.pt", {**template, "optimizer_state_dict": optimizer})
        checksums |= _saved(folder, f"{name}_model_states.pt", model_states)
    return checksums


def _write_zero1(folder: Path, real: Path, state: RunState) -> dict[str, str]:
    from deepspeed.utils.tensor_fragment import fragment_address

    data, tensor, checksums = state.layout["data"], state.layout["tensor"], {}
    shapes = _local_shapes(state)
    groups = _groups(shapes)
    template = _load(real / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    model_template = _load(real / "mp_rank_00_model_states.pt")
    for mp in range(tensor):
        flats = [_filled([(name, shapes[name].numel()) for name in group], seed=mp) for group in groups]
        assert all(flat.numel() % (2 * data) == 0 for flat in flats), "DeepSpeed would pad this group"
        module = {}
        for group, flat in zip(groups, flats):
            rounded = flat.bfloat16()
            parts = rounded.split([shapes[name].numel() for name in group])
            module |= {name: part.view(shapes[name]) for name, part in zip(group, parts)}
        model_states = {
            **model_template,
            "module": {name: module[name] for name in shapes},
            "param_shapes": [{name: shapes[name] for name in group} for group in groups],
            "dp_world_size": data,
            "mp_world_size": tensor,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": tensor},
        }
        checksums |= _saved(folder, f"mp_rank_{mp:02d}_model_states.pt", model_states)
        for rank in range(data):
            cuts, mappings = [], []
            for group, flat in zip(groups, flats):
                size = flat.numel() // data
                cuts.append(flat[rank * size : (rank + 1) * size].clone())
                mappings.append({})
                offset = -rank * size
                for name in group:
                    start, stop = max(offset, 0), min(offset + shapes[name].numel(), size)
                    if start < stop:
                        mappings[-1][name] = fragment_address(numel=stop - start, start=start)
                    offset += shapes[name].numel()
            optimizer = {
                **template["optimizer_state_dict"],
                "partition_count": [data] * len(groups),
                "single_partition_of_fp32_groups": cuts,
                "base_optimizer_state": _adam(template["optimizer_state_dict"]["base_optimizer_state"], cuts),
                "param_slice_mappings": mappings,
            }
            name = f"bf16_zero_pp_rank_{rank}_mp_rank_{mp:02d}_optim_states.pt"
            checksums |= _saved(folder, name, {**template, "optimizer_state_dict": optimizer})
    return checksums


def _local_shapes(state: RunState) -> dict[str, torch.Size]:
    """Of a tensor rank's parameters, in the order of registration."""
    found = {}
    for name, entry in state.parameters.items():
        shape = list(entry["shape"])
        if entry["split"] is not None:
            shape[entry["split"]] //= state.layout["tensor"]
        found[name] = torch.Size(shape)
    return found


def _groups(shapes: dict[str, torch.Size]) -> list[list[str]]:
    """As train/optim.py makes them: decayed, and not."""
    return [[name for name in shapes if layout.rule_of(name).decay is decay] for decay in (True, False)]


def _filled(pieces: list[tuple[str, int]], *, seed: int) -> Tensor:
    """Pieces of parameters end to end, fp32, with values as at the start of a training."""
    flat = torch.empty(sum(count for _, count in pieces))
    generator, offset = torch.Generator().manual_seed(seed), 0
    for name, count in pieces:
        part, kind = flat.narrow(0, offset, count), layout.rule_of(name).init
        if kind in ("zeros", "ones"):
            part.fill_(float(kind == "ones"))
        else:
            part.uniform_(-0.03, 0.03, generator=generator)
        offset += count
    return flat


def _adam(template: dict[str, Any], flats: list[Tensor]) -> dict[str, Any]:
    states = {
        number: {
            **template["state"][number],
            "exp_avg": torch.full_like(flat, 1e-4),
            "exp_avg_sq": torch.full_like(flat, 1e-8),
        }
        for number, flat in enumerate(flats)
    }
    return {**template, "state": states}


def _saved(folder: Path, name: str, content: dict[str, Any]) -> dict[str, str]:
    return {name: save_tensors(content, folder / name)}


def _finish(folder: Path, state: RunState, checksums: dict[str, str]) -> None:
    files = {name: (folder / name).stat().st_size for name in sorted(checksums)}
    (folder / STATE_FILE).write_text(replace(state, files=files, checksums=checksums).to_json(), encoding="utf-8")


def _load(path: Path) -> dict[str, Any]:
    """With DeepSpeed's own classes, so that they can be written again."""
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = (loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum, fragment_address)
    return load_tensors(path, classes=classes)


def _described(value: Any, place: str = "") -> list[tuple[str, Any]]:
    """Every leaf's place with what must be the same in two files: type, shape, storage of tensors, else the value."""
    if isinstance(value, Tensor):
        return [(place, (value.dtype, tuple(value.shape), value.stride(), value.untyped_storage().nbytes()))]
    if isinstance(value, dict):
        own = [(place, type(value).__name__)]
        return own + [found for key, entry in value.items() for found in _described(entry, f"{place}/{key}")]
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        own = [(place, (type(value).__name__, len(value)))]
        return own + [found for i, entry in enumerate(value) for found in _described(entry, f"{place}/{i}")]
    return [(place, vars(value) if hasattr(value, "__dict__") else value)]
