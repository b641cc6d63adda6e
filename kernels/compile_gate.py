"""Compile every Triton kernel ahead of time, without a GPU, as it would be launched, and report what ptxas made of it.

    python -m kernels.compile_gate [--channels 64,128] [--variants row,layernorm] [--dtypes bfloat16] [--grids 32x32,13x32]
                                   [--json FILE] [--markdown]

Exits with 1 if a kernel spills registers, needs more shared memory than the device has or uses no tensor cores. The
specialisation (divisibility by 16, arguments equal to 1) is taken from recorded launches of the public ops, so what is
gated is what runs: for any number of text slots, samples and heads (the norm's kernels aside, which divide by the heads) the
same binary, since no kernel is specialised on them (with a text of one slot ptxas crashed); decoding with four candidates a
program, two and one. Needs ptxas, cuobjdump and nvdisasm, which Triton's wheel carries.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import runtime
from kernels.attention import triton_op
from kernels.attention.triton_decode import decode
from kernels.head_norm.triton_op import split_heads, split_heads_gradient
from kernels.patterns import PATTERNS, cache_capacity, window

SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes a block may use on A100 and H100/H200
TEXT_SLOTS, HEADS = 128, 16  # the 10B model's, with a grid of 32 x 32
NORMS = ("layernorm", "rmsnorm")
MATMULS = ("forward_kernel", "query_gradient_kernel", "text_key_gradient_kernel", "image_key_gradient_kernel")
CANDIDATES = (4, 2, 1)  # sequences that share a text prefix in decoding
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


@dataclass(frozen=True)
class Recorded:
    """One launch as the ops would make it."""

    kernel: object
    args: tuple
    constants: dict
    config: runtime.LaunchConfig


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel: registers a thread, spilled bytes (stack), shared memory in bytes, instruction counts."""

    kernel: str
    variant: str
    grid: str
    dtype: str
    channels: int
    capability: int
    triton: str
    tile: str
    warps: int
    registers: int
    spilled: int
    shared: int
    tensor_core: int

    def problems(self) -> list[str]:
        """Why the gate refuses this kernel; empty if it does not."""
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_LIMIT[self.capability]:
            found.append(f"needs {self.shared} bytes of shared memory of {SHARED_LIMIT[self.capability]}")
        if not self.tensor_core and self.kernel in MATMULS:
            found.append("uses no tensor cores")
        return found


def record(
    variant: str, dtype: torch.dtype, channels: int, capability: int, grid: tuple[int, int] = (32, 32),
    *, text_slots: int = TEXT_SLOTS, heads: int = HEADS,
) -> list[Recorded]:  # fmt: skip
    """The launches of one use of the public ops on a packed qkv, nothing run. `variant`: a pattern of attention (forward,
    backward, one decoding step) or a kind of norm (`split_heads`, forward and backward)."""
    packed = torch.empty(1, text_slots + grid[0] * grid[1], heads, 3, channels, dtype=dtype)
    seen: list[Recorded] = []
    replaced = runtime.start_kernel, runtime.device_capability
    runtime.start_kernel = lambda kernel, programs, *call: seen.append(Recorded(kernel, *call))
    runtime.device_capability = lambda device: capability
    try:
        if variant in NORMS:
            weights = packed.new_empty(2, channels).unbind()
            q, k = split_heads(packed, *weights, variant == "layernorm", 1e-5)
            split_heads_gradient(q, k, q, packed, *weights, variant == "layernorm", 1e-5)
        else:
            _attention(variant, grid, text_slots, *packed.permute(3, 0, 2, 1, 4))
    finally:
        runtime.start_kernel, runtime.device_capability = replaced
    return seen


