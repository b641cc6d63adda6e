"""The command `vilg plan`."""

import argparse
import json
from collections.abc import Sequence

from vilg.config import load_recipe, take_overrides
from vilg.errors import UserError
from vilg.tools.plan.hardware import DEFAULT_GPU, GIB, GPUS, gpu_named
from vilg.tools.plan.planner import plan
from vilg.tools.plan.report import as_json, format_plan, format_search, not_counted
from vilg.tools.plan.search import overrides, require_fit, search


_FIGURES = {
    "--peak-tflops": "instead of the table's: dense bf16 peak, TFLOP/s",
    "--memory-gib": "memory, GiB",
    "--hbm-gbs": "rate of the GPU's memory, GB/s",
    "--nvlink-gbs": "NVLink in one direction, GB/s",
    "--network-gbs": "network per GPU in one direction, GB/s (200 Gb/s are 25)",
}


def main(argv: Sequence[str]) -> int:
    """Run `vilg plan`; raises UserError, also for a recipe that does not fit."""
    given, rest = take_overrides(argv)
    options = _parser().parse_args(rest)
    if options.gpus is not None and options.gpus < 1:
        raise UserError(f"--gpus {options.gpus} is no number of ranks; use 1 or more, or leave it out")
    recipe = load_recipe(options.recipe, given, world_size=None if options.search else options.gpus)
    gpus = options.gpus or recipe.parallel.tensor * recipe.parallel.pipeline
    gpu = gpu_named(
        options.gpu or DEFAULT_GPU,
        peak_flops=_times(options.peak_tflops, 1e12),
        memory=_times(options.memory_gib, GIB),
        hbm=_times(options.hbm_gbs, 1e9),
        nvlink=_times(options.nvlink_gbs, 1e9),
        network=_times(options.network_gbs, 1e9),
        node=options.node,
    )
    if options.search:
        found = search(recipe, gpus=gpus, gpu=gpu)
        if not found:
            raise UserError(f"no layout of {recipe.name} fits {gpus} x {gpu.name}: use more or larger GPUs")
        if options.json:
            print(json.dumps([as_json(one) for one in found], indent=2))
        else:
            batch = f"global batch {recipe.batch.global_size} pairs"
            print(f"{recipe.name} on {gpus} x {gpu.name}, {batch}: layouts that fit, fastest first")
            print("\n".join([*not_counted(found[0]), format_search(found)]))
            print(f"the first: {overrides(found[0])}")
        return 0
    made = plan(recipe, gpus=gpus, gpu=gpu)
    print(json.dumps(as_json(made), indent=2) if options.json else format_plan(made), flush=True)
    require_fit(made, recipe)
    return 0


def gpu_options() -> argparse.ArgumentParser:
    """--gpu and what may differ from the table's GPU of that name; for `parents` of a command's parser."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("the GPU that is planned for").add_argument
    add("--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)} (default {DEFAULT_GPU})")
    for option, about in _FIGURES.items():
        add(option, type=float, metavar="X", help=about)
    return parser


def gpu_arguments(options: argparse.Namespace) -> list[str]:
    """What was given of `gpu_options`, as arguments again."""
    given = {option: getattr(options, option.strip("-").replace("-", "_")) for option in ("--gpu", *_FIGURES)}
    return [f"{option}={value}" for option, value in given.items() if value is not None]


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilg plan",
        description="Memory, time and MFU of a recipe, without running it. Exit code 2 if it does not fit.",
        epilog="--section.key=value overrides a key of the recipe, for example --parallel.tensor=4",
        parents=[gpu_options()],
    )
    add = parser.add_argument
    add("recipe", help="recipe YAML")
    add("--gpus", type=int, metavar="N", help="ranks; default: one tensor x pipeline group")
    add("--search", action="store_true", help="list the fastest layouts that fit instead")
    add("--json", action="store_true", help="print JSON instead; bytes, seconds and operations")
    add("--node", type=int, metavar="N", help="GPUs of a node")
    return parser
