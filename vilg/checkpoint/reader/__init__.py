"""Weights and optimizer state out of the files of any layout, one tensor at a time, on a CPU and without DeepSpeed.

    weights = open_weights(folder)
    weights.read("layers.1.ffn.up.weight", kind="exp_avg")                 # whole
    weights.part("layers.1.ffn.up.weight", kind="master", rank=1, size=2)   # what tensor rank 1 of 2 holds

Files are mapped, not read, and only those that are asked for are opened: memory stays near the largest tensor.
"""

from pathlib import Path

from vilg.checkpoint.reader.base import KINDS, MOMENTS, Kind, OnOpen, Weights
from vilg.checkpoint.state import RunState, read_state


def open_weights(folder: Path, state: RunState | None = None, *, on_open: OnOpen | None = None) -> Weights:
    """Open a checkpoint folder; `state` saves reading it again; `on_open` is told each file that tensors are taken from.

    Raises UserError naming a file that is missing, cut, damaged or refused.
    """
    from vilg.checkpoint.reader.deepspeed_files import DeepSpeedWeights
    from vilg.checkpoint.reader.torch_files import TorchWeights

    state = state or read_state(folder)
    return (TorchWeights if state.layout["engine"] == "torch" else DeepSpeedWeights)(folder, state, on_open)


__all__ = ["KINDS", "MOMENTS", "Kind", "Weights", "open_weights"]
