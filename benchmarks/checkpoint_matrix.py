"""Claim: a run continues on any layout, and every layout's checkpoint exports to the same tensors.

    python benchmarks/checkpoint_matrix.py                   # about six minutes on two cores
    python benchmarks/checkpoint_matrix.py --layouts t1p1d1z0 t2p1d1z0

A tiny model (the debug recipe, fp32) is trained for 5 steps under every layout (tensor, pipeline, data size, ZeRO
stage) and then continued for 10 steps under every layout, its own included. Each continued run saves again before its
first step. Checked, and written to benchmarks/results/checkpoint_matrix.json:

- losses of the 10 steps against the unbroken run of one process without DeepSpeed: 1e-6 relative; in every digit where
  the layout is the same and is compared with its own unbroken run;
- weights and both moments, gathered, are those of the checkpoint bit by bit when the run is about to continue;
- the export of what was saved again, verified against the stored probes, equals that of the checkpoint tensor by
  tensor.

The same, except for the losses' tolerance, is done in bf16, where DeepSpeed keeps fp32 weights in three other ways.
Exits with 1 if any of this fails.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors import safe_open

from tests.distributed.helpers import run_distributed
from tests.distributed.resume_support import Job, Layout, branch, differing, distance, latest, train_jobs
from tests.golden.make import DEBUG_RECIPE, make_data, read_losses
from vilg.checkpoint.export import export
from vilg.checkpoint.reader import MOMENTS
from vilg.checkpoint.state import source_commit, versions
from vilg.config import load_recipe

RESULT = Path(__file__).parent / "results" / "checkpoint_matrix.json"
LAYOUTS = (
    Layout(1, 1, 1, 0),
    Layout(1, 1, 2, 1),
    Layout(1, 1, 2, 3),
    Layout(2, 1, 1, 0),
    Layout(2, 1, 2, 1),
    Layout(1, 2, 1, 1),
    Layout(2, 2, 1, 1),
)
LAYOUTS_BF16 = (
    Layout(engine="torch"),
    Layout(1, 1, 1, 1),
    Layout(1, 1, 2, 2),
    Layout(2, 1, 1, 3),
    Layout(1, 2, 1, 1),
)
SAVED, STEPS = 5, 15
CHECKPOINT = f"step_{SAVED:08d}"
RECIPE = {
    "schedule.steps": STEPS,
    "checkpoint.every_steps": SAVED,
    "checkpoint.keep_last": 9,
    "logging.tensorboard": "false",
    "logging.every_steps": 5,
}
TOLERANCE = 1e-6


def exported(checkpoint: Path, out: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint's export, which recomputes the stored probes."""
    export(checkpoint, out, dtype="fp32")
    tensors = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            tensors |= {name: stream.get_tensor(name) for name in stream.keys()}
    return tensors


def largest_relative(found: list[float], wanted: list[float]) -> float:
    """Largest relative difference of two lists of losses of the same length."""
    assert len(found) == len(wanted) == STEPS, (len(found), len(wanted))
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=[x.name for x in LAYOUTS + LAYOUTS_BF16], help="only these")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="only this")
    options = parser.parse_args()
    started, found = time.time(), {}
    for precision, layouts in {"fp32": LAYOUTS, "bf16": LAYOUTS_BF16}.items():
        if options.precision in (None, precision):
            layouts = [layout for layout in layouts if not options.layouts or layout.name in options.layouts]
            with tempfile.TemporaryDirectory() as scratch:
                found[precision] = measure(Path(scratch), layouts, precision)
    content = {
        "format_version": 1,
        "claim": "a run continues on any layout with the losses of the unbroken one; exports are equal",
        "command": "python benchmarks/checkpoint_matrix.py",
        "commit": source_commit(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": None},
        "versions": versions(),
        "seconds": round(time.time() - started, 1),
        "tolerance": TOLERANCE,
        **found,
    }
    failed = [f"{precision} {name}" for precision, part in found.items() for name in part["failed"]]
    print(f"{sum(len(part['moves']) for part in found.values())} moves, {len(failed)} failed: {failed}")
    if len(found) == 2 and not options.layouts:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failed else 0


def measure(folder: Path, layouts: list[Layout], precision: str) -> dict:
    """All figures; every move is a row."""
    common = {**make_data(folder), **RECIPE, "precision": precision}
    tolerance = TOLERANCE if precision == "fp32" else math.inf

    def start(layout: Layout, jobs: list[Job]) -> None:
        errors = run_distributed(layout.processes, train_jobs, (jobs,), init=False, timeout=900)
        assert not any(error for rank in errors for error in rank), errors

    def job(layout: Layout, run: Path, **how) -> Job:
        return Job({**common, **layout.overrides(), "run_dir": run}, **how)

    single = Layout(engine="torch")
    start(single, [job(single, folder / "unbroken")])
    wanted = read_losses(folder / "unbroken")
    whole = folder / "unbroken" / "checkpoints"
    exports = {}
    for layout in layouts:
        run = folder / layout.name
        start(layout, [job(layout, run, stop_after=SAVED), job(layout, folder / f"{layout.name}-unbroken")])
        exports[layout.name] = exported(latest(run), folder / f"{layout.name}-export")
        print(f"{layout.name}: saved at step {SAVED}", flush=True)

    moves, failed = [], []
    for target in layouts:
        sources = {source.name: folder / f"{source.name}-to-{target.name}" for source in layouts}
        for source, run in sources.items():
            branch(folder / source, CHECKPOINT, run)
        start(target, [job(target, run, save_first=True) for run in sources.values()])
        for source, run in sources.items():
            row = {
                "from": source,
                "to": target.name,
                "loss_difference": largest_relative(read_losses(run), wanted),
                "tensors_that_differ_after_the_move": differing(
                    run / "checkpoints" / CHECKPOINT, folder / source / "checkpoints" / CHECKPOINT
                ),
                "moment_distance_at_the_end": {
                    kind: distance(latest(run), whole / f"step_{STEPS:08d}", kind) for kind in MOMENTS
                },
            }
            again = exported(run / "checkpoints" / CHECKPOINT, run / "export")
            row["export_equal"] = again.keys() == exports[source].keys() and all(
                torch.equal(tensor, exports[source][name]) for name, tensor in again.items()
            )
            if source == target.name:
                own = read_losses(folder / f"{source}-unbroken")
                row["every_digit_of_its_own_unbroken_run"] = read_losses(run) == own
            good = (
                row["loss_difference"] <= tolerance
                and not row["tensors_that_differ_after_the_move"]
                and row["export_equal"]
                and row.get("every_digit_of_its_own_unbroken_run", True)
            )
            moves.append(row)
            if not good:
                failed.append(f"{source} -> {target.name}")
            verdict = "good" if good else "FAILED"
            print(f"{precision} {source} -> {target.name}: losses {row['loss_difference']:.1e}, {verdict}", flush=True)
    at_save = {
        name: {
            kind: distance(folder / name / "checkpoints" / CHECKPOINT, whole / CHECKPOINT, kind)
            for kind in ("master", *MOMENTS)
        }
        for name in exports
    }
    shape = load_recipe(DEBUG_RECIPE, [f"{k}={v}" for k, v in common.items()], cross_checks=False).model.model_dump()
    return {
        "model": shape,
        "steps": {"saved": SAVED, "all": STEPS},
        "largest_loss_difference": max(row["loss_difference"] for row in moves),
        "distance_from_the_single_process_when_saved": at_save,
        "moves": moves,
        "failed": failed,
    }


if __name__ == "__main__":
    sys.exit(main())
