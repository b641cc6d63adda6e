"""A recipe on a number of GPUs: memory of the fullest rank and time of a step, from the config alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

from vilg.config import Recipe
from vilg.config.deepspeed import merged_deepspeed_config, offloads_optimizer, secondary_partition, zero_stage
from vilg.config.schema import ModelConfig, Recompute
from vilg.errors import UserError
from vilg.model import size
from vilg.model.state_size import Parameter, stage_parameters, state_bytes
from vilg.tokens.sequence import SequenceSpec
from vilg.tools.plan.hardware import DEFAULT_GPU, Gpu, gpu_named
from vilg.tools.plan.memory import (
    CONTEXT_BYTES,
    FRAGMENTED,
    Memory,
    activation_bytes,
    communication_bytes,
    logit_bytes,
)
from vilg.tools.plan.timing import Spread, Timing, Work, ring, step_time
from vilg.train.metrics import step_flops, step_recomputed_flops
from vilg.train.open import sequence_spec

EPOCH_PAIRS = 145e6  # ERNIE-ViLG's data (2112.15283 section 4.1); each pair gives both directions
FP32_SHARE = 1 / 16  # of the bf16 peak (A100: 19.5 of 312 TFLOP/s), for recipes with precision fp32
ATTENTION_SHARE = 0.5  # of what large matrix products reach, by attention over visible pairs: an estimate


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage: layers [first_layer, stop_layer) of `model/vilg.py: layer_list`, and one of its ranks."""

    first_layer: int
    stop_layer: int
    parameters: int
    in_flight: int
    memory: Memory
    work: Work


@dataclass(frozen=True)
class Plan:
    """What a step costs. Operations are those of `model/size.py`; tokens count all slots of all sequences.

    model_flops, hardware_flops: of a step over all ranks, without and with what is computed again. memory_per_rank:
    bytes of the fullest rank, in stage `worst_stage`; activations_by_mode: its activations under every `recompute`.
    not_counted: keys of the recipe whose memory and work are in no figure here.
    mfu = model_flops / (step_seconds * gpus * peak), hfu alike.
    """

    name: str
    gpus: int
    gpu: Gpu
    data: int
    tensor: int
    pipeline: int
    zero_stage: int
    zero_file: str
    precision: str
    sequence: bool
    recompute: str
    recompute_every: int
    micro_size: int
    micro_batches: int
    parameters: int
    stages: tuple[StagePlan, ...]
    worst_stage: int
    slowest_stage: int
    sequences_per_step: float
    tokens_per_step: float
    model_flops: float
    hardware_flops: float
    timing: Timing
    activations_by_mode: dict[str, int]
    not_counted: tuple[str, ...]

    @property
    def memory_per_rank(self) -> int:
        return self.stages[self.worst_stage].memory.total

    @property
    def memory_limit(self) -> int:
        return int(self.gpu.memory)

    @property
    def fits(self) -> bool:
        return self.memory_per_rank <= self.memory_limit

    @property
    def step_seconds(self) -> float:
        return self.timing.step

    @property
    def tokens_per_second(self) -> float:
        """Per GPU."""
        return self.tokens_per_step / self.step_seconds / self.gpus

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.step_seconds * self.gpus * self.gpu.peak_flops)

    @property
    def hfu(self) -> float:
        return self.hardware_flops / (self.step_seconds * self.gpus * self.gpu.peak_flops)

    @property
    def bubble(self) -> float:
        """Share of the step in which a rank waits for other stages: (stages - 1) / (micro-batches + stages - 1) of the
        passes."""
        return self.timing.bubble / self.step_seconds

    @property
    def epoch_days(self) -> float:
        """For 145 million pairs, each in both directions."""
        return 2 * EPOCH_PAIRS / self.sequences_per_step * self.step_seconds / 86400


