"""All layouts of a recipe that keep its global batch, planned and sorted by the time of a step."""

import re
from collections.abc import Iterator
from pathlib import Path

from vilg.config import Recipe
from vilg.config.check import check_recipe
from vilg.config.deepspeed import read_deepspeed_file, secondary_partition, zero_stage
from vilg.errors import UserError
from vilg.tools.plan.hardware import DEFAULT_GPU, Gpu, gpu_named
from vilg.tools.plan.planner import Plan, plan

MICRO_SIZES = (1, 2, 4, 8, 16, 32)
PIPELINES = (1, 2, 4, 8, 16, 32)
RECOMPUTES = ("none", "selective", "full")
_ZERO_FILE = re.compile(r"zero[0-3].*\.json")


def search(recipe: Recipe, *, gpus: int, gpu: str | Gpu = DEFAULT_GPU) -> list[Plan]:
    """Plans that fit, fastest first: every mix of tensor ranks (within a node), stages, DeepSpeed file beside the
    recipe's own, micro-batch and recomputation that the rules of a recipe allow. Of a mix's ways of recomputing only
    the fastest that fits is kept."""
    gpu = gpu_named(gpu) if isinstance(gpu, str) else gpu
    best: dict[tuple, Plan] = {}
    for candidate, zero in _candidates(recipe, gpus, gpu):
        try:
            found = plan(candidate, gpus=gpus, gpu=gpu, zero=zero)
        except UserError:
            continue
        key = (found.tensor, found.pipeline, found.zero_file)
        if found.fits and (key not in best or found.step_seconds < best[key].step_seconds):
            best[key] = found
    return sorted(best.values(), key=lambda found: found.step_seconds)


def require_fit(found: Plan, recipe: Recipe) -> None:
    """Raise UserError, with what would fit, if the plan's fullest rank does not."""
    if found.fits:
        return
    gib = 2**30
    message = (
        f"{found.name} needs {found.memory_per_rank / gib:.1f} GiB on a rank of stage {found.worst_stage}, more than the "
        f"{found.memory_limit / gib:.1f} GiB of a {found.gpu.name}, on {found.gpus} GPUs"
    )
    fitting = search(recipe, gpus=found.gpus, gpu=found.gpu)[:3]
    if not fitting:
        raise UserError(f"{message}; no layout of it fits: use more GPUs, larger ones, or a smaller model")
    lines = [f"  {overrides(other)}   ({other.memory_per_rank / gib:.1f} GiB)" for other in fitting]
    raise UserError("\n".join([f"{message}; these would fit, fastest first:", *lines]))


def overrides(found: Plan) -> str:
    """What turns the recipe into this plan, for the command line."""
    sequence = str(found.sequence).lower()
    return (
        f"--parallel.tensor={found.tensor} --parallel.sequence={sequence} --parallel.pipeline={found.pipeline} "
        f"--parallel.deepspeed={found.zero_file} --parallel.recompute={found.recompute} "
        f"--parallel.recompute_every={found.recompute_every} --batch.micro_size={found.micro_size}"
    )


def _candidates(recipe: Recipe, gpus: int, gpu: Gpu) -> Iterator[tuple[Recipe, dict]]:
    files = _zero_files(recipe)
    for tensor in (n for n in (1, 2, 4, 8, 16) if n <= gpu.node and gpus % n == 0):
        for pipeline in (n for n in PIPELINES if gpus % (tensor * n) == 0):
            data = gpus // (tensor * pipeline)
            for path, zero in files.items():
                if data == 1 and zero_stage(zero) not in (0, zero_stage(files[recipe.parallel.deepspeed])):
                    continue  # nobody to share with: all stages are the same
                for micro in MICRO_SIZES:
                    for recompute in RECOMPUTES:
                        parallel = recipe.parallel.model_copy(
                            update=dict(
                                engine="deepspeed", deepspeed=path, tensor=tensor, pipeline=pipeline,
                                sequence=tensor > 1, recompute=recompute, recompute_every=1,
                            )
                        )  # fmt: skip
                        batch = recipe.batch.model_copy(update=dict(micro_size=micro))
                        candidate = recipe.model_copy(update=dict(parallel=parallel, batch=batch))
                        if not _broken(candidate, gpus, zero, data):
                            yield candidate, zero


def _broken(candidate: Recipe, gpus: int, zero: dict, data: int) -> bool:
    shared = secondary_partition(zero)
    if shared and shared >= data:
        return True  # one node: the second copy would be the first again
    return bool(check_recipe(candidate, world_size=gpus, deepspeed=zero))


def _zero_files(recipe: Recipe) -> dict[Path, dict]:
    """The recipe's DeepSpeed file, which `load_recipe` has checked, and those of its folder that are named after a ZeRO
    stage and sound."""
    own = recipe.parallel.deepspeed
    others = sorted(path for path in own.parent.glob("zero*.json") if _ZERO_FILE.fullmatch(path.name))
    read = {path: read_deepspeed_file(path) for path in dict.fromkeys([own, *others])}
    return {path: marked.value for path, marked in read.items() if not marked.problems}
