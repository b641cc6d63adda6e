"""`vilg inspect`: what a run or a checkpoint holds, and whether it is whole; needs no GPU and no DeepSpeed."""

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from vilg.checkpoint.load import all_checkpoints, find_checkpoint, latest_checkpoint
from vilg.checkpoint.probes import PROBE_FILE
from vilg.checkpoint.reader import open_weights
from vilg.checkpoint.state import STATE_FILE, RunState, read_state
from vilg.errors import UserError

INCOMPLETE = 1


def main(argv: Sequence[str]) -> int:
    """The command `vilg inspect`: exit code 0 if everything looked at is whole, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="vilg inspect", description="What a run or a checkpoint holds; checks that it is whole."
    )
    parser.add_argument("path", type=Path, help="a run folder, or one checkpoints/step_*")
    parser.add_argument("--parameters", action="store_true", help="list every parameter with its shape")
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines")
    options = parser.parse_args(argv)
    if not options.path.is_dir():
        raise UserError(f"{options.path}: no such folder; name a run or one of its checkpoints/step_*")
    is_run = not (options.path / STATE_FILE).is_file()
    report = _run_report(options.path) if is_run else {}
    try:
        report |= _checkpoint_report(find_checkpoint(options.path))
    except UserError as error:
        report |= {"whole": False, "problem": str(error)}
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(_lines(report, options.parameters)))
    return 0 if report["whole"] and all(report.get("checkpoints", {}).values()) else INCOMPLETE


def _run_report(run: Path) -> dict:
    """Checkpoints of a run, name -> whether whole, and the latest."""
    whole = {}
    for path in all_checkpoints(run):
        try:
            read_state(path)
            whole[path.name] = True
        except UserError:
            whole[path.name] = False
    latest = latest_checkpoint(run)
    return {
        "run": str(run),
        "checkpoints": whole,
        "latest": latest.name if latest else None,
        "finished": (run / "DONE").exists(),
    }


def _checkpoint_report(checkpoint: Path) -> dict:
    weights = open_weights(checkpoint)
    state: RunState = weights.state
    shapes = dict(weights.sizes())
    probes = checkpoint / PROBE_FILE
    return {
        "checkpoint": str(checkpoint),
        "whole": True,
        "step": state.step,
        "of_steps": state.recipe["schedule"]["steps"],
        "samples": state.samples,
        "tokens": state.tokens,
        "skipped": state.skipped,
        "layout": state.layout,
        "recipe_hash": state.recipe_hash,
        "tokenizers": state.tokenizers,
        "versions": state.versions,
        "probes_sha256": hashlib.sha256(probes.read_bytes()).hexdigest() if probes.exists() else None,
        "num_parameters": sum(math.prod(shape) for shape in shapes.values()),
        "parameters": {name: list(shape) for name, shape in shapes.items()},
        "files": state.files,
    }


def _lines(report: dict, parameters: bool) -> list[str]:
    lines = []
    if "run" in report:
        lines.append(
            f"run {report['run']}: {'finished' if report['finished'] else 'not finished'}, LATEST {report['latest']}"
        )
        lines += [f"  {name}  {'whole' if whole else 'NOT WHOLE'}" for name, whole in report["checkpoints"].items()]
    if not report["whole"]:
        return [*lines, f"not whole: {report['problem']}"]
    lines += [
        f"checkpoint {report['checkpoint']}: whole",
        f"  step {report['step']} of {report['of_steps']}, {report['samples']:,} pairs, {report['tokens']:,} tokens, "
        f"{report['skipped']['total']} steps skipped",
        "  layout: " + ", ".join(f"{key}={value}" for key, value in report["layout"].items()),
        "  versions: " + ", ".join(f"{key} {value}" for key, value in report["versions"].items()),
        f"  recipe {report['recipe_hash'][:12]}, text tokenizer {report['tokenizers']['text'][:12]}, "
        f"image tokenizer {report['tokenizers']['image'][:12]}, probes {str(report['probes_sha256'])[:12]}",
        f"  {report['num_parameters']:,} parameters in {len(report['parameters'])} tensors",
    ]
    if parameters:
        width = max(map(len, report["parameters"]))
        lines += [
            f"    {name:<{width}}  {'x'.join(map(str, shape)):>14}  {math.prod(shape) * 4 / 1e6:10.3f} MB in fp32"
            for name, shape in report["parameters"].items()
        ]
    size = sum(report["files"].values())
    lines.append(f"  {len(report['files'])} files, {size / 1e6:.1f} MB")
    return lines + [f"    {name}  {count / 1e6:.2f} MB" for name, count in report["files"].items()]