def plan(recipe: Recipe, *, gpus: int, gpu: str | Gpu = DEFAULT_GPU, zero: dict | None = None) -> Plan:
    """Plan a recipe on `gpus` ranks of a GPU of the table; ask `.fits` of the result.

    zero: the merged DeepSpeed file, where it is known already. Raises UserError if the ranks or the batch cannot be
    divided, or the DeepSpeed file is refused.
    """
    parallel, config, spec = recipe.parallel, recipe.model, sequence_spec(recipe)
    tensor, pipeline = parallel.tensor, parallel.pipeline
    data = _data_size(recipe, gpus)
    if zero is None:
        zero = merged_deepspeed_config(recipe, data_size=data) if parallel.engine == "deepspeed" else {}
    gpu = gpu_named(gpu) if isinstance(gpu, str) else gpu
    if recipe.precision == "fp32":
        gpu = replace(gpu, peak_flops=gpu.peak_flops * FP32_SHARE)
    micro_batches, rest = divmod(recipe.batch.global_size, recipe.batch.micro_size * data)
    if rest:
        raise UserError(
            f"batch.global_size={recipe.batch.global_size} is not divisible by batch.micro_size="
            f"{recipe.batch.micro_size} x {data} data-parallel ranks"
        )
    bounds, parameters = _stages(config, spec, tensor, pipeline)
    place = _Place(recipe, spec, data, zero, micro_batches)
    stages = []
    for number, (first, stop) in enumerate(zip(bounds, bounds[1:])):
        in_flight = min(micro_batches, pipeline - number)
        memory = _memory(place, first, stop, parameters[number], in_flight)
        count = sum(parameter.numel for parameter in parameters[number])
        stages.append(StagePlan(first, stop, count, in_flight, memory, _work(place, first, stop, count)))
    spread = Spread(data, tensor, pipeline)
    timings = [step_time(stage.work, spread, gpu) for stage in stages]
    slowest = max(range(pipeline), key=lambda number: timings[number].step)
    worst = max(range(pipeline), key=lambda number: stages[number].memory.total)
    held = (stages[worst].first_layer, stages[worst].stop_layer, stages[worst].in_flight)
    sequences = recipe.batch.global_size * (2 if recipe.data.directions == "both" else 1)
    model_flops = step_flops(recipe, spec)
    return Plan(
        name=recipe.name, gpus=gpus, gpu=gpu, data=data, tensor=tensor, pipeline=pipeline,
        zero_stage=zero_stage(zero), zero_file=str(parallel.deepspeed) if parallel.engine == "deepspeed" else "none",
        precision=recipe.precision, sequence=parallel.sequence, recompute=parallel.recompute,
        recompute_every=parallel.recompute_every, micro_size=recipe.batch.micro_size, micro_batches=micro_batches,
        parameters=size.num_parameters(config, spec), stages=tuple(stages),
        worst_stage=worst, slowest_stage=slowest,
        sequences_per_step=sequences, tokens_per_step=sequences * spec.num_slots, model_flops=model_flops,
        hardware_flops=model_flops + step_recomputed_flops(recipe, spec), timing=timings[slowest],
        activations_by_mode={mode: _activations(place, *held, mode) for mode in get_args(Recompute)},
        not_counted=_not_counted(config),
    )  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """What all stages of a plan share."""

    recipe: Recipe
    spec: SequenceSpec
    data: int
    zero: dict
    micro_batches: int

    @property
    def section(self) -> dict:
        return self.zero.get("zero_optimization", {})

    @property
    def width(self) -> int:
        return 4 if self.recipe.precision == "fp32" else 2

    @property
    def sent_width(self) -> int:
        """Bytes of the type that gradients are sent to other ranks in."""
        return {"fp32": 4, "fp16": 2, "bf16": 2, None: self.width}[self.zero.get("communication_data_type")]

    @property
    def sequences(self) -> int:
        """Of one micro-batch."""
        return self.recipe.batch.micro_size * (2 if self.recipe.data.directions == "both" else 1)


def _data_size(recipe: Recipe, gpus: int) -> int:
    tensor, pipeline = recipe.parallel.tensor, recipe.parallel.pipeline
    if gpus < 1 or gpus % (tensor * pipeline):
        raise UserError(
            f"--gpus {gpus} is no multiple of parallel.tensor={tensor} x parallel.pipeline={pipeline}; "
            f"use a multiple of {tensor * pipeline}"
        )
    if recipe.parallel.engine == "torch" and gpus > 1:
        raise UserError(f"--gpus {gpus}: parallel.engine=torch is one process; use --gpus 1, or engine deepspeed")
    return gpus // (tensor * pipeline)


@lru_cache(maxsize=256)
def _stages(
    config: ModelConfig, spec: SequenceSpec, tensor: int, pipeline: int
) -> tuple[tuple[int, ...], tuple[tuple[Parameter, ...], ...]]:
    """Bounds of the stages, and the parameters of a rank of each."""
    bounds = size.stage_bounds(size.stage_costs(config, spec), pipeline)
    return bounds, stage_parameters(config, spec, tensor=tensor, pipeline=pipeline)


def _not_counted(config: ModelConfig) -> tuple[str, ...]:
    if config.reconstructor is None:
        return ()
    joint = config.reconstructor.joint_quantizer is not None
    return ("model.reconstructor", *(["model.reconstructor.joint_quantizer"] if joint else []))


def _activations(place: _Place, first: int, stop: int, in_flight: int, recompute: Recompute) -> int:
    """Of layers [first, stop). The recipe's `recompute_every` belongs to the recipe's own way of recomputing."""
    parallel, config = place.recipe.parallel, place.recipe.model
    return activation_bytes(
        config, place.spec, blocks=range(max(first, 1) - 1, min(stop, config.num_layers + 1) - 1), in_flight=in_flight,
        sequences=place.sequences, width=place.width, tensor=parallel.tensor, sequence=parallel.sequence,
        recompute=recompute, recompute_every=parallel.recompute_every if recompute == parallel.recompute else 1,
    )  # fmt: skip


