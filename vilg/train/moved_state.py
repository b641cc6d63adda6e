"""Weights and Adam's state from a checkpoint of any layout into an optimizer of this one.

Every rank reads its own part, one tensor at a time, through `checkpoint.reader`: DeepSpeed's universal checkpoint does
the same in a second copy on the disk, but not for ZeRO 3 with tensor parallelism, nor between ZeRO 1 or 2 and 3.
Where DeepSpeed 0.19 keeps what is described in `checkpoint/reader/deepspeed_files.py`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from vilg.checkpoint.reader import MOMENTS, Kind, Weights
from vilg.errors import UserError
from vilg.parallel.grid import Grid

Part = Callable[[str, Kind], Tensor]  # name, kind -> this tensor rank's part, or a view of it


def part_reader(weights: Weights, grid: Grid) -> Part:
    """What this tensor rank holds of any parameter."""
    return lambda name, kind: weights.part(name, kind=kind, rank=grid.tensor_rank, size=grid.tensor_size)


def check_names(weights: Weights, names: Mapping[str, object]) -> None:
    """Raises UserError naming parameters of this model that the checkpoint does not hold."""
    missing = sorted(names.keys() - set(weights.names))
    if missing:
        raise UserError(f"{weights.folder} holds no {', '.join(missing[:3])}: it is a checkpoint of another model")


@torch.no_grad()
def fill_plain(optimizer: torch.optim.Optimizer, masters: Mapping[str, Tensor], part: Part, *, steps: int) -> None:
    """An optimizer over whole parameters (one process, or DeepSpeed without ZeRO)."""
    for name, master in masters.items():
        master.copy_(part(name, "master"))
        if steps:
            entry = _fresh_entry(optimizer, master, steps)
            for moment in MOMENTS:
                entry[moment].copy_(part(name, moment))


@torch.no_grad()
def fill_flat(zero, named: Mapping[str, nn.Parameter], part: Part, *, steps: int) -> None:
    """ZeRO 1 and 2, and DeepSpeed's bf16 optimizer: fragments of parameters in this data rank's flat fp32 pieces."""
    flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    entries = [_fresh_entry(zero.optimizer, flat, steps) if steps else None for flat in flats]
    for name, parameter in named.items():
        master = part(name, "master")
        parameter.copy_(master)
        mapping = parameter._hp_mapping
        if mapping is None:  # nothing of it lies in this rank's pieces
            continue
        start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        mapping.hp_fragment.copy_(master.reshape(-1)[start : start + count])
        if entry := entries[mapping.param_group_index]:
            place = mapping.hp_fragment_address
            for moment in MOMENTS:
                whole = part(name, moment).reshape(-1)
                entry[moment].narrow(0, place.start, place.numel).copy_(whole[start : start + count])


@torch.no_grad()
def fill_cut(zero, names: Mapping[nn.Parameter, str], part: Part, *, data_rank: int, steps: int) -> None:
    """ZeRO 3: every parameter is cut into equal parts over the data ranks, the last padded."""
    for parameters, low, flat in zip(
        zero.fp16_groups, zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True
    ):
        entry = _fresh_entry(zero.optimizer, flat, steps) if steps else {}
        offset = 0
        for parameter in parameters:
            count = parameter.partition_numel()
            for kind, target in {"master": flat, **{moment: entry[moment] for moment in MOMENTS if entry}}.items():
                piece = part(names[parameter], kind).reshape(-1)[data_rank * count : (data_rank + 1) * count]
                target.narrow(0, offset, piece.numel()).copy_(piece)
                target.narrow(0, offset + piece.numel(), count - piece.numel()).zero_()
            offset += count
        low.copy_(flat)  # the parameters' own parts are views of it
    if kept := zero.persistent_parameters:  # small ones that every rank holds whole
        kept[0].partition(kept)
    zero.checkpoint_event_epilogue()  # gathers them again, and drops the nodes' own copies if there are any


def _fresh_entry(optimizer: torch.optim.Optimizer, tensor: Tensor, steps: int) -> dict[str, Tensor]:
    """Adam's state of one tensor after `steps` updates, moments zero, set in the optimizer."""
    entry = {moment: torch.zeros_like(tensor, dtype=torch.float32) for moment in MOMENTS}
    if isinstance(optimizer, torch.optim.AdamW):
        entry["step"] = torch.tensor(float(steps), device=tensor.device)
    else:  # apex counts in the groups
        for group in optimizer.param_groups:
            group["step"] = steps
    optimizer.state[tensor] = entry
    return entry
