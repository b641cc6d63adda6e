"""Preflight's rows about the machines: versions, GPUs, speed, the ways between them; compared over all ranks."""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

from vilg.checkpoint.state import versions
from vilg.parallel.ranks import Ranks
from vilg.tools import bandwidth
from vilg.tools.peers import find_different, find_slow

# Volatile counters: since the last reset. A pending row remapping means that memory has failed and waits for a reset.
_SMI = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors",
    "retired_pages.pending": "pages to be retired",
    "clocks.max.sm": "max clock (MHz)",
    "clocks_throttle_reasons.hw_slowdown": "slowed by hardware",
}
_FAULTS = ("uncorrected ECC errors", "pages to be retired", "slowed by hardware")
_FINE = {"0", "no", "not active", "n/a", "[n/a]"}  # [N/A]: this kind of GPU does not count it


@dataclass(frozen=True)
class Row:
    """One line of the report. slow: a node is far behind its peers; absent: this machine has no such part, no fault."""

    check: str
    status: Literal["ok", "slow", "bad", "absent"]
    detail: str


@dataclass
class Report:
    """What preflight found. figures: measure -> value of every rank; bad_nodes: those to run without."""

    rows: list[Row] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    figures: dict[str, list[float | None]] = field(default_factory=dict)
    bad_nodes: list[str] = field(default_factory=list)

    def blame(self, *nodes: str) -> None:
        """Count nodes among those to run without."""
        self.bad_nodes = sorted({*self.bad_nodes, *nodes})


def node_name() -> str:
    """SLURM's name of this node, which is what it can exclude; elsewhere the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_machines(report: Report, ranks: Ranks, device: torch.device) -> None:
    """Add the rows; all ranks call it."""
    report.nodes = ranks.gather(node_name())
    found = ranks.gather(versions())
    different = find_different(found, report.nodes)
    if different:
        report.blame(*different)
        text = "; ".join(f"{node}: {', '.join(what)}" for node, what in different.items())
        report.rows.append(Row("versions", "bad", text))
    else:
        listed = ", ".join(f"{name} {version}" for name, version in found[0].items())
        report.rows.append(Row("versions", "ok", f"equal on {len(set(report.nodes))} node(s): {listed}"))
    _check_gpus(report, ranks, device)
    kind = "GPU" if device.type == "cuda" else "CPU"
    _speed(report, ranks, f"{kind} matmul", 1e12, "TFLOP/s", lambda: bandwidth.matmul_flops(device))
    _speed(report, ranks, f"{kind} memory", 1e9, "GB/s", lambda: bandwidth.memory_bytes(device))
    _check_links(report, ranks, device)


def _check_gpus(report: Report, ranks: Ranks, device: torch.device) -> None:
    if device.type != "cuda":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        text = f"{os.cpu_count()} cores, {memory / 2**30:.0f} GiB, {torch.get_num_threads()} thread(s) per process"
        report.rows.append(Row("CPU", "ok", text))
        absent = ("GPUs", "GPU health", "GPU matmul", "GPU memory")
        report.rows += [Row(name, "absent", "no CUDA device on this machine") for name in absent]
        return
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    kinds = ranks.gather({"GPU": f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"})
    different = find_different(kinds, report.nodes)
    report.blame(*different)
    text = "; ".join(f"{node}: {', '.join(what)}" for node, what in different.items())
    report.rows.append(Row("GPUs", "bad" if different else "ok", text or f"{len(kinds)} x {kinds[0]['GPU']}"))
    health = ranks.gather(gpu_health(str(facts.uuid)))
    report.rows += [health_row(health, report)]


def gpu_health(uuid: str) -> dict[str, str]:
    """What nvidia-smi says of a GPU, by our names; empty where it is missing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return dict(zip(_SMI.values(), map(str.strip, done.stdout.split(",")))) if done.returncode == 0 else {}


def health_row(health: Sequence[dict[str, str]], report: Report) -> Row:
    """ECC errors, throttling and clocks of all ranks as one row; nodes with a fault are blamed."""
    if not all(health):
        text = "nvidia-smi is missing or does not answer: ECC errors and clocks are not checked"
        return Row("GPU health", "absent", text)
    faults = []
    for rank, (facts, node) in enumerate(zip(health, report.nodes, strict=True)):
        for name in _FAULTS:
            if facts.get(name, "0").lower() not in _FINE:
                faults.append(f"{node} (rank {rank}): {name} {facts[name]}")
                report.blame(node)
    clocks = find_different([{"max clock": facts["max clock (MHz)"]} for facts in health], report.nodes)
    report.blame(*clocks)
    faults += [f"{node}: {', '.join(what)}" for node, what in clocks.items()]
    fine = f"no ECC errors, no throttling, max clock {health[0]['max clock (MHz)']} MHz"
    return Row("GPU health", "bad" if faults else "ok", "; ".join(faults) or fine)


def _speed(
    report: Report, ranks: Ranks, name: str, unit: float, word: str, measure: Callable[[], float | None]
) -> None:
    """Measure on every rank and compare; a wrong result is bad, a figure far behind its peers slow."""
    value, wrong = None, None
    try:
        value = measure()
    except bandwidth.WrongSum as error:
        wrong = f"{node_name()} (rank {ranks.rank}): {error}"
    found: list[Any] = ranks.gather((value, wrong))
    values, wrongs = [v for v, _ in found], [w for _, w in found if w]
    report.figures[name] = values
    if wrongs:
        report.blame(*(node for node, (_, w) in zip(report.nodes, found) if w))
        report.rows.append(Row(name, "bad", "; ".join(wrongs)))
        return
    known = [v / unit for v in values if v is not None]
    if not known:
        report.rows.append(Row(name, "absent", "nothing to measure it between"))
        return
    text = f"{min(known):.3g} to {max(known):.3g} {word} a rank"
    slow = find_slow(name, values, report.nodes)
    report.blame(*(each.node for each in slow))
    report.rows.append(Row(name, "slow" if slow else "ok", "; ".join([text, *map(str, slow)])))


def _check_links(report: Report, ranks: Ranks, device: torch.device) -> None:
    names = sorted(set(report.nodes), key=report.nodes.index)
    if ranks.world_size == 1:
        detail = "one process; start under torchrun or srun to measure it"
        report.rows += [Row(name, "absent", detail) for name in ("all-reduce", "reduce-scatter", "p2p")]
        return
    # Every rank makes all groups, in the same order.
    members = [[rank for rank, node in enumerate(report.nodes) if node == name] for name in names]
    groups = [dist.new_group(each) for each in members]
    mine = groups[names.index(report.nodes[ranks.rank])]
    alone = len(members[names.index(report.nodes[ranks.rank])]) == 1
    gb = 1e9, "GB/s"
    if len(names) > 1:

        def inside() -> float | None:
            return None if alone else bandwidth.all_reduce_bytes(mine, device)

        _speed(report, ranks, "all-reduce in a node", *gb, inside)
    world = dist.group.WORLD
    _speed(report, ranks, "all-reduce", *gb, lambda: bandwidth.all_reduce_bytes(world, device))
    _speed(report, ranks, "reduce-scatter", *gb, lambda: bandwidth.reduce_scatter_bytes(world, device))
    inner, outer = bandwidth.partners(report.nodes)
    _speed(report, ranks, "p2p in a node", *gb, lambda: bandwidth.peer_bytes(inner[ranks.rank], ranks, device))
    _speed(report, ranks, "p2p across nodes", *gb, lambda: bandwidth.peer_bytes(outer[ranks.rank], ranks, device))
    for group in groups:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
