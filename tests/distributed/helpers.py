"""Run a function on several gloo ranks of this machine, for tests.

    def check_sum(rank, world_size):           # at module level, so that child processes can import it
        ...
        return value

    values = run_distributed(2, check_sum)     # one return value per rank, in rank order

Ranks are forked from a server process that has imported torch once, so a run costs about a second.
"""

import multiprocessing
import os
import pickle
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from vilg.data.children import STOP_SIGNALS


def free_port() -> int:
    """A TCP port of this machine that nothing listens on, in 20000..31999: below the ports of outgoing connections."""
    ports = random.SystemRandom().sample(range(20000, 32000), 100)
    for port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("100 ports of 20000..31999 are all in use")


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set for a rank on one machine, with one thread and the loopback interface."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def run_distributed(
    nprocs: int,
    target: Callable[..., Any],
    args: tuple = (),
    *,
    timeout: float = 180.0,
    init: bool = True,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `target(rank, world_size, *args)` on `nprocs` gloo ranks; their return values in rank order.

    `init=False` leaves `init_process_group` to the target (the environment is torchrun's). Values and arguments are
    pickled, tensors by value. A rank that raises or dies ends the others, and its traceback is in the AssertionError;
    so does exceeding `timeout` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    port = free_port()
    processes, pipes, values = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store" if init else None
        try:
            for rank in range(nprocs):
                environment = {**rank_environment(rank, nprocs, port), **(env or {})}
                receive, send = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main, args=(send, target, rank, nprocs, args, environment, store), daemon=True
                )
                process.start()
                send.close()
                processes.append(process)
                pipes[receive] = rank
            deadline = time.monotonic() + timeout
            while pipes:
                ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise AssertionError(f"ranks {sorted(pipes.values())} of {nprocs} did not end within {timeout} s")
                for pipe in ready:
                    rank = pipes.pop(pipe)
                    values[rank] = _value_of(rank, pipe)
            for process in processes:
                process.join(max(1.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return [values[rank] for rank in range(nprocs)]


def _value_of(rank: int, pipe) -> Any:
    try:
        succeeded, payload = pipe.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died without an error message") from None
    if not succeeded:
        raise AssertionError(f"rank {rank} failed:\n{payload}")
    return pickle.loads(payload)


def _rank_main(send, target, rank, world_size, args, environment, store) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a test of this process may have started the server for workers
    torch.set_num_threads(1)
    try:
        if store is not None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=120),
            )
        # Pickled here by value: the pipe's own reducer would pass tensors as handles that die with this process.
        message = (True, pickle.dumps(target(rank, world_size, *args)))
    except BaseException:  # reported to the test, which raises it
        message = (False, traceback.format_exc())
    send.send(message)
    send.close()
    if dist.is_initialized() and message[0]:
        dist.barrier()
        dist.destroy_process_group()
