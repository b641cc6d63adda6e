"""Claim: the norm of queries and keys over the channels of a head, against torch's and Liger's, at the 10B model's size.

    python benchmarks/head_norm.py --json benchmarks/results/head_norm.json     # on a GPU
    python benchmarks/head_norm.py --device cpu --batch 1 --heads 2             # tries the script: there ours is torch's

From a packed projection [B, S, H, 3, D] to queries, keys, values, and from their gradients back to the packed one:

- `ours`: `kernels.split_heads`, one kernel each way;
- `torch`: F.layer_norm or F.rms_norm of the unbound parts, whose gradients autograd stacks;
- `torch compiled`: the same through `torch.compile`;
- `liger`: Liger-Kernel's norms, if the package is installed.

Checked first, in the same call: results and gradients against torch in fp64 (error at most 1.5 times torch's in the same dtype)
and ten backward passes bitwise equal; a wrong kernel prints no time and the script exits with 1. Medians; fraction of the
measured copy bandwidth if every number is read and written once: four tensors forward, eight backward.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.device_timing import DTYPES, device_rates, measure, surroundings
from kernels import split_heads
from kernels.head_norm.op import torch_split_heads

MOVED = {"forward": 4, "backward": 8, "both": 12}


def contenders(kind: str) -> dict[str, Callable]:
    """name -> function(qkv, q_weight, k_weight) -> (q, k, v)."""
    options = dict(kind=kind, eps=1e-5)
    compiled = torch.compile(torch_split_heads, dynamic=False)
    found = {
        "ours": lambda *x: split_heads(*x, **options),
        "torch": lambda *x: torch_split_heads(*x, **options),
        "torch compiled": lambda *x: compiled(*x, **options),
    }
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return found

    def norm(x, weight):
        if kind == "rmsnorm":
            return LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)  # not over its gradient
        return LigerLayerNormFunction.apply(x, weight, torch.zeros_like(weight), 1e-5)

    def liger(qkv, q_weight, k_weight):
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(3))
        return norm(q, q_weight), norm(k, k_weight), v

    return found | {"liger": liger}


def run(function: Callable, leaves: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """q, k, v and the gradients of qkv and both weights."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, gradients)]


def check(functions: dict[str, Callable], leaves: list[torch.Tensor], gradients: list[torch.Tensor]) -> str | None:
    """Why ours may not be timed, or None."""
    exact = run(functions["torch"], [x.double() for x in leaves], [x.double() for x in gradients])
    ours, theirs = (run(functions[name], leaves, gradients) for name in ("ours", "torch"))
    for name, want, a, b in zip(("q", "k", "v", "dqkv", "dq_weight", "dk_weight"), exact, ours, theirs, strict=True):
        our_error, their_error = (float((x.double() - want).norm() / want.norm()) for x in (a, b))
        if not our_error <= 1.5 * max(their_error, 1e-6):
            return f"{name}: relative error {our_error:.2e}, torch's is {their_error:.2e}"
    for _ in range(9):
        if not all(torch.equal(a, b) for a, b in zip(ours, run(functions["ours"], leaves, gradients))):
            return "two backward passes differ"
    return None


def main() -> int:
    """The command line; the exit status is 1 if ours is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kinds", default="layernorm,rmsnorm")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--slots", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures, with hardware and versions, to this file")
    args = parser.parse_args()
    options, about = dict(device=args.device, dtype=DTYPES[args.dtype]), surroundings(args.device)
    bandwidth = device_rates(**options)[1]
    print(f"{about}\ncopy {bandwidth / 1e9:.0f} GB/s, {args.dtype}")
    torch.manual_seed(0)
    leaves = [torch.randn(args.batch, args.slots, args.heads, 3, args.channels, **options)]
    leaves += [torch.randn(args.channels, **options) for _ in range(2)]
    # In the memory order in which the attention kernels leave them.
    gradients = [torch.randn(args.batch, args.slots, args.heads, args.channels, **options).transpose(1, 2) for _ in range(3)]
    tensor_bytes = gradients[0].numel() * gradients[0].element_size()
    shape, rows, failed = list(leaves[0].shape), [], False
    for kind in args.kinds.split(","):
        functions = contenders(kind)
        if wrong := check(functions, leaves, gradients):
            failed = True
            print(f"{kind}: WRONG, not timed: {wrong}")
            continue
        ours = {}
        for name, function in functions.items():
            tracked = [x.detach().requires_grad_() for x in leaves]
            try:
                out = function(*tracked)
                torch.autograd.grad(out, tracked, gradients, retain_graph=True)
            except Exception as error:  # a peer that does not run here says so; the others still do
                if name == "ours":
                    raise
                print(f"{kind:9} {name:14} unavailable: {str(error).splitlines()[0][:200]}")
                continue
            passes = {
                "forward": lambda: function(*tracked),
                "backward": lambda: torch.autograd.grad(out, tracked, gradients, retain_graph=True),
                "both": lambda: torch.autograd.grad(function(*tracked), tracked, gradients),
            }
            for which, step in passes.items():
                median, low, high = measure(step, args.device, args.repeats)
                fraction = MOVED[which] * tensor_bytes / bandwidth * 1e3 / median
                row = dict(kind=kind, name=name, **{"pass": which}, ms=median, ms_20=low, ms_80=high, of_copy=fraction)
                rows.append(row)
                ours.setdefault(which, median)
                print(f"{kind:9} {name:14} {which:8} {median:8.3f} ms ({low:.3f}-{high:.3f})  {fraction:4.0%} of the copy bandwidth"
                      f"  {median / ours[which]:.2f}x ours", flush=True)  # fmt: skip
    if args.json:
        content = {**about, "dtype": args.dtype, "shape": shape, "copy_bytes": bandwidth, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
