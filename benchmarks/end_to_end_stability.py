"""Claim: 5,000 steps of end-to-end training with the adversarial loss on do not diverge, with the stability tools; and what
happens without them.

    python benchmarks/end_to_end_stability.py --demo runs/demo                      # all runs, one after another
    python benchmarks/end_to_end_stability.py --demo runs/demo --only 0:with        # one run, as a job of its own
    python benchmarks/end_to_end_stability.py --demo runs/demo --draw               # picture and result file from finished runs

Each run is `vilg train` (engine torch, fp32, one thread) on images of the demo at 16 pixels (end_to_end_setup.py): a small
transformer, the decoder started from an image tokenizer trained on them, and a discriminator. Two forms, three seeds each:

- with: the recipe's defaults, scaled to 5,000 steps (ramps, balance, adaptive weight, clips and rates of their own, R1, EMA);
- without: the same weights of the losses and nothing else: no ramp, no balance, no adaptive weight, no R1, no clipping of decoder
  and discriminator, all of them at the transformer's rate, the discriminator from the first step.

A run counts as diverged if a loss or gradient was not finite, or its generation or pixel loss over the last 250 steps is above
that over steps 250 to 500. Writes docs/end_to_end_stability.png and benchmarks/results/end_to_end_stability.json.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.end_to_end_setup import END_TO_END, prepare, side_by_side, train  # noqa: E402
from vilg.checkpoint.state import source_commit, versions  # noqa: E402
from vilg.pictures.plots import read_metrics, save_figure, smoothed  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "end_to_end_stability.json"
PICTURE = ROOT / "docs" / "end_to_end_stability.png"
FORMS, SEEDS, STEPS = ("with", "without"), (0, 1, 2), 5000
LR = 1e-3
SHAPE = {
    "model.num_layers": 2, "model.hidden_size": 64, "model.num_heads": 2, "batch.global_size": 4, "batch.micro_size": 4,
    "optimizer.lr": LR, "data.text_to_image_fraction": 0.75,
}  # fmt: skip
ADVERSARY = {"weight": 0.5, "width": 16, "layers": 2}
TOOLS = {
    "with": {
        "ramp_steps": 500, "lr": 3e-4, "adversarial.start_step": 500, "adversarial.ramp_steps": 500, "adversarial.lr": 3e-4,
    },
    "without": {
        "ramp_steps": 0, "balance": False, "lr": LR, "grad_clip": 1e9, "ema": 0, "adversarial.start_step": 1,
        "adversarial.ramp_steps": 0, "adversarial.adaptive": False, "adversarial.r1_weight": 0, "adversarial.lr": LR,
        "adversarial.grad_clip": 1e9,
    },
}  # fmt: skip
CURVES = (
    ("grad_norm", "transformer: gradient norm"),
    ("reconstructor_grad_norm", "mapping and decoder: gradient norm"),
    ("discriminator_grad_norm", "discriminator: gradient norm"),
    ("image_loss", "generation loss, nats per image token"),
    ("reconstruction_loss", "pixel loss"),
    ("discriminator_loss", "discriminator's hinge loss (1: it cannot tell)"),
)
COLORS = {"with": "#1f6fb4", "without": "#c2571a"}


def run_one(work: Path, seed: int, form: str, steps: int) -> None:
    settings = SHAPE | {
        "seed": seed, "schedule.steps": steps, "schedule.warmup_steps": steps // 50, "checkpoint.every_steps": steps,
        **{f"{END_TO_END}adversarial.{key}": value for key, value in ADVERSARY.items()},
        **{END_TO_END + key: value for key, value in TOOLS[form].items()},
    }  # fmt: skip
    try:
        print(f"{form}, seed {seed}: {train(work, work / f'{form}-{seed}', settings):.0f} s", flush=True)
    except subprocess.CalledProcessError as error:  # the guards end a run that stays non-finite: that is a result
        print(f"{form}, seed {seed}: ended with exit code {error.returncode}", flush=True)


def column(rows: list[dict], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], float)


def judged(rows: list[dict], steps: int) -> dict:
    """Figures of one run."""
    window = max(10, steps // 20)

    def mean(key: str, where: slice) -> float:
        return round(float(np.nanmean(column(rows, key)[where])), 4)

    losses = ("image_loss", "text_loss", "reconstruction_loss")
    early = {key: mean(key, slice(window, 2 * window)) for key in losses}
    late = {key: mean(key, slice(-window, None)) for key in losses}
    broken = sum(
        bool(row["skipped"] or row["reconstructor_skipped"] or row["discriminator_skipped"] or row["loss"] is None) for row in rows
    )
    rises = [key for key in losses if not late[key] <= early[key]]
    norms = {
        key: {"median": round(float(np.nanmedian(column(rows, key))), 4), "largest": round(float(np.nanmax(column(rows, key))), 2)}
        for key, _ in CURVES[:3]
    }
    return {
        "steps": len(rows), "steps_not_finite": broken, "losses_that_rose": rises, "early": early, "late": late,
        "discriminator_loss_late": mean("discriminator_loss", slice(-window, None)), "gradient_norms": norms,
        "diverged": bool(broken or rises or len(rows) < steps),
    }  # fmt: skip


def draw(found: dict[tuple[str, int], list[dict]]) -> None:
    figure = Figure(figsize=(11, 6.5), layout="constrained", dpi=110)
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, CURVES):
        for (form, seed), rows in found.items():
            values = column(rows, key)
            values[values == 0] = np.nan  # the discriminator has not begun
            label = f"{form} the tools" if seed == min(s for f, s in found if f == form) else None
            axes.plot(column(rows, "step"), smoothed(values), color=COLORS[form], linewidth=1.2, alpha=0.8, label=label)
            if "norm" in key:
                axes.plot(column(rows, "step"), values, color=COLORS[form], linewidth=0.3, alpha=0.25)
        if "norm" in key:
            axes.set_yscale("log")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.25)
    figure.axes[0].legend(frameon=False)
    save_figure(figure, PICTURE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of `vilg demo`")
    parser.add_argument("--work", type=Path, default=Path("runs/end_to_end_stability"), help="folder for shards and runs")
    parser.add_argument("--only", metavar="SEED:FORM", help="do one run and stop")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, a core each")
    parser.add_argument("--draw", action="store_true", help="train nothing; picture and result from the runs in --work")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    work = args.work.resolve()
    if not args.draw:
        prepare(args.demo.resolve(), work, shards=4)
    if args.only:
        seed, form = args.only.split(":")
        run_one(work, int(seed), form, args.steps)
        return 0
    if not args.draw:
        own = ["--demo", str(args.demo), "--work", str(work), "--steps", str(args.steps)]
        side_by_side(__file__, [[*own, "--only", f"{seed}:{form}"] for seed in SEEDS for form in FORMS], args.jobs)
    found = {
        (form, seed): read_metrics(work / f"{form}-{seed}" / "logs" / "metrics.jsonl")
        for form in FORMS for seed in SEEDS if (work / f"{form}-{seed}" / "logs" / "metrics.jsonl").exists()
    }  # fmt: skip
    if args.steps == STEPS:
        draw(found)
    runs = {f"{form} seed {seed}": judged(rows, args.steps) for (form, seed), rows in found.items()}
    for name, figures in runs.items():
        norms = {key: value["largest"] for key, value in figures["gradient_norms"].items()}
        print(f"{name:15} diverged {figures['diverged']}  not finite {figures['steps_not_finite']}  late {figures['late']}  "
              f"largest norms {norms}")  # fmt: skip
    summary = {
        form: {
            key: round(statistics.mean(figures["late"][key] for name, figures in runs.items() if name.startswith(f"{form} ")), 4)
            for key in ("image_loss", "text_loss", "reconstruction_loss")
        }
        for form in FORMS if any(name.startswith(f"{form} ") for name in runs)
    }  # fmt: skip
    result = {
        "hardware": f"{platform.processor() or platform.machine()}, 1 thread", "versions": versions(), "commit": source_commit(),
        "shape": SHAPE, "adversary": ADVERSARY, "tools": TOOLS, "steps": args.steps, "runs": runs, "late_means": summary,
    }  # fmt: skip
    if args.steps == STEPS:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
