"""Sparse attention against its peers: forward, backward and both, per pattern and direction.

    python benchmarks/attention.py                          # a GPU if there is one, else this CPU
    python benchmarks/attention.py --device cpu --grids 32x32,64x64
    python benchmarks/attention.py --text-len 64 --json result.json

Every case is checked first, in the same call: output and gradients against the dense reference (error at most 2x that of
torch's dense attention in the same dtype, 3x for gradients) and ten backward passes bitwise equal. A case that fails
prints no time and the script exits with 1. Figures are medians with the 20 and 80 % quantiles.

Peers on a GPU: dense causal SDPA without a mask (flash, cuDNN), SDPA with the mask, FlexAttention (compiled, block mask) in
raster order and, for columns, on tokens permuted in advance, and matmul-softmax-matmul, the paper's own baseline.
On a CPU: SDPA with the mask. `useful` = FLOPs of visible pairs only. The roofline is the larger of the FLOPs of the
64 x 64 tiles computed over the measured matmul rate and the bytes read and written once per kernel over the measured
copy bandwidth. Times are those of the device: a GPU is kept busy while the host prepares what is timed, so that a launch
costs nothing, as in a training step, whose host runs ahead. `--json` is written anew after every case.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.device_timing import DTYPES, device_rates, measure, surroundings
from kernels import PATTERNS, attention_plan, sparse_attention
from kernels.attention.reference import reference_attention
from kernels.attention.tiles import BLOCK, choose_tile, score_tiles
from kernels.patterns import dense_mask, visible, window

CHECKED_HEADS = 2  # the reference writes out every score: 96 x 96 in fp64 fits only for few heads


@dataclass(frozen=True)
class Case:
    pattern: str
    direction: str  # text_to_image or image_to_text
    grid: tuple[int, int]
    batch: int
    heads: int
    channels: int
    text_slots: int
    text_len: int
    dtype: str
    device: str

    @property
    def slots(self) -> int:
        return self.text_slots + self.grid[0] * self.grid[1]

    def samples(self) -> dict[str, torch.Tensor]:
        is_target = self.direction == "text_to_image"
        values = (self.text_len, self.text_len if is_target else 0, int(is_target))
        names = ("text_len", "text_prefix", "image_is_target")
        return {n: torch.full((self.batch,), v, dtype=torch.int32, device=self.device) for n, v in zip(names, values)}

    def call(self) -> dict:
        return {"grid": self.grid, "pattern": self.pattern, **self.samples()}

    def inputs(self, heads: int | None = None) -> list[torch.Tensor]:
        """q, k, v as views of a packed projection, and the output gradient, [B, H, S, D]."""
        heads = heads or self.heads
        generator = torch.Generator(self.device).manual_seed(0)
        options = {"generator": generator, "device": self.device, "dtype": torch.float32}
        packed = torch.randn(self.batch, self.slots, 3, heads, self.channels, **options).to(DTYPES[self.dtype])
        grad = torch.randn(self.batch, self.slots, heads, self.channels, **options).to(DTYPES[self.dtype])
        return [*packed.permute(2, 0, 3, 1, 4), grad.transpose(1, 2)]


def useful_pairs(case: Case) -> int:
    """Visible (query, key) pairs of one head of one sample, counted in pieces that fit in memory."""
    samples = {name: t[:1] for name, t in case.samples().items()}
    rows = torch.arange(case.slots, device=case.device).split(1024)
    masks = (dense_mask(case.pattern, case.grid, case.text_slots, **samples, query_slots=r) for r in rows)
    return sum(int(m.sum()) for m in masks)


def computed_matmuls(case: Case) -> dict[str, int]:
    """64 x 64 x D matrix products of each pass for one head of one sample."""
    view, is_target = window(case.pattern, case.grid), case.direction == "text_to_image"
    tile = choose_tile(view)
    chunks = -(-case.text_len // BLOCK)
    image = score_tiles(view, tile, is_target)
    text = chunks * chunks if is_target else chunks * (chunks + 1) // 2
    text += chunks * (tile.count(view) if is_target else -(-view.num_slots // BLOCK))
    # backward: dQ is three products, dK and dV four; a closed tile of the image makes all three with five
    backward = (5 if tile.closed(view) else 7) * image + 7 * text
    return {"forward": 2 * (image + text), "backward": backward, "both": 2 * (image + text) + backward}


def moved_tensors(case: Case) -> dict[str, int]:
    """Tensors of the size of q that the kernels of each pass read or write.

    Backward: q, k, v, out, grad, dq and (closed tiles) dk, dv; else q, k, v, grad, dk, dv again; q, grad for text keys.
    """
    view = window(case.pattern, case.grid)
    backward = 10 if choose_tile(view).closed(view) else 14
    return {"forward": 4, "backward": backward, "both": 4 + backward}


def peers(case: Case, *, with_flex: bool) -> dict:
    """name -> function(q, k, v) -> out; only those that this device has."""
    samples, view = case.samples(), window(case.pattern, case.grid)
    plan = attention_plan(text_slots=case.text_slots, dtype=DTYPES[case.dtype], **case.call())
    found = {"ours": lambda q, k, v: sparse_attention(q, k, v, plan=plan, **case.call())}
    one = {name: t[:1] for name, t in samples.items()}
    mask = dense_mask(case.pattern, case.grid, case.text_slots, **one)[:, None]
    mask = mask | ~mask.any(-1, keepdim=True)  # all samples are alike; padding rows must see something
    found["sdpa with mask"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if case.device == "cpu":
        return found

    def dense(backend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    def unfused(q, k, v):
        scores = (q @ k.transpose(-1, -2)) * case.channels**-0.5
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

    found["sdpa flash, dense causal"] = dense(SDPBackend.FLASH_ATTENTION)
    found["sdpa cudnn, dense causal"] = dense(SDPBackend.CUDNN_ATTENTION)
    found["matmul-softmax-matmul"] = unfused
    if not with_flex:
        return found
    found["flex, raster order"] = flex(case, view, None)
    if case.pattern == "column":
        image = torch.arange(view.num_slots, device=case.device).view(case.grid).t().flatten()
        order = torch.cat([torch.arange(case.text_slots, device=case.device), case.text_slots + image])
        found["flex, permuted in advance"] = flex(case, view, order)
    return found


def flex(case: Case, view, order: torch.Tensor | None):
    """FlexAttention with our mask; `order` [S]: which slot lies at each place of an already permuted input."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    samples = case.samples()
    length, prefix, target = (samples[n][0] for n in ("text_len", "text_prefix", "image_is_target"))

    def mask_mod(batch, head, query, key):
        query, key = (query, key) if order is None else (order[query], order[key])
        return visible(view, case.text_slots, query, key, length, prefix, target)

    # A compilation for each mask, and another with gradients: beyond the limit FlexAttention would run unfused.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 256, True
    blocks = create_block_mask(mask_mod, None, None, case.slots, case.slots, device=case.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def gradients(function, q, k, v, grad) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(case: Case) -> str | None:
    """Why the case may not be timed, or None."""
    inputs = case.inputs(heads=CHECKED_HEADS)
    call = case.call()
    seen = dense_mask(case.pattern, case.grid, case.text_slots, **case.samples()).any(-1)[:, None, :, None]

    def ours(q, k, v):
        return sparse_attention(q, k, v, **call)

    def torchs(q, k, v):
        mask = dense_mask(case.pattern, case.grid, case.text_slots, **case.samples())[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~seen).masked_fill(~seen, 0)

    exact = gradients(lambda *x: reference_attention(*x, **call), *(t.double() for t in inputs))
    mine, theirs = gradients(ours, *inputs), gradients(torchs, *inputs)
    for name, want, a, b in zip(("out", "dq", "dk", "dv"), exact, mine, theirs):
        our_error, their_error = (float((x.double() - want).norm() / want.norm()) for x in (a, b))
        if not our_error <= (2 if name == "out" else 3) * max(their_error, 1e-6):
            return f"{name}: relative error {our_error:.2e}, torch's is {their_error:.2e}"
    for _ in range(9):
        if not all(torch.equal(a, b) for a, b in zip(mine, gradients(ours, *inputs))):
            return "two backward passes differ"
    return None


def run_case(case: Case, rates: tuple[float, float], repeats: int, *, with_flex: bool) -> list[dict]:
    """One row per implementation and pass."""
    rows = []
    pairs, programs = useful_pairs(case), case.batch * case.heads
    matmuls, tensors = computed_matmuls(case), moved_tensors(case)
    tensor_bytes = programs * case.slots * case.channels * DTYPES[case.dtype].itemsize
    q, k, v, grad = case.inputs()
    for name, function in peers(case, with_flex=with_flex).items():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        try:
            out = function(*leaves)
            torch.autograd.grad(out, leaves, grad, retain_graph=True)
        except RuntimeError as error:  # a peer that this device or size does not have (out of memory included)
            if name == "ours":
                raise
            rows.append({**asdict(case), "name": name, "unavailable": str(error).splitlines()[0][:200]})
            continue
        passes = {
            "forward": lambda: function(q, k, v),
            "backward": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
            "both": lambda: torch.autograd.grad(function(*leaves), leaves, grad),
        }
        for which, step in passes.items():
            median, low, high = measure(step, case.device, repeats)
            row = {**asdict(case), "name": name, "pass": which, "ms": median, "ms_20": low, "ms_80": high}
            useful_matmuls = {"forward": 2, "backward": 5, "both": 7}[which]  # no algorithm needs more
            row["useful_tflops"] = useful_matmuls * 2 * pairs * case.channels * programs / median / 1e9
            if name == "ours" and case.device == "cuda":  # the tiles counted are those of the Triton kernels
                flops = matmuls[which] * 2 * BLOCK * BLOCK * case.channels * programs
                floor = max(flops / rates[0], tensors[which] * tensor_bytes / rates[1])
                row["roofline_fraction"] = floor * 1e3 / median
            rows.append(row)
        del out
    return rows


def report(rows: list[dict]) -> None:
    ours = {row["pass"]: row for row in rows if row["name"] == "ours"}
    for row in rows:
        if "unavailable" in row:
            print(f"  {row['name']:28} unavailable: {row['unavailable']}")
            continue
        fraction = row.get("roofline_fraction")
        faster = f"  ours is {row['ms'] / ours[row['pass']]['ms']:.2f}x as fast" if row["name"] != "ours" else ""
        tail = f"  roofline {fraction:.0%}" if fraction else faster
        print(
            f"  {row['name']:28} {row['pass']:9} {row['ms']:9.3f} ms ({row['ms_20']:.3f}-{row['ms_80']:.3f})"
            f"  useful {row['useful_tflops']:8.4g} TFLOP/s{tail}",
            flush=True,
        )


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--directions", default="text_to_image,image_to_text")
    parser.add_argument("--grids", help="default: 32x32,64x64,96x96 on a GPU, 32x32 on a CPU")
    parser.add_argument("--batch", type=int, help="default: 4 on a GPU, 1 on a CPU")
    parser.add_argument("--heads", type=int, help="default: 64 on a GPU (the 10B model), 8 on a CPU")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--text-slots", type=int, default=128)
    parser.add_argument("--text-len", type=int, help="valid text slots, default: all")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--flex", default="text_to_image,image_to_text", help="directions measured with FlexAttention too (slow to compile)"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="write every row, with hardware and versions, to this file")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    grids = args.grids or ("32x32,64x64,96x96" if gpu else "32x32")
    dtype = args.dtype or ("bf16" if gpu else "fp32")
    text_len = args.text_slots if args.text_len is None else args.text_len
    about = surroundings(args.device)
    rates = device_rates(args.device, DTYPES[dtype])
    print(f"{about}\nmatmul {rates[0] / 1e12:.2f} TFLOP/s, copy {rates[1] / 1e9:.0f} GB/s, {dtype}")
    results, failed = [], False
    for grid in (tuple(int(n) for n in g.split("x")) for g in grids.split(",")):
        for pattern in args.patterns.split(","):
            for direction in args.directions.split(","):
                sizes = (args.batch or (4 if gpu else 1), args.heads or (64 if gpu else 8), args.channels)
                case = Case(pattern, direction, grid, *sizes, args.text_slots, text_len, dtype, args.device)
                print(f"{pattern} {direction} {case.text_slots}+{grid[0]}x{grid[1]} B{sizes[0]} H{sizes[1]} D{sizes[2]}")
                wrong = check(case)
                if wrong:
                    failed = True
                    print(f"  WRONG, not timed: {wrong}")
                    continue
                rows = run_case(case, rates, args.repeats, with_flex=direction in args.flex.split(","))
                report(rows)
                results += rows
                if args.json:
                    content = {**about, "matmul_flops": rates[0], "copy_bytes": rates[1], "rows": results}
                    Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
