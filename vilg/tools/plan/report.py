"""A plan for people: tables with units, and the formulae behind them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vilg.tools.plan.planner import Plan
from vilg.tools.plan.timing import CALIBRATED, Spread, boundary_rate, data_rate, tensor_rate

GIB = 2**30
_MEMORY = ("weights", "gradients", "optimizer", "activations", "logits", "communication", "overhead")


def format_plan(plan: Plan) -> str:
    """The plan as a page of text."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_traffic(plan), "", *_time(plan)])


def not_counted(plan: Plan) -> list[str]:
    """A line that names the parts of the recipe that no figure contains; none if there are none."""
    if not plan.not_counted:
        return []
    return [f"NOT COUNTED, neither memory nor time: {', '.join(plan.not_counted)}; leave room (docs/end_to_end.md)"]


def format_search(plans: Sequence[Plan], *, limit: int = 12) -> str:
    """The best layouts as a table, fastest first."""
    lines = [
        f"  {'tensor':>6}  {'pipeline':>8}  {'data':>5}  {'DeepSpeed file':<28}  {'micro-batch':>11}  {'recompute':<9}  "
        f"{'memory':>9}  {'step':>8}  {'tokens/s/GPU':>12}  {'MFU':>4}  {'bubble':>6}  {'epoch':>10}"
    ]
    for plan in plans[:limit]:
        lines.append(
            f"  {plan.tensor:>6}  {plan.pipeline:>8}  {plan.data:>5}  {plan.zero_file:<28}  {plan.micro_size:>11}  "
            f"{plan.recompute:<9}  {plan.memory_per_rank / GIB:>5.1f} GiB  {_seconds(plan.step_seconds):>8}  "
            f"{plan.tokens_per_second:>12,.0f}  {plan.mfu:>4.0%}  {plan.bubble:>6.0%}  {plan.epoch_days:>5.1f} days"
        )
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures, in bytes, seconds and operations; derived ones too."""
    derived = [name for name, member in vars(Plan).items() if isinstance(member, property)]
    return asdict(plan) | {name: getattr(plan, name) for name in derived}


def _head(plan: Plan) -> list[str]:
    sequence = " with sequence parallelism" if plan.sequence else ""
    every = f" (every {plan.recompute_every} layers)" if plan.recompute == "full" and plan.recompute_every > 1 else ""
    return [
        f"{plan.name}: {_short(plan.parameters)} parameters ({plan.parameters:,}), {plan.precision}",
        f"{plan.gpus} x {plan.gpu.name}: data {plan.data} x tensor {plan.tensor}{sequence} x pipeline {plan.pipeline}, "
        f"ZeRO {plan.zero_stage} ({plan.zero_file}), {plan.micro_batches} micro-batches of {plan.micro_size} pairs, "
        f"recompute {plan.recompute}{every}",
        *not_counted(plan),
    ]


def _memory(plan: Plan) -> list[str]:
    lines = [
        "memory per rank",
        f"  {'stage':>5}  {'layers':>8}  {'parameters':>10}" + "".join(f"  {name:>13}" for name in (*_MEMORY, "sum")),
    ]
    for number, stage in enumerate(plan.stages):
        held = [getattr(stage.memory, name) for name in _MEMORY] + [stage.memory.total]
        layers = f"{stage.first_layer}-{stage.stop_layer - 1}"
        columns = "".join(f"  {_bytes(count):>13}" for count in held)
        lines.append(f"  {number:>5}  {layers:>8}  {_short(stage.parameters):>10}{columns}")
    modes = ", ".join(f"{mode} {_bytes(count)}" for mode, count in plan.activations_by_mode.items())
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return [
        *lines,
        f"  activations of stage {plan.worst_stage} by parallel.recompute: {modes}",
        f"  fullest: stage {plan.worst_stage}, {_bytes(plan.memory_per_rank)} of {_bytes(plan.memory_limit)}: {verdict}. "
        "Parameters and state are counted, the rest is estimated",
    ]


def _traffic(plan: Plan) -> list[str]:
    work, spread = plan.stages[plan.slowest_stage].work, Spread(plan.data, plan.tensor, plan.pipeline)
    count = work.micro_batches
    rows = [
        ("tensor", count * work.tensor_bytes, tensor_rate(spread, plan.gpu)),
        ("pipeline", count * work.boundary_bytes, boundary_rate(spread, plan.gpu)),
        (f"data, ZeRO {plan.zero_stage}", count * work.zero_bytes + work.step_bytes, data_rate(spread, plan.gpu)),
        ("ZeRO within a node", count * work.node_bytes, plan.gpu.nvlink),
    ]
    lines = [f"sent by a rank of stage {plan.slowest_stage} in a step"]
    for name, sent, rate in rows:
        if sent:
            lines.append(f"  {name:<18}  {_bytes(sent):>10}  at {rate * CALIBRATED.link / 1e9:,.0f} GB/s")
    return lines if len(lines) > 1 else [lines[0] + ": nothing"]


def _time(plan: Plan) -> list[str]:
    names = {
        "compute": "matrix products", "memory_bound": "norms, GELU, residuals, loss", "tensor": "tensor collectives",
        "boundary": "sends between stages", "zero": "ZeRO collectives not hidden", "bubble": "pipeline bubble",
        "data": "gradients at the end", "optimizer": "optimizer",
    }  # fmt: skip
    parts = [f"{name} {_seconds(getattr(plan.timing, key))}" for key, name in names.items() if getattr(plan.timing, key)]
    peak = f"{plan.gpus} x {plan.gpu.peak_flops / 1e12:,.4g} TFLOP/s"
    seconds = _seconds(plan.step_seconds)
    return [
        f"step: {plan.sequences_per_step:g} sequences, {_short(plan.tokens_per_step)} tokens, predicted {seconds}"
        f" ({plan.tokens_per_second:,.0f} tokens/s/GPU)",
        f"  of it {', '.join(parts)}",
        f"  bubble {plan.bubble:.1%}: {plan.pipeline - 1} of {plan.micro_batches + plan.pipeline - 1} passes",
        f"  MFU {plan.mfu:.1%} = {plan.model_flops / 1e12:,.4g} TFLOP of the model / ({seconds} x {peak})",
        f"  HFU {plan.hfu:.1%} = {plan.hardware_flops / 1e12:,.4g} TFLOP with what is computed again / the same",
        "  TFLOP: forward and backward, visible pairs only (vilg/model/size.py); tokens: all slots of all sequences",
        f"epoch of 145M pairs in both directions: {plan.epoch_days:,.1f} days",
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"


def _short(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:g}"


def _bytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
