"""Cross rules: what no single field of a recipe can know. All problems are reported at once."""

from collections.abc import Iterator
from typing import Any

from vilg.config.check_layout import LAYOUT_RULES
from vilg.config.deepspeed import surroundings
from vilg.config.ingest import IngestRecipe
from vilg.config.problems import NotGiven, Problem, Rule, Surroundings, rounded_up
from vilg.config.schema import Recipe

UINT16_CODES = 65536  # token shards hold codes as uint16
SPECIAL_TEXT_IDS = 4  # unknown, begin, end, padding: tokens/sequence.py


def check_recipe(recipe: Recipe, *, world_size: int | None = None, deepspeed: dict | None = None) -> list[str]:
    """Messages for all cross rules a recipe breaks; empty if it is sound.

    world_size: processes; deepspeed: the values of the recipe's DeepSpeed file; where they are known.
    """
    return [problem.message for problem in find_problems(recipe, surroundings(deepspeed, world_size=world_size))]


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


def _conv_size(r: Any, known: Surroundings) -> Iterator[Problem]:
    size = r.model.conv_size
    if size % 2 == 0:
        yield Problem(
            "model.conv_size",
            f"model.conv_size={size} is even, so the window has no middle; use {size - 1} or {size + 1}",
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


def _trained_places(r: Any) -> dict[str, Any]:
    """Keys of the data sets that are trained on, and where these lie."""
    return {"data.train": r.data.train} | {f"data.blend.{i}.path": part.path for i, part in enumerate(r.data.blend)}


def _urls(r: Any, known: Surroundings) -> Iterator[Problem]:
    for key, place in (_trained_places(r) | {"evaluation.data": r.evaluation.data}).items():
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


def _evaluation(r: Any, known: Surroundings) -> Iterator[Problem]:
    every, data = r.evaluation.every_steps, r.evaluation.data
    if every and data is None:
        yield Problem(
            "evaluation.every_steps",
            f"evaluation.every_steps={every}, but evaluation.data is not set; name a folder of token shards that are not "
            "trained on, or use 0",
        )
    for key, trained in _trained_places(r).items():
        if data is not None and str(data) == str(trained):
            yield Problem(
                "evaluation.data",
                f"evaluation.data={data} is {key} too, so its loss would say nothing of held-out pairs; name other shards",
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
            f"checkpoints would be kept; use {rounded_up(keep, every)}, or 0",
        )


def _spikes(r: Any, known: Surroundings) -> Iterator[Problem]:
    if r.guards.spike_action == "skip" and r.precision == "fp16":
        yield Problem(
            "guards.spike_action",
            "guards.spike_action=skip looks like an overflow to fp16's loss scaling, which would halve the scale each "
            "time; use rollback (which restores the scale), log, or precision bf16",
        )


RULES: tuple[Rule, ...] = (
    *LAYOUT_RULES,
    _conv_size,
    _schedule,
    _tokens,
    _urls,
    _loss,
    _evaluation,
    _samples,
    _reconstructor,
    _joint_quantizer,
    _keep_every,
    _spikes,
)
