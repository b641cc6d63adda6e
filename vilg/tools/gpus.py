"""Preflight's rows about the GPUs: kind, health as nvidia-smi tells it, and memory that somebody else holds."""

import shutil
import subprocess
from collections.abc import Sequence

import torch

from vilg.parallel.ranks import Ranks
from vilg.tools.findings import Report, Row, by_node
from vilg.tools.peers import find_different

MAX_CLOCK, DRIVER = "maximum clock (MHz)", "driver"
# nvidia-smi's fields by our names; of several the first that it knows. Volatile counters: since the last reset. Older
# GPUs retire pages, those since A100 remap rows: pending waits for a reset, failure means that no spare row is left.
_FIELDS = {
    "uncorrected ECC errors": ("ecc.errors.uncorrected.volatile.total",),
    "pages to be retired": ("retired_pages.pending",),
    "rows to be remapped": ("remapped_rows.pending",),
    "rows that could not be remapped": ("remapped_rows.failure",),
    "slowed by hardware": ("clocks_event_reasons.hw_slowdown", "clocks_throttle_reasons.hw_slowdown"),
    MAX_CLOCK: ("clocks.max.sm",),
    DRIVER: ("driver_version",),
}
_FAULTS = tuple(name for name in _FIELDS if name not in (MAX_CLOCK, DRIVER))
_FINE = {"0", "no", "not active", "n/a", "[n/a]"}  # [N/A]: this kind of GPU does not count it
_SECONDS = 30  # nvidia-smi on a GPU that has fallen off its bus may never answer
# Before this process has put anything there but its CUDA context and NCCL's buffers, which take a percent or two.
FREE_SHARE = 0.90


def check_gpus(report: Report, ranks: Ranks, health: dict[str, str]) -> None:
    """Add the rows, before anything is put on the GPUs; all ranks call it. health: what `gpu_health` said here."""
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    kinds = ranks.gather({"GPU": f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"})
    different = find_different(kinds, report.nodes)
    report.blame(*different)
    text = by_node(different)
    report.rows.append(Row("GPUs", "bad" if different else "ok", text or f"{len(kinds)} x {kinds[0]['GPU']}"))
    report.rows.append(health_row(ranks.gather(health), report))
    report.rows.append(free_memory_row(ranks.gather(torch.cuda.mem_get_info()), report))


def gpu_health(uuid: str) -> dict[str, str]:
    """What nvidia-smi says of a GPU, by our names, without the fields that it does not know; empty where it is missing
    or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return {}
    first = {name: fields[0] for name, fields in _FIELDS.items()}
    found: dict[str, str] = {}
    try:
        if (values := _query(uuid, list(first.values()))) is not None:
            return dict(zip(first, values))
        for name, fields in _FIELDS.items():  # it refuses a whole query for one field that it does not know
            answers = (_query(uuid, [field]) for field in fields)
            if (values := next(filter(None, answers), None)) is not None:
                found[name] = values[0]
    except subprocess.TimeoutExpired:
        return {}
    return found


def _query(uuid: str, names: list[str]) -> list[str] | None:
    """Values of the fields; None if nvidia-smi does not know one of them. Raises TimeoutExpired."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    values = [value.strip() for value in done.stdout.split(",")]
    return values if done.returncode == 0 and len(values) == len(names) else None


def health_row(health: Sequence[dict[str, str]], report: Report) -> Row:
    """Memory faults, throttling and maximum clocks of all ranks as one row; nodes with a fault are blamed."""
    if not any(health):
        text = "nvidia-smi is missing or does not answer: memory faults and clocks are not checked"
        return Row("GPU health", "absent", text)
    faults, blamed = [], []
    for rank, (facts, node) in enumerate(zip(health, report.nodes, strict=True)):
        found = [f"{name} {facts[name]}" for name in _FAULTS if facts.get(name, "0").lower() not in _FINE]
        found += [] if facts else ["nvidia-smi does not answer for this GPU"]
        faults += [f"{node} (rank {rank}): {each}" for each in found]
        blamed += [node] if found else []
    answered = [(facts, node) for facts, node in zip(health, report.nodes) if MAX_CLOCK in facts]
    if answered:
        clocks = find_different([{MAX_CLOCK: facts[MAX_CLOCK]} for facts, _ in answered], [n for _, n in answered])
        faults += [by_node(clocks)] if clocks else []
        blamed += clocks
    report.blame(*blamed)
    unknown = [name for name in (*_FAULTS, MAX_CLOCK) if not any(name in facts for facts in health)]
    fine = f"no memory faults, no throttling, maximum clock {next((f[MAX_CLOCK] for f, _ in answered), 'unknown')} MHz"
    fine += f"; this nvidia-smi does not tell {', '.join(unknown)}" if unknown else ""
    return Row("GPU health", "bad" if faults else "ok", "; ".join(faults) or fine)


def free_memory_row(memory: Sequence[tuple[int, int]], report: Report) -> Row:
    """Free and all bytes of every rank's GPU as a row; one that another process uses makes its node bad."""
    faults = []
    for rank, ((free, total), node) in enumerate(zip(memory, report.nodes, strict=True)):
        if free < FREE_SHARE * total:
            report.blame(node)
            held = f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB are taken before the run starts"
            faults.append(f"{node} (rank {rank}): {held}; another process is there (nvidia-smi lists them)")
    least = min(free / total for free, total in memory)
    return Row("GPU free memory", "bad" if faults else "ok", "; ".join(faults) or f"{100 * least:.0f}% or more free")
