"""Cross rules on how a model is spread over ranks: heads, vocabularies, stages, ZeRO, nodes, batches."""

import math
from collections.abc import Iterator
from typing import Any

from vilg.config.problems import Problem, Rule, Surroundings, divisors, rounded_up


def _heads(r: Any, known: Surroundings) -> Iterator[Problem]:
    hidden, heads = r.model.hidden_size, r.model.num_heads
    if hidden % heads:
        yield Problem(
            "model.num_heads",
            f"model.hidden_size={hidden} is not divisible by model.num_heads={heads}; "
            f"use {divisors(hidden, heads)} heads",
        )


def _tensor(r: Any, known: Surroundings) -> Iterator[Problem]:
    heads, tensor = r.model.num_heads, r.parallel.tensor
    if heads % tensor:
        yield Problem(
            "parallel.tensor",
            f"model.num_heads={heads} is not divisible by parallel.tensor={tensor}; use {divisors(heads, tensor)}",
        )


def _tensor_vocabularies(r: Any, known: Surroundings) -> Iterator[Problem]:
    tensor = r.parallel.tensor
    for name in ("text_vocab_size", "image_vocab_size"):
        rows = getattr(r.tokens, name)
        if rows % tensor:
            advice = f"use {rounded_up(rows, tensor)}"
            if name == "image_vocab_size":  # the image tokenizer decides it
                fit = math.gcd(rows, r.model.num_heads)
                advice = f"use parallel.tensor={divisors(fit, min(tensor, fit))}"
            yield Problem(
                f"tokens.{name}", f"tokens.{name}={rows} is not divisible by parallel.tensor={tensor}; {advice}"
            )


def _engine(r: Any, known: Surroundings) -> Iterator[Problem]:
    if r.parallel.engine != "torch":
        return
    if (known.world_size or 1) > 1:
        yield Problem(
            "parallel.engine",
            f"parallel.engine=torch runs one process, but there are {known.world_size}; use engine deepspeed",
        )
    for name in ("tensor", "pipeline"):
        size = getattr(r.parallel, name)
        if size > 1:
            yield Problem(
                f"parallel.{name}",
                f"parallel.{name}={size} needs parallel.engine=deepspeed; engine torch is one process",
            )
    if r.precision == "fp16":
        yield Problem(
            "precision", "precision=fp16 needs DeepSpeed's loss scaling; use parallel.engine=deepspeed, or bf16 or fp32"
        )


def _stages(r: Any, known: Surroundings) -> Iterator[Problem]:
    layers, stages = r.model.num_layers, r.parallel.pipeline
    if stages > layers:
        yield Problem(
            "parallel.pipeline",
            f"parallel.pipeline={stages} stages, but model.num_layers={layers}; use at most {layers} stages",
        )


def _sequence(r: Any, known: Surroundings) -> Iterator[Problem]:
    if not r.parallel.sequence:
        return
    tensor, (rows, columns) = r.parallel.tensor, r.tokens.grid
    if tensor == 1:
        yield Problem(
            "parallel.sequence",
            "parallel.sequence=true splits the slots over tensor ranks, but parallel.tensor=1; use false, or "
            "parallel.tensor of 2 or more",
        )
    slots = r.tokens.text_slots + rows * columns
    if slots % tensor:
        yield Problem(
            "parallel.sequence",
            f"parallel.sequence=true: {slots} slots (tokens.text_slots={r.tokens.text_slots} + {rows} x {columns} image "
            f"slots) are not divisible by parallel.tensor={tensor}; use tokens.text_slots="
            f"{r.tokens.text_slots + rounded_up(slots, tensor) - slots}, or false",
        )


def _recompute(r: Any, known: Surroundings) -> Iterator[Problem]:
    every, layers = r.parallel.recompute_every, r.model.num_layers
    if every > 1 and r.parallel.recompute != "full":
        yield Problem(
            "parallel.recompute_every",
            f"parallel.recompute_every={every} counts whole layers, but parallel.recompute={r.parallel.recompute}; "
            "use 1, or parallel.recompute=full",
        )
    if every > layers:
        yield Problem(
            "parallel.recompute_every",
            f"parallel.recompute_every={every}, but model.num_layers={layers}, so none would be recomputed; "
            f"use 1 to {layers}, or parallel.recompute=none",
        )


