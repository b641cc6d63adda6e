"""Claim: for rows and columns of a target image, programs that keep the text's keys and walk over tiles beat one program a tile.

    python benchmarks/attention_stationary.py --json benchmarks/results/attention_stationary.json     # on a GPU
    python benchmarks/attention_stationary.py --device cpu                      # registers, compiled for sm_90
    TRITON_INTERPRET=1 python benchmarks/attention_stationary.py --device cpu   # results against fp64, small

An experiment, not yet timed: the kernels below are not part of `kernels`. A program loads the text's keys and values once (128
slots at most) and, with three stages, fetches the next tile while it works on this one (with two, Triton fetches it at the end); of
`kernels.attention` each program does one tile, and two thirds of the keys and values that it reads are text that its neighbours read too.
They take closed tiles of 64 channels in 16 bits and text -> image only; text queries and text keys are left to the kernels of
`kernels.attention` (launches of their own: a small handicap), which are also the peer: forward and backward in the same run, each checked
first against fp64 (error at most twice the peer's and 2e-2) and, whole, against the peer, over memory poisoned with NaN. Medians. If it
wins, it belongs into `kernels/attention`, with the other direction.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
import triton.language as tl

from benchmarks.device_timing import measure, surroundings
from kernels import compile_gate
from kernels.attention import triton_op
from kernels.attention.reference import reference_attention
from kernels.attention.tiles import BLOCK, choose_tile
from kernels.attention.triton_common import box_mask, dot, image_tile, load_rows, store_rows, text_range
from kernels.attention.triton_forward import forward_kernel
from kernels.attention.triton_key_gradient import text_key_gradient_kernel
from kernels.attention.triton_query_gradient import query_gradient_kernel
from kernels.patterns import window
from kernels.runtime import LaunchConfig
from kernels.triton_rounding import INTERPRETED, narrow

TEXT = 128  # slots of text that fit beside two tiles in shared memory
SAMPLES = ("text_len", "text_prefix", "image_is_target")


@triton.jit(do_not_specialize=["heads", "slots", "text_slots"])
def stationary_forward_kernel(
    Q, K, V, OUT, LSE, TEXT_LEN, TEXT_PREFIX,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, heads, slots, text_slots,
    TEXT: tl.constexpr, TILES: tl.constexpr, IMAGE_TILES: tl.constexpr,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, ROW_STEP: tl.constexpr, COL_STEP: tl.constexpr,
    ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """OUT and LSE, as of `forward_kernel`, of TILES closed image tiles; QK_SCALE > 0. One softmax a tile, no running maximum."""
    M: tl.constexpr = TILE_ROWS * TILE_COLS
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    _, prefix = text_range(TEXT_LEN, TEXT_PREFIX, sample, text_slots)
    Q += sample * q_b + head * q_h
    K += sample * k_b + head * k_h
    V += sample * v_b + head * v_h
    text = tl.arange(0, TEXT)
    text_k = load_rows(K, text, k_s, text < prefix, D, BLOCK_D)
    text_v = load_rows(V, text, v_s, text < prefix, D, BLOCK_D)
    unread = tl.where(text < prefix, 0.0, float("-inf"))
    first = tl.program_id(1) * TILES
    for tile in range(first, tl.minimum(first + TILES, IMAGE_TILES)):
        first_row, first_col, row, col, slot, exists = image_tile(
            tile, text_slots, ROWS, COLS, TILE_ROWS, TILE_COLS, ROW_STEP, COL_STEP
        )
        q = load_rows(Q, slot, q_s, exists, D, BLOCK_D)
        k = load_rows(K, slot, k_s, exists, D, BLOCK_D)
        v = load_rows(V, slot, v_s, exists, D, BLOCK_D)
        text_scores = dot(q, tl.trans(text_k), ACC, WIDEN) + unread[None, :]
        scores = dot(q, tl.trans(k), ACC, WIDEN)
        seen = box_mask(
            tl.arange(0, M), M, row, col, True, first_row, first_col, TILE_COLS,
            ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, False,
        )  # fmt: skip
        scores = tl.where(seen & exists[None, :], scores, float("-inf"))
        largest = tl.maximum(tl.max(text_scores, 1), tl.max(scores, 1))
        offset = tl.where(exists, largest, 0.0) * QK_SCALE
        text_p = tl.exp2(text_scores * QK_SCALE - offset[:, None])
        p = tl.exp2(scores * QK_SCALE - offset[:, None])
        total = tl.sum(text_p, 1) + tl.sum(p, 1)
        acc = dot(narrow(text_p, v.dtype, WIDEN), text_v, ACC, WIDEN) + dot(narrow(p, v.dtype, WIDEN), v, ACC, WIDEN)
        out = acc * (1.0 / tl.where(exists, total, 1.0))[:, None]
        store_rows(OUT + sample * o_b + head * o_h, slot, o_s, exists, out, D, BLOCK_D, WIDEN)
        tl.store(LSE + (sample * heads + head) * slots + slot, offset + tl.log2(total), mask=exists)


@triton.jit
def text_share(q, grad, lse, delta, k, v, read, QK_SCALE: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr):
    """dS of a tile's queries and the text keys k, v of which `read` [N] exist, narrowed to the type of k."""
    p = tl.where(read[None, :], tl.exp2(dot(q, tl.trans(k), ACC, WIDEN) * QK_SCALE - lse[:, None]), 0.0)
    return narrow(p * (dot(grad, tl.trans(v), ACC, WIDEN) - delta[:, None]), k.dtype, WIDEN)


