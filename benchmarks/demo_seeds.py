"""Claim: what the demo reaches, over seeds. Mean and spread of finished demo runs.

    .venv/bin/vilg demo --seed 0 --out runs/demo-0          # and so on for each seed
    .venv/bin/python benchmarks/demo_seeds.py runs/demo-0 runs/demo-1 runs/demo-2

Reads each folder's report.json (written by `vilg demo`, which measures on all held-out combinations and on as many seen
ones as its report says), prints a table, and writes benchmarks/results/demo_seeds.json. Spread is the sample standard
deviation over seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from vilg.errors import UserError

RESULT = Path(__file__).parent / "results" / "demo_seeds.json"
FIGURES = (
    "caption_exact",
    "image_glyph_recall",
    "image_glyph_recall_best_of_n",
    "image_background_accuracy",
    "image_background_accuracy_best_of_n",
    "nll_right",
    "nll_wrong_caption",
)


def summary(reports: list[dict]) -> dict[str, dict[str, float | list[float]]]:
    """Mean, spread and the single values of every figure; keys are `split.language.figure` and the run's own figures."""
    values = {
        f"{split}.{language}.{figure}": [report[split][language][figure] for report in reports]
        for split in ("seen", "held_out")
        for language in ("zh", "en")
        for figure in FIGURES
    }
    for split in ("seen", "held_out"):
        for what in ("real", "reconstruction"):
            values[f"{split}.{what}.glyph_recall"] = [report[split][what]["glyph_recall"] for report in reports]
    values["vq.psnr_db"] = [report["vq"]["psnr_db"] for report in reports]
    values["peak_memory_gb"] = [report["peak_memory_gb"] for report in reports]
    return {
        key: {
            "mean": round(statistics.mean(found), 4),
            "spread": round(statistics.stdev(found), 4) if len(found) > 1 else 0.0,
            "values": found,
        }
        for key, found in values.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished demo runs")
    runs = parser.parse_args().runs
    try:
        reports = [json.loads((run / "report.json").read_text()) for run in runs]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; name folders of finished demo runs") from None
    scales = {(report["scale"], json.dumps(report["sampling"], sort_keys=True)) for report in reports}
    if len(scales) > 1 or len({report["seed"] for report in reports}) < len(reports):
        raise UserError("the runs must be of one scale and sampling, and of different seeds")
    found = summary(reports)
    for key, value in found.items():
        print(f"{key:48} {value['mean']:9.3f} ± {value['spread']:.3f}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULT.parent.parent)
    content = {
        "format_version": 1,
        "claim": "figures of `vilg demo` over seeds",
        "command": "python benchmarks/demo_seeds.py RUN...",
        "commit": commit.stdout.strip() or "unknown",
        "seeds": [report["seed"] for report in reports],
        "scale": reports[0]["scale"],
        "sampling": reports[0]["sampling"],
        "machine": reports[0]["machine"],
        "figures": found,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