def _memory(place: _Place, first: int, stop: int, parameters: Sequence[Parameter], in_flight: int) -> Memory:
    recipe, spec, data, width = place.recipe, place.spec, place.data, place.width
    parallel, config, stage = recipe.parallel, recipe.model, zero_stage(place.zero)
    state = state_bytes(
        parameters, precision=recipe.precision, zero=place.zero, data_size=data, micro_batches=place.micro_batches
    )
    activations = _activations(place, first, stop, in_flight, parallel.recompute)
    logits = 0
    if stop == config.num_layers + 2:
        logits = logit_bytes(
            spec, sequences=place.sequences, width=width, tensor=parallel.tensor, z_loss=recipe.loss.z_loss > 0,
            hidden=config.hidden_size,
        )  # fmt: skip
    largest = max(size.layer_parameters(config, spec)[first:stop]) // parallel.tensor
    communication = communication_bytes(
        place.section, stage=stage, parameters=sum(parameter.numel for parameter in parameters), largest_layer=largest,
        data=data, width=width,
    )  # fmt: skip
    offload = offloads_optimizer(place.zero)
    moving = activations + logits + communication
    return Memory(
        weights=state.weights, gradients=0 if offload and stage == 3 else state.gradients,
        optimizer=0 if offload else state.optimizer, activations=activations, logits=logits, communication=communication,
        overhead=CONTEXT_BYTES + int(FRAGMENTED * moving),
    )  # fmt: skip


def _work(place: _Place, first: int, stop: int, parameters: int) -> Work:
    recipe, spec, data, width = place.recipe, place.spec, place.data, place.width
    parallel, config, stage = recipe.parallel, recipe.model, zero_stage(place.zero)
    tensor, hidden, pipeline = parallel.tensor, config.hidden_size, parallel.pipeline
    slots = place.sequences * spec.num_slots
    costs, again = _costs(config, spec, parallel.recompute, parallel.recompute_every, recipe.data.drawn_share)
    blocks = min(stop, config.num_layers + 1) - max(first, 1)
    again_blocks = sum(1 for cost in again[first:stop] if cost)
    whole = (10 + (4 if tensor > 1 else 0) + (4 if config.sandwich_norm else 0) + (6 if config.dropout else 0)) * hidden
    split = (2 * config.ffn_multiple + 2 + 4 + (4 if config.qk_norm else 0)) * hidden
    block_passes = width * slots * (whole / (tensor if parallel.sequence else 1) + split / tensor)
    logits = spec.text_slots * spec.text_vocab_size + spec.image_slots * spec.image_vocab_size
    has_heads, has_embedding = stop == config.num_layers + 2, first == 0
    head_passes = place.sequences * logits / tensor * (2 * width + 12) if has_heads else 0.0
    collective = 2 * ring(tensor, slots * hidden * width)  # an all-reduce; with sequence parallelism gather and scatter
    again_collectives = again_blocks * {"none": 0, "selective": 1, "full": 2}[parallel.recompute]
    gathered, reduced = ring(data, width * parameters), ring(data, place.sent_width * parameters)
    shared = secondary_partition(place.zero)
    return Work(
        flops=place.sequences * sum(costs[first:stop]) / tensor,
        again_flops=place.sequences * sum(again[first:stop]) / tensor,
        passes=blocks * block_passes + head_passes,
        again_passes=again_blocks * block_passes * {"none": 0, "selective": 0.5, "full": 1}[parallel.recompute],
        micro_batches=place.micro_batches,
        tensor_bytes=(4 * blocks + again_collectives + has_heads + has_embedding) * collective,
        boundary_bytes=2 * slots * hidden * width / (tensor if parallel.sequence else 1) if pipeline > 1 else 0.0,
        zero_bytes=(gathered * (1 if shared else 2) if stage == 3 else 0.0) + {2: 2 * reduced, 3: reduced}.get(stage, 0.0),
        node_bytes=ring(shared, width * parameters) if shared and stage == 3 else 0.0,
        # DeepSpeed all-reduces gradients under ZeRO 1 and 2, although each rank needs only its part of the sums.
        step_bytes=(2 * reduced if stage < 2 else 0) + (gathered if stage in (1, 2) else 0),
        optimizer_parameters=parameters / (data if stage else 1),
        offload=offloads_optimizer(place.zero),
    )


@lru_cache(maxsize=256)
def _costs(
    config: ModelConfig, spec: SequenceSpec, recompute: str, every: int, drawn: float
) -> tuple[list[float], list[float]]:
    """Operations of one sequence per layer, forward and computed again, as many as large matrix products would do in
    that time; mean over directions, `drawn` of them text -> image."""
    again_as = size.ParallelConfig(recompute=recompute, recompute_every=every)
    costs, again = [0.0] * (config.num_layers + 2), [0.0] * (config.num_layers + 2)
    matrices = (8 + 4 * config.ffn_multiple) * config.hidden_size**2 * spec.num_slots
    for image_is_target, share in ((True, drawn), (False, 1 - drawn)):
        forward = size.layer_costs(config, spec, image_is_target=image_is_target)
        repeated = size.recomputed_costs(config, spec, again_as, image_is_target=image_is_target)
        for layer in range(1, len(forward)):
            pairs = forward[layer] - matrices if layer <= config.num_layers else 0
            slower = pairs * (1 / ATTENTION_SHARE - 1)
            costs[layer] += share * (forward[layer] + slower)
            again[layer] += share * (repeated[layer] + (slower if repeated[layer] else 0))
    return costs, again
