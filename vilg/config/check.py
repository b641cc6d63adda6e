"""Cross rules: what no single field of a recipe can know. All problems are reported at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vilg.config.ingest import IngestRecipe
from vilg.config.schema import Recipe

UINT16_CODES = 65536  # token shards hold codes as uint16
SPECIAL_TEXT_IDS = 4  # unknown, begin, end, padding: tokens/sequence.py


class NotGiven(Exception):
    """A rule read a field that is missing or wrong; that is reported elsewhere, and the rule has nothing to say."""


@dataclass(frozen=True)
class Problem:
    """A broken rule; `key` is the dotted key whose position the error shows."""

    key: str
    message: str


@dataclass(frozen=True)
class Surroundings:
    """What rules know beside the recipe; None where nothing is known yet.

    node_ranks: ranks that share a second copy of the weights (`deepspeed.secondary_partition`).
    """

    world_size: int | None = None
    zero_stage: int | None = None
    node_ranks: int | None = None


Rule = Callable[[Any, Surroundings], Iterator[Problem]]


def check_recipe(recipe: Recipe, *, world_size: int | None = None, zero_stage: int | None = None) -> list[str]:
    """Messages for all cross rules a recipe breaks; empty if it is sound.

    `world_size` is the number of processes and `zero_stage` that of the DeepSpeed file, where they are known.
    """
    return [problem.message for problem in find_problems(recipe, Surroundings(world_size, zero_stage))]


def find_problems(recipe: Any, known: Surroundings) -> list[Problem]:
    """As `check_recipe`, with the keys. `recipe` may be an incomplete stand-in that raises `NotGiven`."""
    problems: list[Problem] = []
    for rule in RULES:
        try:
            problems.extend(rule(recipe, known))
        except NotGiven:
            continue
    return problems


def find_ingest_problems(recipe: IngestRecipe) -> list[Problem]:
    """The rules that join fields of `vilg data ingest`'s recipe."""
    words, similarity = recipe.words, recipe.similarity
    found = []
    if words is not None and words.at_least >= words.below:
        message = f"words.at_least={words.at_least} leaves no caption with words.below={words.below}; use a smaller one"
        found.append(Problem("words.at_least", message))
    if similarity is not None and similarity.enabled and similarity.model is None:
        message = "similarity.model is missing: name the folder of a CLIP or Chinese-CLIP model"
        found.append(Problem("similarity", message))
    return found


def _heads(r: Any, known: Surroundings) -> Iterator[Problem]:
    hidden, heads = r.model.hidden_size, r.model.num_heads
    if hidden % heads:
        yield Problem(
            "model.num_heads",
            f"model.hidden_size={hidden} is not divisible by model.num_heads={heads}; "
            f"use {_divisors(hidden, heads)} heads",
        )


def _tensor(r: Any, known: Surroundings) -> Iterator[Problem]:
    heads, tensor = r.model.num_heads, r.parallel.tensor
    if heads % tensor:
        yield Problem(
            "parallel.tensor",
            f"model.num_heads={heads} is not divisible by parallel.tensor={tensor}; use {_divisors(heads, tensor)}",
        )


def _tensor_vocabularies(r: Any, known: Surroundings) -> Iterator[Problem]:
    tensor = r.parallel.tensor
    for name in ("text_vocab_size", "image_vocab_size"):
        rows = getattr(r.tokens, name)
        if rows % tensor:
            advice = f"use {_rounded_up(rows, tensor)}" if name == "text_vocab_size" else "use another parallel.tensor"
            yield Problem(
                f"tokens.{name}", f"tokens.{name}={rows} is not divisible by parallel.tensor={tensor}; {advice}"
            )


