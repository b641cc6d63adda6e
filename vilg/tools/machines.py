"""Preflight's rows about the machines: versions, GPUs, speed, the ways between them; compared over all ranks."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from vilg.checkpoint.state import source_commit, versions
from vilg.parallel.ranks import Ranks
from vilg.tools import bandwidth
from vilg.tools.env import nccl_version, package_version
from vilg.tools.findings import Report, Row, by_node, node_name
from vilg.tools.gpus import DRIVER, check_gpus, gpu_health
from vilg.tools.peers import find_different, find_slow


def check_machines(report: Report, ranks: Ranks, device: torch.device) -> None:
    """Add the rows; all ranks call it."""
    health: dict[str, str] = {}
    if device.type == "cuda":
        health = gpu_health(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    program = {"triton": package_version("triton"), "NCCL": nccl_version(), DRIVER: health.get(DRIVER)}
    found = versions() | {name: version for name, version in program.items() if version}
    commit = source_commit() if report.is_first_of_its_node(ranks.rank) else ""
    report.rows.append(versions_row(ranks.gather(found), ranks.gather(commit), report))
    if device.type == "cuda":
        check_gpus(report, ranks, health)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        text = f"{os.cpu_count()} cores, {memory / 2**30:.0f} GiB, {torch.get_num_threads()} thread(s) per process"
        report.rows.append(Row("CPU", "ok", text))
        absent = ("GPUs", "GPU health", "GPU free memory", "GPU matmul", "GPU memory")
        report.rows += [Row(name, "absent", "no CUDA device on this machine") for name in absent]
    kind = "GPU" if device.type == "cuda" else "CPU"
    _speed(report, ranks, f"{kind} matmul", 1e12, "TFLOP/s", lambda: bandwidth.matmul_flops(device))
    _speed(report, ranks, f"{kind} memory", 1e9, "GB/s", lambda: bandwidth.memory_bytes(device))
    _check_links(report, ranks, device)


def versions_row(found: list[dict[str, str]], commits: list[str], report: Report) -> Row:
    """Versions and source commits of all ranks as one row; nodes that differ are blamed. commits: empty where git does
    not say, which is no difference."""
    different = find_different(found, report.nodes)
    known = [(commit, node) for commit, node in zip(commits, report.nodes, strict=True) if commit]
    if known:
        facts = [{"vilg's commit": commit} for commit, _ in known]
        for node, what in find_different(facts, [node for _, node in known]).items():
            different.setdefault(node, []).extend(what)
    report.blame(*different)
    if different:
        return Row("versions", "bad", by_node(different))
    listed = ", ".join(f"{name} {version}" for name, version in found[0].items())
    commit = f", commit {known[0][0][:12]}{'+' if known[0][0].endswith('+') else ''}" if known else ""
    return Row("versions", "ok", f"equal on {len(report.node_names)} node(s): {listed}{commit}")


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
    names = report.node_names
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

        def inside(measure: Callable[..., float]) -> float | None:
            return None if alone else measure(mine, device)

        _speed(report, ranks, "all-reduce in a node", *gb, lambda: inside(bandwidth.all_reduce_bytes))
        _speed(report, ranks, "reduce-scatter in a node", *gb, lambda: inside(bandwidth.reduce_scatter_bytes))
    world = dist.group.WORLD
    _speed(report, ranks, "all-reduce", *gb, lambda: bandwidth.all_reduce_bytes(world, device))
    _speed(report, ranks, "reduce-scatter", *gb, lambda: bandwidth.reduce_scatter_bytes(world, device))
    inner, outer = bandwidth.partners(report.nodes)
    _speed(report, ranks, "p2p in a node", *gb, lambda: bandwidth.peer_bytes(inner[ranks.rank], ranks, device))
    _speed(report, ranks, "p2p across nodes", *gb, lambda: bandwidth.peer_bytes(outer[ranks.rank], ranks, device))
    for group in groups:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
