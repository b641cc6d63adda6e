"""The DeepSpeed file of a recipe: read, checked key by key, and joined with what the recipe owns."""

from pathlib import Path
from typing import Any

from vilg.config.deepspeed_keys import ALLOWED, COUNT, NOT_USED, OWNED_BY_RECIPE, REMOVED, STAGE, Keys, Kind
from vilg.config.marked import KeyPath, Marked, did_you_mean, dotted, read_file, shown
from vilg.config.problems import Surroundings
from vilg.config.schema import Recipe
from vilg.errors import UserError

NEVER = 10**9  # steps between DeepSpeed's own console lines; None would divide by nothing in its pipeline engine


def read_deepspeed_file(path: str | Path) -> Marked:
    """Read a file of `ds_configs/`; `.problems` holds every unknown, misplaced or owned key and every wrong
    value with its place.

    Raises UserError if the file is missing or is not JSON.
    """
    marked = read_file(path, what="parallel.deepspeed file")
    if not isinstance(marked.value, dict):
        raise UserError(f"{path}: a DeepSpeed file is one JSON object, like ds_configs/zero1.json")
    _check_keys(marked, marked.value, ALLOWED, ())
    return marked


def zero_stage(values: dict) -> Any:
    """The ZeRO stage a DeepSpeed config asks for; 0 where it names none."""
    return _zero_section(values).get("stage", 0)


def secondary_partition(values: dict) -> int | None:
    """Ranks of a node that share a second copy of the weights (ZeRO++ hpZ, 2306.10209 section 3.2); None without it."""
    size = _zero_section(values).get("zero_hpz_partition_size", 1)
    return int(size) if COUNT.accepts(size) and size > 1 else None


def offloads_optimizer(values: dict) -> bool:
    """Whether the optimizer's state lives in the host's memory, where its step then runs."""
    section = _zero_section(values).get("offload_optimizer", {})
    return section.get("device", "none") == "cpu"


def surroundings(values: dict | None, *, world_size: int | None) -> Surroundings:
    """What the cross rules know beside the recipe, from its DeepSpeed file's values, which may be wrong, and the number of
    processes; None where one is not known."""
    if values is None:
        return Surroundings(world_size)
    stage, shared = zero_stage(values), secondary_partition(values)
    neighbourly = [f"zero_hpz_partition_size={shared}"] if shared else []
    if stage == 3 and _zero_section(values).get("zero_quantized_gradients") is True:
        neighbourly.append("zero_quantized_gradients=true")
    return Surroundings(world_size, stage if STAGE.accepts(stage) else None, shared, tuple(neighbourly))


def _zero_section(values: dict) -> dict:
    section = values.get("zero_optimization", {})
    return section if isinstance(section, dict) else {}


def merged_deepspeed_config(recipe: Recipe, *, data_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`: the recipe's DeepSpeed file and what the recipe owns.

    `data_size` is the number of data-parallel ranks. The optimizer and the schedule are handed to DeepSpeed as objects
    (its own "AdamW" compiles for minutes), so no block of theirs is in the result. Raises UserError listing all
    problems of the file, or if the global batch does not split evenly.
    """
    marked = read_deepspeed_file(recipe.parallel.deepspeed)
    if marked.problems:
        raise UserError("\n".join(f"{place}: {message}" for place, message in sorted(marked.problems)))
    batch = recipe.batch
    accumulation, rest = divmod(batch.global_size, batch.micro_size * data_size)
    if rest:
        raise UserError(
            f"batch.global_size={batch.global_size} is not divisible by batch.micro_size={batch.micro_size} x "
            f"{data_size} data-parallel ranks"
        )
    config = {
        **marked.value,
        "train_batch_size": batch.global_size,
        "train_micro_batch_size_per_gpu": batch.micro_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.grad_clip,
        "steps_per_print": NEVER,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if recipe.precision != "fp32":
        config[recipe.precision] = {"enabled": True}
    if recipe.precision == "bf16":
        # Else ZeRO 1 keeps all gradients in 16 bits as well, 2 bytes a parameter, and clears and adds them up for every
        # micro-batch before they go into the fp32 sum.
        config["bf16"]["immediate_grad_update"] = True
    return config


def _check_keys(marked: Marked, values: dict, allowed: Keys, around: KeyPath) -> None:
    for key, value in values.items():
        path = (*around, key)
        name, place = dotted(path), marked.place(path)
        if key not in allowed:
            marked.problems.append((place, _refusal(name, key, allowed)))
        elif isinstance(kind := allowed[key], Kind):
            if not (kind.accepts(value) or (value is None and kind.optional)):
                marked.problems.append((place, f"{name}: should be {kind.words}; found {shown(value)}"))
        elif isinstance(value, dict):
            _check_keys(marked, value, kind, path)
        else:
            marked.problems.append((place, f"{name}: should be a section {{...}}; found {shown(value)}"))


def _refusal(name: str, key: str, allowed: Keys) -> str:
    if name in OWNED_BY_RECIPE:
        return f"{name}: belongs to the recipe ({OWNED_BY_RECIPE[name]}); set it there and take it out here"
    if name in NOT_USED:
        return f"{name}: this trainer does not use this feature of DeepSpeed; take it out"
    if name in REMOVED:
        return f"{name}: this feature was removed from DeepSpeed; take it out"
    return f"{name}: unknown key{did_you_mean(key, allowed)}"
