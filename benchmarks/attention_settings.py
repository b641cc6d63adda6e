"""Claim: the launch settings in kernels/attention/triton_settings.py are the fastest on this GPU; if not, which are.

    python benchmarks/attention_settings.py --patterns row,conv --grid 32x32 --json benchmarks/results/attention_settings.json
    python benchmarks/attention_settings.py --device cpu --capability 80       # which settings compile, without a GPU

For every kernel of a pattern, warps, pipeline stages, keys or queries a step and the register limit are varied one at a time
(`--pairs`: two at a time too). Each setting is compiled as in `kernels.compile_gate`; those that spill or need too much shared
memory are left out. On a GPU the results of the rest are compared with those of the setting in use (bf16, 1 %: sums change
their order) and, if they agree, timed: the forward or backward pass that the kernel is of, all other kernels as they are. Medians;
the setting in use comes first, the others by time, with how many times faster the pass is than in use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.device_timing import measure, surroundings
from kernels import compile_gate, runtime
from kernels.attention import triton_op
from kernels.patterns import PATTERNS, window
from kernels.runtime import LaunchConfig

VARIED = {"num_warps": (4, 8), "num_stages": (1, 2, 3), "chunk": (32, 64, 128), "registers": (None, 80, 96, 128, 168)}
BACKWARD = ("query_gradient", "closed_gradient", "image_key_gradient", "text_key_gradient")


def neighbours(config: LaunchConfig, pairs: bool) -> list[LaunchConfig]:
    """The setting itself, then those that differ in one of its numbers, or in two."""
    found = [config]
    for names in (*combinations(VARIED, 1), *(combinations(VARIED, 2) if pairs else ())):
        others = ([value for value in VARIED[name] if value != getattr(config, name)] for name in names)
        found += [replace(config, **dict(zip(names, values))) for values in product(*others)]
    return found


@contextmanager
def setting(kernel: str, config: LaunchConfig) -> Iterator[None]:
    """Launch `kernel` with `config`, all others as usual."""
    usual = triton_op.launch_config
    triton_op.launch_config = lambda name, *shape: config if name == kernel else usual(name, *shape)
    try:
        yield
    finally:
        triton_op.launch_config = usual


def in_use(pattern: str, grid: tuple[int, int], channels: int, capability: int) -> dict[str, LaunchConfig]:
    """Name in the settings -> setting of every attention kernel that a forward and a backward pass launch."""
    usual, found = triton_op.launch_config, {}

    def note(name, *shape):
        return found.setdefault(name, usual(name, *shape))

    triton_op.launch_config = note
    try:
        compile_gate.record(pattern, torch.bfloat16, channels, capability, grid)
    finally:
        triton_op.launch_config = usual
    return found


def compiled(pattern: str, kernel: str, grid: tuple[int, int], channels: int, capability: int) -> compile_gate.Compiled:
    """The kernel under the setting that is in force."""
    name = kernel.replace("closed_gradient", "query_gradient").removeprefix("closed_") + "_kernel"
    launches = compile_gate.record(pattern, torch.bfloat16, channels, capability, grid)
    launch = next(found for found in launches if found.kernel.fn.__name__ == name)
    return compile_gate.compile_launch(launch, capability, pattern, "bfloat16", channels, grid)


class Passes:
    """A forward and a backward pass of one pattern on the GPU, in bf16."""

    def __init__(self, pattern: str, grid: tuple[int, int], args: argparse.Namespace):
        torch.manual_seed(0)
        slots = args.text_slots + grid[0] * grid[1]
        packed = torch.randn(args.batch, slots, args.heads, 3, args.channels, device="cuda", dtype=torch.bfloat16)
        self.qkv = packed.permute(3, 0, 2, 1, 4).unbind()
        samples = (args.text_slots, args.text_slots, 1)  # text to image, all text slots filled
        self.samples = [torch.full((args.batch,), n, dtype=torch.int32, device="cuda") for n in samples]
        view = window(pattern, grid)
        self.shape = [view.rows, view.cols, view.reach_rows, view.reach_cols], args.channels**-0.5
        self.out, self.lse = self.forward()
        self.grad = torch.randn_like(self.out)

    def forward(self) -> list[torch.Tensor]:
        return list(triton_op.attention_forward(*self.qkv, *self.samples, *self.shape))

    def backward(self) -> list[torch.Tensor]:
        saved = (self.grad, *self.qkv, self.out, self.lse)
        return list(triton_op.attention_backward(*saved, *self.samples, *self.shape))


def examine(
    pattern: str, kernel: str, candidates: list[LaunchConfig], grid: tuple[int, int], capability: int,
    args: argparse.Namespace, passes: Passes | None,
) -> list[dict]:  # fmt: skip
    """A row for each setting that compiles well; without `ms` where its results are wrong or there is no GPU."""
    rows, step, expected = [], passes and (passes.backward if kernel in BACKWARD else passes.forward), None
    for number, candidate in enumerate(candidates):
        with setting(kernel, candidate):
            try:
                made = compiled(pattern, kernel, grid, args.channels, capability)
                if number and made.problems():  # the setting in use is measured whatever is said of it
                    print(f"{pattern} {kernel} {candidate}: {', '.join(made.problems())}")
                    continue
                row = dict(pattern=pattern, kernel=kernel, **asdict(candidate), used_registers=made.registers, shared=made.shared)
                if step:
                    found = step()
                    expected = expected or found
                    row["correct"] = all((a.float() - b.float()).norm() <= 0.01 * b.float().norm() for a, b in zip(found, expected))
                    if row["correct"]:
                        row["ms"], row["ms_20"], row["ms_80"] = measure(step, "cuda", args.repeats)
                        row["times_faster"] = (rows or [row])[0]["ms"] / row["ms"]
            except Exception as error:  # ptxas refuses some, a device others; a setting in use that fails is a failure
                if not number:
                    raise
                print(f"{pattern} {kernel} {candidate}: {type(error).__name__}: {' '.join(str(error).split())[-150:]}")
                continue
            rows.append(row)
    return rows[:1] + sorted(rows[1:], key=lambda row: row.get("ms", float("inf")))


def line(row: dict) -> str:
    about = f"{row['pattern']:9} {row['kernel']:19} {row['num_warps']} warps, {row['num_stages']} stages, steps of {row['chunk']:3}, "
    about += f"limit {row['registers'] or 'none':>4}: {row['used_registers']:3} registers, {row['shared']:6} bytes of shared memory"
    timed = f", {row['ms']:7.3f} ms, {row['times_faster']:.2f}x" if "ms" in row else ""
    return about + ("" if row.get("correct", True) else ", WRONG, not timed") + timed


def main() -> int:
    """The command line; the exit status is 1 if a setting gave other results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--capability", type=int, choices=(80, 90), default=90, help="without a GPU: compile for A100 or H100")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--kernels", help="their names in triton_settings.py; default: all that a pattern launches")
    parser.add_argument("--grid", default="32x32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--text-slots", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--pairs", action="store_true", help="also vary two numbers at a time")
    parser.add_argument("--json", type=Path, help="write the figures, with hardware and versions, to this file")
    args = parser.parse_args()
    grid, on_gpu = tuple(int(n) for n in args.grid.split("x")), args.device == "cuda"
    capability = runtime.device_capability(torch.device("cuda")) if on_gpu else args.capability
    about, rows = surroundings(args.device), []
    print(f"{about}\nsm_{capability}, {args.grid}, {args.channels} channels, bf16")
    for pattern in args.patterns.split(","):
        passes = Passes(pattern, grid, args) if on_gpu else None
        for kernel, config in in_use(pattern, grid, args.channels, capability).items():
            if not args.kernels or kernel in args.kernels.split(","):
                found = examine(pattern, kernel, neighbours(config, args.pairs), grid, capability, args, passes)
                print("\n".join(map(line, found)), flush=True)
                rows += found
                if args.json:  # as far as it has come
                    shape = {name: getattr(args, name) for name in ("grid", "batch", "heads", "channels", "text_slots")}
                    content = {**about, "capability": capability, **shape, "rows": rows}
                    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(not all(row.get("correct", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