def _conv_size(r: Any, known: Surroundings) -> Iterator[Problem]:
    size = r.model.conv_size
    if size % 2 == 0:
        yield Problem(
            "model.conv_size",
            f"model.conv_size={size} is even, so the window has no middle; use {size - 1} or {size + 1}",
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
            f"{r.tokens.text_slots + _rounded_up(slots, tensor) - slots}, or false",
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


def _schedule(r: Any, known: Surroundings) -> Iterator[Problem]:
    warmup, steps = r.schedule.warmup_steps, r.schedule.steps
    if warmup > steps:
        yield Problem(
            "schedule.warmup_steps",
            f"schedule.warmup_steps={warmup} is more than schedule.steps={steps}; use at most {steps}",
        )


def _tokens(r: Any, known: Surroundings) -> Iterator[Problem]:
    if r.tokens.text_slots < 2:
        message = "tokens.text_slots=1 has no room for a begin token and a word; use 2 or more"
        yield Problem("tokens.text_slots", message)
    if r.tokens.image_vocab_size > UINT16_CODES:
        yield Problem(
            "tokens.image_vocab_size",
            f"tokens.image_vocab_size={r.tokens.image_vocab_size} does not fit token shards (uint16); "
            f"use at most {UINT16_CODES}",
        )
    if r.tokens.text_vocab_size <= SPECIAL_TEXT_IDS:
        yield Problem(
            "tokens.text_vocab_size",
            f"tokens.text_vocab_size={r.tokens.text_vocab_size} leaves no room beside the {SPECIAL_TEXT_IDS} special "
            f"ids; use {SPECIAL_TEXT_IDS + 1} or more",
        )


def _urls(r: Any, known: Surroundings) -> Iterator[Problem]:
    places = {"data.train": r.data.train} | {f"data.blend.{i}.path": part.path for i, part in enumerate(r.data.blend)}
    for key, place in places.items():
        if isinstance(place, str) and r.data.cache_dir is None:
            yield Problem(
                key, f"{key}={place} is a URL, and data.cache_dir is not set; set it to a folder on the node's own disk"
            )
        if isinstance(place, str) and "::" in place:
            yield Problem(key, f"{key}={place} is a chain of URLs (::), which is not read; give the URL of the folder")


def _loss(r: Any, known: Surroundings) -> Iterator[Problem]:
    text, image = r.loss.text_weight, r.loss.image_weight
    if text == 0 and image == 0:
        yield Problem("loss.text_weight", "loss.text_weight=0 and loss.image_weight=0: nothing would be learnt")
    elif r.data.directions == "answer" and text == 0:
        yield Problem("loss.text_weight", "loss.text_weight=0, but data.directions: answer has no other loss")
    elif r.data.directions == "alternate":
        share = r.data.text_to_image_fraction
        if (share == 0 and text == 0) or (share == 1 and image == 0):
            yield Problem(
                "data.text_to_image_fraction",
                f"data.text_to_image_fraction={share:g} leaves one direction, and the weight of its loss is 0",
            )


def _samples(r: Any, known: Surroundings) -> Iterator[Problem]:
    if r.samples.every_steps and not r.samples.prompts:
        yield Problem(
            "samples.every_steps",
            f"samples.every_steps={r.samples.every_steps}, but samples.prompts is empty; name prompts, or use 0",
        )
    if r.samples.top_k > r.tokens.image_vocab_size:
        yield Problem(
            "samples.top_k",
            f"samples.top_k={r.samples.top_k} is more than tokens.image_vocab_size={r.tokens.image_vocab_size}; "
            "use 0 to keep all codes",
        )
    if r.samples.every_steps and r.parallel.pipeline > 1:
        yield Problem(
            "samples.every_steps",
            f"samples.every_steps={r.samples.every_steps} draws token by token, which stages of "
            f"parallel.pipeline={r.parallel.pipeline} do not; use 0, and `vilg generate` with an export",
        )
    if r.samples.every_steps and r.parallel.engine == "deepspeed" and known.zero_stage == 3:
        yield Problem(
            "samples.every_steps",
            f"samples.every_steps={r.samples.every_steps} draws with whole weights, which ZeRO stage 3 of "
            f"{r.parallel.deepspeed} does not keep; use 0, or ds_configs/zero1.json",
        )


def _reconstructor(r: Any, known: Surroundings) -> Iterator[Problem]:
    end_to_end = r.model.reconstructor
    if end_to_end is None:
        return
    pixels = {name: getattr(end_to_end, name) for name in ("l1", "mse", "perceptual")}
    if not any(pixels.values()):
        yield Problem("model.reconstructor.l1", "model.reconstructor: l1, mse and perceptual are all 0; use l1=1")
    drawn = {"both": 1.0, "alternate": r.data.text_to_image_fraction, "answer": 0.0}[r.data.directions]
    if not drawn:
        given = f"data.directions={r.data.directions} with data.text_to_image_fraction={r.data.text_to_image_fraction:g}"
        yield Problem("model.reconstructor", f"model.reconstructor learns from text -> image sequences, and {given} leaves none")
    if end_to_end.balance and not end_to_end.stop_gradient and r.loss.image_weight == 0:
        yield Problem(
            "model.reconstructor.balance",
            "model.reconstructor.balance measures against the image loss, and loss.image_weight=0; use balance=false",
        )


def _joint_quantizer(r: Any, known: Surroundings) -> Iterator[Problem]:
    if r.model.reconstructor is None or r.model.reconstructor.joint_quantizer is None:
        return
    stop, steps = r.model.reconstructor.joint_quantizer.stop_step, r.schedule.steps
    if stop >= steps:
        yield Problem(
            "model.reconstructor.joint_quantizer.stop_step",
            f"model.reconstructor.joint_quantizer.stop_step={stop} freezes nothing within schedule.steps={steps}; use less, "
            "or 0 to train the image tokenizer to the end",
        )


def _keep_every(r: Any, known: Surroundings) -> Iterator[Problem]:
    keep, every = r.checkpoint.keep_every, r.checkpoint.every_steps
    if keep % every:
        yield Problem(
            "checkpoint.keep_every",
            f"checkpoint.keep_every={keep} is no multiple of checkpoint.every_steps={every}, so few or none of the "
            f"checkpoints would be kept; use {_rounded_up(keep, every)}, or 0",
        )


def _spikes(r: Any, known: Surroundings) -> Iterator[Problem]:
    if r.guards.spike_action == "skip" and r.precision == "fp16":
        yield Problem(
            "guards.spike_action",
            "guards.spike_action=skip looks like an overflow to fp16's loss scaling, which would halve the scale each "
            "time; use rollback (which restores the scale), log, or precision bf16",
        )


RULES: tuple[Rule, ...] = (
    _heads,
    _tensor,
    _tensor_vocabularies,
    _conv_size,
    _engine,
    _stages,
    _sequence,
    _recompute,
    _zero,
    _compile,
    _node,
    _processes,
    _batch,
    _schedule,
    _tokens,
    _urls,
    _loss,
    _samples,
    _reconstructor,
    _joint_quantizer,
    _keep_every,
    _spikes,
)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _divisors(number: int, near: int, count: int = 4) -> str:
    """The few divisors of `number` closest to `near`, as "1, 2 or 4"."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    closest = sorted(sorted(divisors, key=lambda d: (abs(d - near), d))[:count])
    *first, last = map(str, closest)
    return f"{', '.join(first)} or {last}" if first else last
