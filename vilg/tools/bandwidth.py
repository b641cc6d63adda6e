"""Speed of one rank's device and of the ways between ranks, measured in a second or so. Rates are per second."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vilg.parallel.ops import Group
from vilg.parallel.ranks import Ranks

PROBE_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_REPEATS = 4


def matmul_flops(device: torch.device) -> float:
    """Operations of a large product, in bf16 on a GPU and fp32 on a CPU."""
    size = _MATMUL_SIZE[device.type]
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return 2 * size**3 / _best_seconds(lambda: matrix @ matrix, device)


def memory_bytes(device: torch.device) -> float:
    """Bytes read and written by a copy inside the device's memory."""
    source = torch.zeros(PROBE_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * PROBE_BYTES[device.type] / _best_seconds(lambda: target.copy_(source), device)


class WrongSum(RuntimeError):
    """A collective gave a wrong result: a broken device or link."""


def all_reduce_bytes(group: Group, device: torch.device) -> float:
    """Bytes that a ring sends through every rank of the group: 2 (n - 1) / n of the data. Raises WrongSum."""
    n, data = dist.get_world_size(group), torch.ones(PROBE_BYTES[device.type] // 4, device=device)

    def reduce() -> None:
        data.fill_(1.0)
        dist.all_reduce(data, group=group)

    seconds = _best_seconds(reduce, device, group)
    _check(data, n)
    return 2 * (n - 1) / n * data.nbytes / seconds


def reduce_scatter_bytes(group: Group, device: torch.device) -> float:
    """As `all_reduce_bytes`: (n - 1) / n of the data. Raises WrongSum."""
    n = dist.get_world_size(group)
    data = torch.ones(PROBE_BYTES[device.type] // 4 // n * n, device=device)
    part = torch.empty(len(data) // n, device=device)
    seconds = _best_seconds(lambda: dist.reduce_scatter_tensor(part, data, group=group), device, group)
    _check(part, n)
    return (n - 1) / n * data.nbytes / seconds


def peer_bytes(partner: int | None, ranks: Ranks, device: torch.device) -> float | None:
    """Bytes in one direction while both partners send to each other; None for a rank without one. All ranks call it."""
    data = torch.full((PROBE_BYTES[device.type] // 4,), float(ranks.rank), device=device)
    received = torch.empty_like(data)

    def exchange() -> None:
        if partner is not None:
            sends = [dist.P2POp(dist.isend, data, partner), dist.P2POp(dist.irecv, received, partner)]
            for work in dist.batch_isend_irecv(sends):
                work.wait()

    seconds = _best_seconds(exchange, device, None)
    if partner is None:
        return None
    if float(received[-1]) != partner:
        raise WrongSum(f"rank {ranks.rank} received other bytes than rank {partner} sent")
    return data.nbytes / seconds


def partners(nodes: Sequence[str]) -> tuple[list[int | None], list[int | None]]:
    """For every rank its partner inside its node, and in the next node; None where one is left over."""
    members: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    inside: list[int | None] = [None] * len(nodes)
    across: list[int | None] = [None] * len(nodes)
    for mine in members.values():
        _pair(mine[0::2], mine[1::2], inside)
    groups = list(members.values())
    for here, there in zip(groups[0::2], groups[1::2]):
        _pair(here, there, across)
    return inside, across


def _pair(here: Sequence[int], there: Sequence[int], found: list[int | None]) -> None:
    for a, b in zip(here, there):
        found[a], found[b] = b, a


def _check(data: Tensor, expected: float) -> None:
    if not bool((data == expected).all()):
        raise WrongSum(f"a sum over {expected} ranks was wrong")


def _best_seconds(work: Callable[[], object], device: torch.device, group: Group | bool = False) -> float:
    """Best of a few; with a group (None: all ranks) its ranks start together. The first time makes connections."""
    best = float("inf")
    for _ in range(_REPEATS):
        if group is not False:
            dist.barrier(group=group)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
