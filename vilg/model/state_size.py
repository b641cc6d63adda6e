"""Bytes of training state on one rank: weights, gradients and the optimizer's, parameter by parameter.

Shapes are read off the model's own layers, built on the meta device. DeepSpeed 0.19.8 cuts them by these rules
(files of `deepspeed/runtime`; n numbers of a parameter, d data ranks, all per optimizer group where one is named):

    no ZeRO   nothing is cut: `train/engine.py: TorchEngine`, and DeepSpeed's engine with stage 0
    ZeRO 1    a group's weights lie in one buffer, padded to a multiple of 2 d; a rank has 1 / d of its fp32 copy and of
              Adam's moments, and whole gradients: in bf16 that sum up in fp32 they are padded alike
              (`bf16_optimizer.py: BF16_Optimizer._setup_for_real_optimizer`), else each parameter has its own
    ZeRO 2    as 1, and of the gradients what `zero/stage_1_and_2.py: _build_compact_grad_partition_buffer` makes, 1 / d
              of the padded group; where they sum up in the weights' own type, instead every parameter of which a
              rank's part has a piece, whole, and with several micro-batches the sum beside the newest
              (`copy_grads_in_partition`, `independent_gradient_partition_epilogue`)
    ZeRO 3    ceil(n / d) of every parameter (`zero/partition_parameters.py: _aligned_size`, `_partition_param`), with
              its fp32 copy, moments and gradient; small parameters also stay whole, d ceil(n / d)
              (`zero/parameter_offload.py: mark_persistent_parameters`, `stage3.py: _post_step`), and of the others a
              node's ranks share a second copy, d ceil(n / d) / ranks (`_partition_param_sec`)

Under ZeRO fp32 weights have an fp32 copy too: `zero/stage3.py: _create_fp32_partitions` would share it, but compares a
device with its name. Gradients are those at the end of a step's last backward. Not in it: Adam's step counters (4 bytes
a tensor), the buffers that gradients travel in (`tools/plan/memory.py`), the one in which offload under ZeRO 1 and 2
stages a parameter, padding by `parameter_alignment`, and what exists only while the optimizer steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vilg.config.deepspeed import offloads_optimizer, secondary_partition, zero_stage
from vilg.config.schema import ModelConfig
from vilg.model.size import stage_bounds, stage_costs
from vilg.model.vilg import layer_list
from vilg.parallel.grid import Grid
from vilg.parallel.layout import rule_of
from vilg.tokens.sequence import SequenceSpec

_ALIGNMENT = 2  # numbers; DeepSpeed's nccl_start_alignment_factor
_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
_MASTER_BYTES, _MOMENT_BYTES = 4, 8  # of one parameter: fp32
_PERSISTENT = 10**5  # numbers; DeepSpeed's stage3_param_persistence_threshold where its file says nothing


@dataclass(frozen=True)
class Parameter:
    """A parameter as one tensor rank holds it: its numbers, and which of `train/optim.py: parameter_groups` it is in."""

    numel: int
    decay: bool


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one rank holds throughout training; with offload, some of them in the host's memory."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@lru_cache(maxsize=256)
def stage_parameters(
    config: ModelConfig, spec: SequenceSpec, *, tensor: int = 1, pipeline: int = 1
) -> tuple[tuple[Parameter, ...], ...]:
    """Of every pipeline stage, the parameters on one of its ranks before ZeRO, in the module's order.

    Raises ValueError as `size.stage_bounds` does.
    """
    bounds = stage_bounds(stage_costs(config, spec), pipeline)
    layers = [
        [Parameter(numel // tensor if is_split else numel, decay) for numel, is_split, decay in layer]
        for layer in _layers(config, spec)
    ]
    stages = (layers[start:stop] for start, stop in zip(bounds, bounds[1:]))
    return tuple(tuple(parameter for layer in stage for parameter in layer) for stage in stages)


def state_bytes(
    parameters: Sequence[Parameter], *, precision: str, zero: Mapping[str, Any], data_size: int, micro_batches: int = 1
) -> StateBytes:
    """Training state of the fullest of `data_size` ranks that hold `parameters` before ZeRO.

    zero: the DeepSpeed file's values; empty for engine torch.
    """
    stage, width = zero_stage(zero), _WIDTH[precision]
    summed = zero.get("data_types", {}).get("grad_accum_dtype") or precision
    numels = [parameter.numel for parameter in parameters]
    if stage == 0:
        # The torch engine widens 16-bit gradients into fp32 sums once the backward has ended.
        newest = width if precision != "fp32" and micro_batches > 1 else 0
        masters = 0 if precision == "fp32" else _MASTER_BYTES
        return _bytes_each(sum(numels), width, _MASTER_BYTES + newest, masters + _MOMENT_BYTES)
    if stage == 3:
        part = sum(-(-numel // data_size) for numel in numels)
        held = _bytes_each(part, width, _WIDTH[summed], _MASTER_BYTES + _MOMENT_BYTES)
        beside = width * _beside_the_parts(numels, zero, data_size)
        return StateBytes(held.weights + beside, held.gradients, held.optimizer)
    groups = [[p.numel for p in parameters if p.decay == decay] for decay in (True, False)]
    padded = sum(_padded(sum(group), data_size) for group in groups)
    part = padded // data_size
    if stage == 2:
        compact = summed == "fp32" != precision
        buffers = 1 if micro_batches == 1 else 2
        whole = 0 if compact else _whole_gradients(groups, data_size, buffers=buffers)
        gradients = _WIDTH["fp32"] * part if compact else width * whole
    else:
        is_flat = (precision, summed) == ("bf16", "fp32") and not offloads_optimizer(zero)
        gradients = _WIDTH[summed] * (padded if is_flat else sum(numels))
    return StateBytes(width * padded, gradients, (_MASTER_BYTES + _MOMENT_BYTES) * part)


@lru_cache(maxsize=64)
def _layers(config: ModelConfig, spec: SequenceSpec) -> list[list[tuple[int, bool, bool]]]:
    """(numbers of the whole parameter, whether tensor ranks split it, whether it decays) by layer."""
    found = []
    for index, (build, arguments) in enumerate(layer_list(config, spec, grid=Grid.single(), device="meta")):
        named = build(**arguments).named_parameters()
        rules = ((p.numel(), rule_of(f"layers.{index}.{name}")) for name, p in named)
        found.append([(numel, rule.dim is not None, rule.decay) for numel, rule in rules])
    return found


def _bytes_each(count: int, *bytes_each: int) -> StateBytes:
    return StateBytes(*(count * each for each in bytes_each))


def _padded(count: int, data_size: int) -> int:
    step = _ALIGNMENT * data_size
    return -(-count // step) * step


def _whole_gradients(groups: Iterable[Sequence[int]], data_size: int, *, buffers: int) -> int:
    """Numbers of the parameters that have a piece in a rank's part of their group, `buffers` times, and of what pads
    the part, on the rank that has most."""
    held = [0] * data_size
    for group in groups:
        start, part = 0, _padded(sum(group), data_size) // data_size
        for numel in group:
            for rank in range(start // part, (start + numel - 1) // part + 1):
                held[rank] += buffers * numel
            start += numel
        for rank in range(start // part, data_size) if part else ():
            held[rank] += min(part, (rank + 1) * part - start)
    return max(held)


def _beside_the_parts(numels: Iterable[int], zero: Mapping[str, Any], data_size: int) -> int:
    """Numbers that ZeRO 3 keeps beside a rank's parts: small parameters whole, a node's second copy of the others."""
    if data_size == 1:
        return 0  # the parts are the parameters
    section, ranks = zero["zero_optimization"], secondary_partition(zero)
    smallest = section.get("stage3_param_persistence_threshold", _PERSISTENT)
    left = section.get("stage3_model_persistence_threshold", float("inf"))
    count = 0
    for numel in numels:
        aligned = -(-numel // data_size) * data_size
        if numel <= min(smallest, left):
            left -= numel
            count += aligned
        elif ranks:
            count += aligned // ranks
    return count