def _attention(
    pattern: str, grid: tuple[int, int], text_slots: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    view, scale = window(pattern, grid), q.shape[-1] ** -0.5
    shape = [view.rows, view.cols, view.reach_rows, view.reach_cols]
    samples = [torch.zeros(1, dtype=torch.int32) for _ in range(3)]
    out, lse = triton_op.attention_forward(q, k, v, *samples, shape, scale)
    triton_op.attention_backward(out, q, k, v, out, lse, *samples, shape, scale)
    text = k[:, :, :text_slots]
    for candidates in CANDIDATES:
        ring = k[:, :, : cache_capacity(pattern, grid)].repeat(candidates, 1, 1, 1)
        new, slot = q[:, :, 0].repeat(candidates, 1, 1), samples[0].repeat(candidates)
        decode(new, text, text, ring, ring, samples[0], slot, shape, scale)


def source(launch: Recorded) -> ASTSource:
    """The launch specialised as Triton's own JIT does: pointers and integers by divisibility, ones as constants."""
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(names, launch.args)):
        specialised = not launch.kernel.params[index].do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and specialised:
            signature[name], constants[(index,)] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and specialised and value != 1 and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    for index, name in enumerate(names[len(launch.args) :], len(launch.args)):
        signature[name], constants[(index,)] = "constexpr", launch.constants[name]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], check=True, capture_output=True, text=True).stdout


def compile_launch(
    launch: Recorded, capability: int, variant: str, dtype: str, channels: int, grid: tuple[int, int]
) -> Compiled:
    """Compile for `capability` (80 or 90) and read registers, spills and instructions from the binary."""
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source(launch), target=target, options=launch.config.options())
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(binary.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        assembly = _tool("nvdisasm", "-c", cubin)
    name = launch.kernel.fn.__name__
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage[usage.index(name) :]))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", assembly))
    return Compiled(
        kernel=name,
        variant=variant,
        grid=f"{grid[0]}x{grid[1]}",
        dtype=dtype,
        channels=channels,
        capability=capability,
        triton=triton.__version__,
        tile=f"{launch.constants.get('TILE_ROWS', 1)}x{launch.constants.get('TILE_COLS', 1)}",
        warps=launch.config.num_warps,
        registers=int(numbers["REG"]),
        spilled=max(int(numbers["STACK"]), int(numbers["LOCAL"]), spills),
        shared=binary.metadata.shared,
        tensor_core=len(re.findall(r"\b(?:HGMMA|HMMA)\b", assembly)),
    )


def compile_all(variants, dtypes, channels, capabilities=(80, 90), grids=((32, 32),)) -> list[Compiled]:
    """Every kernel of every combination; `dtypes` are names of torch dtypes, `channels` widths of a head."""
    return [
        compile_launch(launch, capability, variant, dtype, width, grid)
        for dtype in dtypes
        for width in channels
        for variant in variants
        for capability in capabilities
        for grid in (grids[:1] if variant in NORMS else grids)
        for launch in record(variant, getattr(torch, dtype), width, capability, grid)
    ]


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def markdown(rows: list[Compiled]) -> str:
    """The register table of the README: a line for kernels of a grid that differ in their variant only, with ranges."""
    groups: dict[tuple, list[Compiled]] = {}
    for r in rows:
        groups.setdefault((r.kernel, r.dtype, r.channels, r.capability, r.triton, r.grid), []).append(r)
    head = "| kernel | type | D | sm | Triton | variants | warps | registers | spilled | shared, bytes | tensor-core instr. |"
    lines = [head, "|" + "---|" * 11]
    for key in sorted(groups):
        group = groups[key]
        columns = ("warps", "registers", "spilled", "shared", "tensor_core")
        cells = (*key[:-1], len(group), *(_range([getattr(r, column) for r in group]) for column in columns))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """The command line; the exit status is 1 if a kernel has a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join((*PATTERNS, *NORMS)), help="patterns of attention, kinds of norm")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--channels", default="32,64,80,128")
    parser.add_argument("--capabilities", default="80,90")
    parser.add_argument("--grids", default="32x32", help="of attention")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    args = parser.parse_args()
    channels, capabilities = ([int(n) for n in x.split(",")] for x in (args.channels, args.capabilities))
    grids = [tuple(int(n) for n in grid.split("x")) for grid in args.grids.split(",")]
    rows = compile_all(args.variants.split(","), args.dtypes.split(","), channels, capabilities, grids)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    if args.markdown:
        print(markdown(rows))
    bad = [r for r in rows if r.problems()]
    for r in bad:
        where = f"{r.kernel} {r.variant} {r.grid} {r.dtype} D={r.channels} tile {r.tile} sm_{r.capability} Triton {r.triton}"
        print(f"{where}: {'; '.join(r.problems())}", file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(bad)} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