def _zero(r: Any, known: Surroundings) -> Iterator[Problem]:
    stage = known.zero_stage
    if r.parallel.engine == "torch" or stage is None:
        return
    if r.parallel.pipeline > 1 and stage >= 2:
        yield Problem(
            "parallel.deepspeed",
            f"parallel.pipeline={r.parallel.pipeline} cannot be joined with ZeRO stage {stage} of "
            f"{r.parallel.deepspeed}; use stage 0 or 1 (ds_configs/zero1.json), or parallel.pipeline=1",
        )
    if r.precision != "fp32" and stage == 0:
        yield Problem(
            "precision",
            f"precision={r.precision} needs ZeRO stage 1 or more, but {r.parallel.deepspeed} has stage 0 (DeepSpeed "
            "clips by a wrong norm there); use ds_configs/zero1.json, or precision fp32",
        )


def _compile(r: Any, known: Surroundings) -> Iterator[Problem]:
    if r.parallel.compile and r.parallel.engine == "deepspeed" and known.zero_stage == 3:
        yield Problem(
            "parallel.compile",
            f"parallel.compile=true fuses nothing under ZeRO stage 3 of {r.parallel.deepspeed}, which gathers weights "
            "between the layers' parts; use false, or ds_configs/zero1.json or zero2.json",
        )


def _node(r: Any, known: Surroundings) -> Iterator[Problem]:
    ranks, split = known.node_ranks, r.parallel.tensor * r.parallel.pipeline
    if r.parallel.engine == "torch" or ranks is None:
        return
    if known.zero_stage != 3:
        yield Problem(
            "parallel.deepspeed",
            f"{r.parallel.deepspeed} has zero_hpz_partition_size={ranks}, which copies weights that only ZeRO stage 3 "
            "cuts; take it out, or use stage 3",
        )
    elif known.world_size is not None and known.world_size % split == 0 and known.world_size % (split * ranks):
        yield Problem(
            "parallel.deepspeed",
            f"{r.parallel.deepspeed} has zero_hpz_partition_size={ranks}, but {known.world_size} processes make "
            f"{known.world_size // split} data-parallel ranks; start a multiple of {split * ranks} processes, or use "
            "ds_configs/zero3.json",
        )


def _neighbours(r: Any, known: Surroundings) -> Iterator[Problem]:
    # Neighbours are a tensor group, each with weights of its own (`_create_zero_param_parallel_group` and
    # `_get_local_all_to_all_group` of deepspeed/utils/groups.py ask no mpu): a rank would gather the others' parts as
    # its own, and train on, wrongly.
    if r.parallel.engine == "torch" or r.parallel.tensor == 1:
        return
    for setting in known.neighbourly:
        yield Problem(
            "parallel.tensor",
            f"parallel.tensor={r.parallel.tensor} cannot be joined with {setting} of {r.parallel.deepspeed}, for which "
            "DeepSpeed takes neighbouring ranks as holders of the same weights; use parallel.tensor=1, or "
            "ds_configs/zero3.json",
        )


def _processes(r: Any, known: Surroundings) -> Iterator[Problem]:
    world, tensor, pipeline = known.world_size, r.parallel.tensor, r.parallel.pipeline
    if world is not None and world % (tensor * pipeline):
        key = "parallel.tensor" if tensor > 1 else "parallel.pipeline"
        yield Problem(
            key,
            f"{world} processes are not divisible by parallel.tensor={tensor} x parallel.pipeline={pipeline}; "
            f"start a multiple of {tensor * pipeline} processes",
        )


def _batch(r: Any, known: Surroundings) -> Iterator[Problem]:
    total, micro = r.batch.global_size, r.batch.micro_size
    split = r.parallel.tensor * r.parallel.pipeline
    whole = known.world_size is not None and known.world_size % split == 0  # else `_processes` has said so
    data = known.world_size // split if whole else 1
    if total % (micro * data):
        parts = f"batch.micro_size={micro}" + (f" x {data} data-parallel ranks" if data > 1 else "")
        lower = total // (micro * data) * (micro * data)
        near = [str(n) for n in (lower, lower + micro * data) if n > 0]
        yield Problem(
            "batch.global_size",
            f"batch.global_size={total} is not divisible by {parts}; use {' or '.join(near)}",
        )


LAYOUT_RULES: tuple[Rule, ...] = (
    _heads,
    _tensor,
    _tensor_vocabularies,
    _engine,
    _stages,
    _sequence,
    _recompute,
    _zero,
    _compile,
    _node,
    _neighbours,
    _processes,
    _batch,
)
