"""`vilg plan`: parameters, training state per rank and work per step of a recipe, from the config alone."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vilg.config import Recipe, load_recipe, take_overrides
from vilg.config.deepspeed import merged_deepspeed_config, zero_stage
from vilg.errors import UserError
from vilg.model import size
from vilg.train.open import sequence_spec


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage: its layers [first_layer, stop_layer) and what each of its ranks holds."""

    first_layer: int
    stop_layer: int
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Plan:
    """A recipe on `gpus` ranks. Operations are those of `model/size.py`; tokens count all slots of all sequences."""

    name: str
    gpus: int
    data: int
    tensor: int
    pipeline: int
    zero_stage: int
    precision: str
    parameters: int
    stages: tuple[StagePlan, ...]
    micro_batches: int
    sequences_per_step: float
    tokens_per_step: float
    flops_per_step: float


def make_plan(recipe: Recipe, *, gpus: int) -> Plan:
    """Raises UserError if the ranks cannot be divided, or the DeepSpeed file is refused."""
    tensor, pipeline = recipe.parallel.tensor, recipe.parallel.pipeline
    if gpus < 1 or gpus % (tensor * pipeline):
        raise UserError(
            f"--gpus {gpus} is no multiple of parallel.tensor={tensor} x parallel.pipeline={pipeline}; "
            f"use a multiple of {tensor * pipeline}"
        )
    data = gpus // (tensor * pipeline)
    stage = 0
    if recipe.parallel.engine == "deepspeed":
        stage = zero_stage(merged_deepspeed_config(recipe, data_size=data))
    spec = sequence_spec(recipe)
    bounds = size.stage_bounds(size.layer_costs(recipe.model, spec), pipeline)
    stages = []
    counts = size.rank_parameters(recipe.model, spec, tensor=tensor, pipeline=pipeline)
    for first, stop, parameters in zip(bounds, bounds[1:], counts):
        state = size.state_bytes(parameters, precision=recipe.precision, zero_stage=stage, data_size=data)
        stages.append(StagePlan(first, stop, parameters, state.weights, state.gradients, state.optimizer))
    to_image, to_text = _sequences(recipe)
    flops = to_image * size.sequence_flops(recipe.model, spec, image_is_target=True)
    flops += to_text * size.sequence_flops(recipe.model, spec, image_is_target=False)
    return Plan(
        name=recipe.name,
        gpus=gpus,
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        zero_stage=stage,
        precision=recipe.precision,
        parameters=size.num_parameters(recipe.model, spec),
        stages=tuple(stages),
        micro_batches=recipe.batch.global_size // (recipe.batch.micro_size * data),
        sequences_per_step=to_image + to_text,
        tokens_per_step=(to_image + to_text) * spec.num_slots,
        flops_per_step=flops,
    )


def format_plan(plan: Plan) -> str:
    """The plan as a few lines with units."""
    lines = [
        f"{plan.name}: {_short(plan.parameters)} parameters ({plan.parameters:,}), {plan.precision}",
        f"{plan.gpus} ranks: data {plan.data} x tensor {plan.tensor} x pipeline {plan.pipeline}, "
        f"ZeRO {plan.zero_stage}, {plan.micro_batches} micro-batches a step",
        "",
        "training state per rank (activations and buffers come on top)",
        f"  {'stage':>5}  {'layers':>8}  {'parameters':>10}"
        + "".join(f"  {name:>11}" for name in ("weights", "gradients", "optimizer", "sum")),
    ]
    for number, stage in enumerate(plan.stages):
        held = (stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes, stage.total_bytes)
        layers = f"{stage.first_layer}-{stage.stop_layer - 1}"
        columns = "  ".join(f"{_gib(count):>11}" for count in held)
        lines.append(f"  {number:>5}  {layers:>8}  {_short(stage.parameters):>10}  {columns}")
    lines += [
        "",
        f"step: {plan.sequences_per_step:g} sequences, {_short(plan.tokens_per_step)} tokens, "
        f"{plan.flops_per_step / 1e12:,.4g} TFLOP ({plan.flops_per_step / plan.gpus / 1e12:,.4g} per rank), "
        "forward and backward without recomputation",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run `vilg plan`; raises UserError."""
    overrides, rest = take_overrides(argv)
    parser = argparse.ArgumentParser(
        prog="vilg plan",
        description="Parameters, memory and work of a recipe, without running it.",
        epilog="--section.key=value overrides a key of the recipe, for example --parallel.tensor=4",
    )
    parser.add_argument("recipe", help="recipe YAML")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks; default: one tensor x pipeline group")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    options = parser.parse_args(rest)
    recipe = load_recipe(options.recipe, overrides, world_size=options.gpus)
    gpus = options.gpus or recipe.parallel.tensor * recipe.parallel.pipeline
    plan = make_plan(recipe, gpus=gpus)
    print(json.dumps(asdict(plan), indent=2) if options.json else format_plan(plan))
    return 0


def _sequences(recipe: Recipe) -> tuple[float, float]:
    """Expected sequences of a step per direction: (text -> image, image -> text)."""
    pairs = recipe.batch.global_size
    if recipe.data.directions == "both":
        return pairs, pairs
    share = recipe.data.text_to_image_fraction
    return pairs * share, pairs * (1 - share)


def _short(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:g}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