@triton.jit(do_not_specialize=["heads", "slots", "text_slots"])
def stationary_gradient_kernel(
    Q, K, V, OUT, GRAD, LSE, DELTA, DQ, DK, DV, TEXT_LEN, TEXT_PREFIX,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, g_b, g_h, g_s,
    dq_b, dq_h, dq_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, heads, slots, text_slots,
    TEXT: tl.constexpr, TILES: tl.constexpr, IMAGE_TILES: tl.constexpr, SCALE: tl.constexpr,
    QK_SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REACH_ROWS: tl.constexpr, REACH_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, ROW_STEP: tl.constexpr, COL_STEP: tl.constexpr,
    ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """DQ, DK, DV and DELTA of TILES closed image tiles, as of `query_gradient_kernel`; the text in two halves, for registers."""
    M: tl.constexpr = TILE_ROWS * TILE_COLS
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    _, prefix = text_range(TEXT_LEN, TEXT_PREFIX, sample, text_slots)
    Q += sample * q_b + head * q_h
    K += sample * k_b + head * k_h
    V += sample * v_b + head * v_h
    OUT += sample * o_b + head * o_h
    GRAD += sample * g_b + head * g_h
    LSE += (sample * heads + head) * slots
    DELTA += (sample * heads + head) * slots
    early = tl.arange(0, TEXT // 2)
    late = early + TEXT // 2
    early_k = load_rows(K, early, k_s, early < prefix, D, BLOCK_D)
    early_v = load_rows(V, early, v_s, early < prefix, D, BLOCK_D)
    late_k = load_rows(K, late, k_s, late < prefix, D, BLOCK_D)
    late_v = load_rows(V, late, v_s, late < prefix, D, BLOCK_D)
    first = tl.program_id(1) * TILES
    for tile in range(first, tl.minimum(first + TILES, IMAGE_TILES)):
        first_row, first_col, row, col, slot, exists = image_tile(
            tile, text_slots, ROWS, COLS, TILE_ROWS, TILE_COLS, ROW_STEP, COL_STEP
        )
        q = load_rows(Q, slot, q_s, exists, D, BLOCK_D)
        grad = load_rows(GRAD, slot, g_s, exists, D, BLOCK_D)
        k = load_rows(K, slot, k_s, exists, D, BLOCK_D)
        v = load_rows(V, slot, v_s, exists, D, BLOCK_D)
        out = load_rows(OUT, slot, o_s, exists, D, BLOCK_D)
        lse = tl.load(LSE + slot, mask=exists, other=float("inf"))
        delta = tl.sum(grad.to(ACC) * out.to(ACC), 1)
        tl.store(DELTA + slot, delta, mask=exists)
        seen = box_mask(
            tl.arange(0, M), M, row, col, True, first_row, first_col, TILE_COLS,
            ROWS, COLS, REACH_ROWS, REACH_COLS, TILE_ROWS, TILE_COLS, False,
        )  # fmt: skip
        seen = seen & exists[None, :]
        p = tl.where(seen, tl.exp2(dot(q, tl.trans(k), ACC, WIDEN) * QK_SCALE - lse[:, None]), 0.0)
        ds = narrow(p * (dot(grad, tl.trans(v), ACC, WIDEN) - delta[:, None]), q.dtype, WIDEN)
        dv = dot(tl.trans(narrow(p, q.dtype, WIDEN)), grad, ACC, WIDEN)
        store_rows(DV + sample * dv_b + head * dv_h, slot, dv_s, exists, dv, D, BLOCK_D, WIDEN)
        dk = dot(tl.trans(ds), q, ACC, WIDEN)
        store_rows(DK + sample * dk_b + head * dk_h, slot, dk_s, exists, dk * SCALE, D, BLOCK_D, WIDEN)
        dq = dot(ds, k, ACC, WIDEN)
        dq += dot(text_share(q, grad, lse, delta, early_k, early_v, early < prefix, QK_SCALE, ACC, WIDEN), early_k, ACC, WIDEN)
        dq += dot(text_share(q, grad, lse, delta, late_k, late_v, late < prefix, QK_SCALE, ACC, WIDEN), late_k, ACC, WIDEN)
        store_rows(DQ + sample * dq_b + head * dq_h, slot, dq_s, exists, dq * SCALE, D, BLOCK_D, WIDEN)


class Contender:
    """Attention of q, k, v [B, H, S, D] by the kernels above, TILES tiles a program, and by `kernels.attention` beside them."""

    def __init__(self, pattern: str, grid: tuple[int, int], samples: list[torch.Tensor], tiles: int, stages: int, warps: int):
        view = window(pattern, grid)
        self.window = [view.rows, view.cols, view.reach_rows, view.reach_cols]
        self.samples, self.tiles, self.config = samples, tiles, LaunchConfig(warps, stages)

    def _run(self, launch, kernel, *args, **constants) -> None:
        constants |= launch.constants | dict(TEXT=TEXT, TILES=self.tiles, IMAGE_TILES=launch.image_tiles)
        programs = launch.programs, -(-launch.image_tiles // self.tiles)
        with launch.device:
            triton_op.runtime.start_kernel(kernel, programs, args, triton_op._own(kernel, constants), self.config)

    def forward(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        scale, strides = q.shape[-1] ** -0.5, triton_op._strides
        launch = triton_op._Launch((q, k, v), self.window, scale)
        out, lse = triton_op._heads_last(q), triton_op._statistics(q)
        args = strides(q, k, v, out)
        launch.run("closed_forward", forward_kernel, launch.text_tiles, q, k, v, out, lse, *self.samples, *args, *launch.sizes)
        self._run(launch, stationary_forward_kernel, q, k, v, out, lse, *self.samples[:2], *args, *launch.sizes[:3])
        return out, lse

    def backward(self, grad, q, k, v, out, lse) -> tuple[torch.Tensor, ...]:
        scale, strides = q.shape[-1] ** -0.5, triton_op._strides
        launch = triton_op._Launch((q, k, v, out, grad), self.window, scale)
        dq, dk, dv = (triton_op._heads_last(x) for x in (q, k, v))
        delta = torch.empty_like(lse)
        tensors, args = (q, k, v, out, grad, lse, delta, dq, dk, dv), strides(q, k, v, out, grad, dq, dk, dv)
        launch.run(
            "closed_gradient", query_gradient_kernel, launch.text_tiles, *tensors, *self.samples, *args, *launch.sizes,
            SPLIT=launch.split_gradient, SCALE=scale,
        )  # fmt: skip
        self._run(launch, stationary_gradient_kernel, *tensors, *self.samples[:2], *args, *launch.sizes[:3], SCALE=scale)
        chunks = -(-launch.view.num_slots // triton_op.CHUNK_SLOTS)
        parts = [lse.new_empty(chunks, *q.shape[:2], launch.text_slots, q.shape[-1]) for _ in range(2)] if chunks > 1 else [dk, dv]
        launch.run(
            "text_key_gradient", text_key_gradient_kernel, launch.text_tiles * chunks, q, k, v, grad, lse, delta, dk, dv, *parts,
            *self.samples[:2], *strides(q, k, v, grad, dk, dv), *q.shape[1:3], launch.text_slots,
            CHUNKS=chunks, CHUNK_SLOTS=triton_op.CHUNK_SLOTS, SCALE=scale,
        )  # fmt: skip
        if chunks > 1:
            for whole, part in zip((dk, dv), parts):
                whole[:, :, : launch.text_slots] = part.sum(0)
        return dq, dk, dv


class Plain:
    """The kernels of `kernels.attention`."""

    def __init__(self, pattern: str, grid: tuple[int, int], samples: list[torch.Tensor]):
        view = window(pattern, grid)
        self.window, self.samples = [view.rows, view.cols, view.reach_rows, view.reach_cols], samples

    def forward(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        return triton_op.attention_forward(q, k, v, *self.samples, self.window, q.shape[-1] ** -0.5)

    def backward(self, grad, q, k, v, out, lse) -> tuple[torch.Tensor, ...]:
        return triton_op.attention_backward(grad, q, k, v, out, lse, *self.samples, self.window, q.shape[-1] ** -0.5)


@contextmanager
def poisoned() -> Iterator[None]:
    """NaN in all uninitialised memory: what a kernel does not write is noticed."""
    settings = torch.utils.deterministic
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(contender, q, k, v, grad) -> list[torch.Tensor]:
    """Output, dq, dk and dv."""
    with poisoned():
        out, lse = contender.forward(q, k, v)
        return [out, *contender.backward(grad, q, k, v, out, lse)]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.double().norm())


def wrong(contender, peer, tensors: list[torch.Tensor], pattern: str, grid: tuple[int, int]) -> str | None:
    """Why the contender may not be timed, or None: last sample and two heads against fp64, everything against the peer."""
    few, samples = [x[-1:, -2:] for x in tensors], peer.samples
    leaves = [x.detach().double().requires_grad_() for x in few[:3]]
    last = dict(zip(SAMPLES, (x[-1:] for x in samples)))
    out = reference_attention(*leaves, grid=grid, pattern=pattern, **last)
    exact = [x.detach() for x in (out, *torch.autograd.grad(out, leaves, few[3].double()))]
    ours, theirs = results(contender, *tensors), results(peer, *tensors)
    for name, want, a, b in zip(("out", "dq", "dk", "dv"), exact, ours, theirs):
        our_error, their_error, apart = distance(a[-1:, -2:], want), distance(b[-1:, -2:], want), distance(a, b)
        if not (our_error <= 2 * max(their_error, 1e-12) and our_error <= 2e-2 and apart <= 1e-2):
            return f"{name}: relative error {our_error:.2e}, of the kernels in use {their_error:.2e}; {apart:.2e} apart"
    return None


def compiled(contender: Contender, tensors: list[torch.Tensor], pattern: str, grid: tuple[int, int]) -> list[str]:
    """Registers, spills and shared memory of both kernels for sm_90."""
    seen, lines = [], []
    start, triton_op.runtime.start_kernel = triton_op.runtime.start_kernel, lambda kernel, _, *call: seen.append((kernel, call))
    try:
        out, lse = contender.forward(*tensors[:3])
        contender.backward(tensors[3], *tensors[:3], out, lse)
    finally:
        triton_op.runtime.start_kernel = start
    for kernel, call in seen:
        if "stationary" in kernel.fn.__name__:
            launch = compile_gate.Recorded(kernel, *call)
            made = compile_gate.compile_launch(launch, 90, pattern, "bfloat16", 64, grid)
            lines.append(f"{made.kernel}: {made.registers} registers, {made.spilled} bytes spilled, {made.shared} bytes of shared memory")
    return lines


def examine(one, peer, tensors, name: str, pattern: str, grid: tuple[int, int], args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the passes of one contender or of the peer; without a GPU, and after a wrong result, none."""
    if args.device == "cpu" and not INTERPRETED:
        for line in compiled(one, tensors, pattern, grid) if one is not peer else ():
            print(f"{name}: {line}", flush=True)
        return {}
    if problem := one is not peer and wrong(one, peer, tensors, pattern, grid):
        raise ValueError(f"WRONG, not timed: {problem}")
    if args.device == "cpu":
        print(f"{name}: right", flush=True)
        return {}
    q, k, v, grad = tensors
    out, lse = one.forward(q, k, v)
    steps = {"forward": lambda: one.forward(q, k, v), "backward": lambda: one.backward(grad, q, k, v, out, lse)}
    return {which: measure(step, "cuda", args.repeats)[0] for which, step in steps.items()}


def main() -> int:
    """The command line; the exit status is 1 if a contender is wrong or does not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--patterns", default="row", help="row, column: the same kernel, other addresses")
    parser.add_argument("--grids", default="32x32,64x64", help="sides of at most 64, so that tiles are closed")
    parser.add_argument("--tiles", default="8,16", help="tiles a program walks over")
    parser.add_argument("--stages", default="2,3")
    parser.add_argument("--warps", default="4,8")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the figures, with hardware and versions, to this file")
    args = parser.parse_args()
    about, rows, failed = surroundings(args.device), [], False
    grids, text = [tuple(int(n) for n in grid.split("x")) for grid in args.grids.split(",")], TEXT
    dtype = torch.float64 if INTERPRETED else torch.bfloat16
    if args.device == "cpu":
        args.batch, args.heads = 2, 2
        grids, text = ([(8, 16), (7, 16)], 70) if INTERPRETED else (grids, text)
    settings = list(product(*([int(n) for n in option.split(",")] for option in (args.tiles, args.stages, args.warps))))
    print(about)
    for pattern, grid in product(args.patterns.split(","), grids):
        view = window(pattern, grid)
        if not choose_tile(view).closed(view):
            print(f"{pattern} {grid[0]}x{grid[1]}: left out, its tiles of {BLOCK} are not closed", flush=True)
            continue
        torch.manual_seed(0)
        shape = (args.batch, text + grid[0] * grid[1], args.heads, 64)
        packed = torch.randn(*shape[:3], 3, 64, device=args.device, dtype=dtype)
        tensors = [*packed.permute(3, 0, 2, 1, 4).unbind(), torch.randn(shape, device=args.device, dtype=dtype).transpose(1, 2)]
        samples = [torch.full((args.batch,), n, dtype=torch.int32, device=args.device) for n in (text, text, 1)]
        peer, usual = Plain(pattern, grid, samples), {}
        for setting in (None, *settings):
            one = Contender(pattern, grid, samples, *setting) if setting else peer
            about_it = "{} tiles a program, {} stages, {} warps".format(*setting) if setting else "kernels in use"
            name = f"{pattern} {grid[0]}x{grid[1]}, {about_it}"
            row = dict(pattern=pattern, grid=grid, **dict(zip(("tiles", "stages", "warps"), setting or ())))
            try:
                row["ms"] = examine(one, peer, tensors, name, pattern, grid, args)
            except Exception as error:  # one that does not run must not cost the figures of the others
                failed, row["error"] = True, " ".join(str(error).split())[-300:]
                print(f"{name}: {type(error).__name__}: {row['error']}", flush=True)
            usual = usual or row.get("ms", {})
            for which, ms in row.get("ms", {}).items():
                print(f"{name}: {which} {ms:.3f} ms, {usual[which] / ms:.2f}x", flush=True)
            rows.append(row)
            if args.json:
                content = {**about, "batch": args.batch, "heads": args.heads, "channels": 64, "text_slots": text, "rows": rows}
                args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
