"""Start and end of a process group: under torchrun, srun, or alone; and what one rank does when another has died."""

import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from vilg.errors import UserError
from vilg.parallel.ranks import Ranks

_TIMEOUT = timedelta(minutes=30)
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Read timeout")


@contextmanager
def distributed(device: torch.device) -> Iterator[Ranks]:
    """Join the process group that the environment describes, and leave it in order.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; under srun the first three come from
    SLURM_*; without either this is one process, which needs no port. In the end: barrier, destroy, flush (without them
    a rank aborted at exit in 2 of 30 runs). Raises UserError for an incomplete environment and a port in use.
    """
    quiet()
    found = process_environment(os.environ)
    added = found.keys() - os.environ.keys()
    os.environ.update(found)  # DeepSpeed reads them there
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device.type == "cuda":
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world > 1:
        _join(backend, rank, world)
    else:
        # No port for one process; the store lives in it. DeepSpeed asks for a group even then.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    ranks = Ranks(rank, world, local, dist.new_group(backend="gloo", timeout=_TIMEOUT) if world > 1 else None)
    try:
        yield ranks
        ranks.barrier()
    except RuntimeError as error:
        if world > 1 and any(text in str(error) for text in _LOST_PEER):
            sys.exit(f"vilg: rank {rank}: another rank ended ({str(error).splitlines()[0]}); its own message says why")
        raise
    finally:
        dist.destroy_process_group()
        for name in added:
            del os.environ[name]
        sys.stdout.flush()
        sys.stderr.flush()


def process_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK (and the master's address) of this process, from torchrun's or SLURM's variables.

    Raises UserError naming variables that are missing.
    """
    if "RANK" in environment:
        needed = ["RANK", "WORLD_SIZE"]
        found = {name: environment.get(name, "") for name in needed}
        found["LOCAL_RANK"] = environment.get("LOCAL_RANK", found["RANK"])
    elif int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        found = {name: environment.get(slurm, "") for name, slurm in _SLURM.items()}
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
            "launch/train.sbatch, or without RANK for a single process"
        )
    return found


def quiet() -> None:
    """Filter warnings that frighten and mean nothing: deprecations and hooks inside torch's own collectives."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", message=".*autograd kernel was not registered.*")
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated.*")


def _join(backend: str, rank: int, world: int) -> None:
    port = int(os.environ["MASTER_PORT"])
    # torchrun listens on its port itself and says so; otherwise rank 0 will, and a clash is clearer found here.
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise UserError(
                    f"MASTER_PORT={port} cannot be listened on ({error.strerror}); another run on this machine may use "
                    "it. Set MASTER_PORT to a free port below 32768"
                ) from None
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=_TIMEOUT)
