"""Claim: what sparse layers change in training, against dense layers of the same model.

    python benchmarks/sparse_dense.py --demo runs/demo        # a folder of `vilg demo`: its tokens and tokenizers are used

1. Time and memory of a training step (forward, backward, AdamW) of a small model on grids of 32 x 32 and 64 x 64: sparse
   and dense take turns in one process, medians with the 20 and 80 % quantiles; memory is what autograd keeps for the
   backward pass, counted storage by storage.
2. Loss curves of the demo's recipe with both kinds of layers, same seed and batches, as `vilg train` with one process.

Writes benchmarks/results/sparse_dense.json and docs/sparse_dense.png. On a GPU (`--device cuda`) part 1 uses bf16.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from vilg.checkpoint.state import source_commit, versions  # noqa: E402
from vilg.config.schema import ModelConfig  # noqa: E402
from vilg.errors import UserError  # noqa: E402
from vilg.model.loss import direction_losses  # noqa: E402
from vilg.model.vilg import Vilg  # noqa: E402
from vilg.pictures.plots import read_metrics, save_figure, smoothed  # noqa: E402
from vilg.tokens.sequence import SequenceBatch, SequenceSpec, collate, image_to_text, text_to_image  # noqa: E402

RESULT, PICTURE = ROOT / "benchmarks/results/sparse_dense.json", ROOT / "docs/sparse_dense.png"
SHAPE = dict(num_layers=4, hidden_size=256, num_heads=4)  # row, column, row, conv; heads of 64 as the 10B model's
TEXT_SLOTS, CAPTION = 64, 20
KINDS = ("sparse", "dense")
COLORS = {"sparse": "#1f6fb4", "dense": "#c2571a"}


def batch_of(spec: SequenceSpec) -> SequenceBatch:
    """One sequence of each direction."""
    generator = np.random.default_rng(0)
    text = generator.integers(4, spec.text_vocab_size, CAPTION).tolist()
    codes = generator.integers(0, spec.image_vocab_size, spec.image_slots)
    return collate([text_to_image(spec, text, codes), image_to_text(spec, text, codes)])


class Step:
    """A model that can be stepped."""

    def __init__(self, kind: str, grid: tuple[int, int], device: torch.device) -> None:
        spec = SequenceSpec(TEXT_SLOTS, grid, text_vocab_size=1024, image_vocab_size=8192)
        self.model = Vilg(ModelConfig(attention=kind, **SHAPE), spec)
        self.model.reset_parameters(0)
        self.model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        self.batch, self.device = batch_of(spec).to(device), device

    def loss(self) -> torch.Tensor:
        return sum(direction_losses(*self.model(*self.batch.inputs()), self.batch.text_target, self.batch.image_target))

    def seconds(self) -> float:
        self._wait()
        started = time.perf_counter()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return time.perf_counter() - started

    def kept_bytes(self) -> int:
        """Of the forward pass for the backward pass, beside the parameters."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        total = sum(kept.values())
        loss.backward()
        self.optimizer.zero_grad()
        return total

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure_steps(grid: tuple[int, int], repeats: int, device: torch.device) -> dict[str, dict]:
    steps = {kind: Step(kind, grid, device) for kind in KINDS}
    for step in steps.values():
        step.seconds()
    taken = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind, step in steps.items():
            taken[kind].append(step.seconds())
    found = {
        kind: {
            "median_ms": round(1e3 * statistics.median(times), 1),
            "q20_q80_ms": [round(1e3 * float(q), 1) for q in np.quantile(times, (0.2, 0.8))],
            "kept_for_backward_mib": round(steps[kind].kept_bytes() / 2**20, 1),
        }
        for kind, times in taken.items()
    }
    ratios = [dense / sparse for sparse, dense in zip(taken["sparse"], taken["dense"])]
    return found | {"dense_over_sparse_time": round(statistics.median(ratios), 2)}


def train_curves(demo: Path, steps: int, folder: Path) -> dict[str, list[dict]]:
    """Metrics of both runs. Raises UserError if the demo's data are not there or a run fails."""
    needed = {"data.train": "tokens", "tokens.text_model": "text.model", "tokens.image_model": "image_tokenizer"}
    for name in needed.values():
        if not (demo / name).exists():
            raise UserError(f"{demo / name} is not there; make it with: vilg demo --out {demo}")
    curves = {}
    for kind in KINDS:
        run = folder / kind
        settings = {key: demo / name for key, name in needed.items()} | {
            "run_dir": run, "model.attention": kind, "schedule.steps": steps, "checkpoint.every_steps": steps,
            "samples.every_steps": 0, "logging.every_steps": 50, "parallel.engine": "torch", "precision": "fp32",
        }  # fmt: skip
        arguments = [f"--{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "vilg", "train", "launch/recipes/demo/train.yaml", *arguments]
        subprocess.run(command, check=True, cwd=ROOT)
        curves[kind] = read_metrics(run / "logs" / "metrics.jsonl")
    return curves


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    for axes, key, title in zip(figure.subplots(1, 2), ("image_loss", "text_loss"), ("text → image", "image → text")):
        for kind, rows in curves.items():
            values = np.array([np.nan if row[key] is None else row[key] for row in rows], float)
            axes.plot([row["step"] for row in rows], values, color=COLORS[kind], alpha=0.2, linewidth=0.7)
            axes.plot([row["step"] for row in rows], smoothed(values), color=COLORS[kind], linewidth=1.6, label=f"{kind} layers")
        axes.set(xlabel="optimizer step", ylabel="nats per target token", title=title, ylim=(0, None))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    save_figure(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of `vilg demo`")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each curve")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each kind and grid")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or platform.machine()}, 1 thread"
    result = {"hardware": where, "versions": versions(), "commit": source_commit(), "shape": SHAPE, "batch": 2,
              "text_slots": TEXT_SLOTS, "steps": {}}  # fmt: skip
    for side, repeats in ((32, args.repeats), (64, max(3, args.repeats // 3))):
        found = measure_steps((side, side), repeats, device)
        result["steps"][f"{side}x{side}"] = found
        for kind in KINDS:
            print(f"{side}x{side} {kind:6} {found[kind]['median_ms']:9.1f} ms, keeps {found[kind]['kept_for_backward_mib']:8.1f} MiB", flush=True)
        print(f"{side}x{side} dense / sparse: {found['dense_over_sparse_time']:.2f} in time")
    try:
        with tempfile.TemporaryDirectory() as folder:
            curves = train_curves(args.demo, args.steps, Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    draw(curves, PICTURE)
    last = max(1, args.steps // 10)
    result["demo"] = {"steps": args.steps, "mean_over_last_steps": last} | {
        kind: {key: round(statistics.fmean(row[key] for row in rows[-last:] if row[key] is not None), 4)
               for key in ("image_loss", "text_loss")}
        for kind, rows in curves.items()
    }  # fmt: skip
    print(json.dumps(result["demo"], indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
