"""The place of this process among those that a launcher started, as environment variables say it."""

from collections.abc import Mapping

from vilg.errors import UserError

_TASKS = "SLURM_NTASKS"
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": _TASKS, "LOCAL_RANK": "SLURM_LOCALID"}


def process_environment(environment: Mapping[str, str], *, slurm: bool = True) -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK (and the master's address) of this process, from torchrun's or SLURM's variables.

    slurm: whether the tasks of one srun are a group without being told so. Raises UserError naming variables that are
    missing, are no numbers, or do not fit each other.
    """
    if "RANK" in environment:
        needed = ["RANK", "WORLD_SIZE"]
        found = {name: environment.get(name, "") for name in needed}
        found["LOCAL_RANK"] = environment.get("LOCAL_RANK", found["RANK"])
    elif slurm and "SLURM_PROCID" in environment and _number({_TASKS: "1", **environment}, _TASKS, at_least=1) > 1:
        found = {name: environment.get(of_slurm, "") for name, of_slurm in _SLURM.items()}
    elif environment.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"WORLD_SIZE={environment['WORLD_SIZE']!r} is set in the environment, but RANK is not; start with torchrun, with "
            "srun through launch/train.sbatch, or take WORLD_SIZE out for a single process"
        )
    else:
        return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if found["WORLD_SIZE"].isdigit() and int(found["WORLD_SIZE"]) > 1:
        found |= {name: environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")}
    if not found.get("MASTER_PORT", "0").isdigit() and found["MASTER_PORT"]:
        raise UserError(f"MASTER_PORT={found['MASTER_PORT']!r} is no number; use a free port below 32768")
    missing = sorted(name for name, value in found.items() if not value)
    if missing:
        raise UserError(
            f"{', '.join(missing)} not set in the environment; start with torchrun, with srun through "
            "launch/train.sbatch, or without RANK and WORLD_SIZE for a single process"
        )
    world = _number(found, "WORLD_SIZE", at_least=1)
    rank, _ = _number(found, "RANK", at_least=0), _number(found, "LOCAL_RANK", at_least=0)
    if rank >= world:
        raise UserError(f"RANK={rank} is none of WORLD_SIZE={world} processes, which count from 0 to {world - 1}")
    return found


def _number(environment: Mapping[str, str], name: str, *, at_least: int) -> int:
    text = environment[name]
    if not (text.isascii() and text.isdigit() and int(text) >= at_least):
        raise UserError(
            f"{name}={text!r} in the environment should be a whole number of {at_least} or more; torchrun and srun set it "
            "themselves, for a single process take RANK and WORLD_SIZE out"
        )
    return int(text)
