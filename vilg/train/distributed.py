"""Start and end of a process group: under torchrun, srun, or alone; and what one rank does when another has died."""

import contextlib
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from vilg.config.environment import process_environment
from vilg.errors import FAILED, UserError, exit_code_of
from vilg.parallel.ranks import Ranks, SharedError
from vilg.train.logfile import tell

_TIMEOUT = timedelta(minutes=30)
_LONGEST = timedelta(days=20)  # torch counts milliseconds in 32 bits in places
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Read timeout")


@contextlib.contextmanager
def distributed(device: torch.device, *, pause_timeout: float | None = None) -> Iterator[Ranks]:
    """Join the process group that the environment describes, and leave it in order.

    pause_timeout: seconds that the other ranks wait on the host for one that saves or loads (0: without end), as
    `guards.pause_timeout` has them; None for commands without a recipe, which wait half an hour.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; under srun the first three come from
    SLURM_*; without either this is one process, which needs no port. In the end: barrier, destroy, flush (without them
    a rank aborted at exit in 2 of 30 runs). Raises UserError for an incomplete environment and a port in use.
    On GPUs a rank that fails by itself does not wait for the others (`leave_at_once`).
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
    waits = host_timeout(pause_timeout)
    ranks = Ranks(rank, world, local, dist.new_group(backend="gloo", timeout=waits) if world > 1 else None)
    try:
        yield ranks
        ranks.barrier()
    except BaseException as error:
        leaves = leave_at_once if world > 1 and device.type == "cuda" else None
        if world > 1 and isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER):
            cause = str(error).splitlines()[0]
            (leaves or sys.exit)(f"vilg: rank {rank}: another rank ended ({cause}); its own message says why")
        if leaves and not isinstance(error, (SharedError, SystemExit)):
            leaves(error)
        raise
    finally:
        dist.destroy_process_group()
        for name in added:
            del os.environ[name]
        _flush()


@contextlib.contextmanager
def one_voice(ranks: Ranks) -> Iterator[None]:
    """What all ranks have found wrong is said by rank 0; the others end with the same exit code."""
    try:
        yield
    except SharedError as error:
        if ranks.is_main:
            raise
        raise SystemExit(error.exit_code) from None


def host_timeout(pause_timeout: float | None) -> timedelta:
    """How long the host's group waits. Longer than the watchdogs of the ranks that wait: theirs are the better words."""
    if pause_timeout is None:
        return _TIMEOUT
    longest = _LONGEST.total_seconds()
    return timedelta(seconds=min(pause_timeout + _TIMEOUT.total_seconds(), longest) if pause_timeout else longest)


def leave_at_once(what: BaseException | str) -> None:
    """Print what happened on this rank and end the process, so that its launcher ends the others.

    To take an NCCL group down in order means to wait for collectives that the other ranks may never finish.
    """
    code = exit_code_of(what) if isinstance(what, UserError) else FAILED
    if isinstance(what, BaseException):
        what = f"vilg: error: {what}" if isinstance(what, UserError) else "".join(traceback.format_exception(what))
    tell(what)
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a console on a full disk is no failure of what was done
            stream.flush()


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
