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
from vilg.checkpoint.reconstructor_file import TOKENIZER, entries, read_reconstructor_file
from vilg.checkpoint.state import STATE_FILE, RunState, is_whole
from vilg.checkpoint.verify import verify_files
from vilg.errors import UserError

INCOMPLETE = 1


def main(argv: Sequence[str]) -> int:
    """The command `vilg inspect`: exit code 0 if everything looked at is whole, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="vilg inspect", description="What a run or a checkpoint holds; checks that it is whole."
    )
    parser.add_argument("path", type=Path, help="a run folder, or one checkpoints/step_*")
    parser.add_argument("--parameters", action="store_true", help="list every parameter: shape, bytes, how it is split")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare the checksums")
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines")
    options = parser.parse_args(argv)
    if not options.path.is_dir():
        raise UserError(f"{options.path}: no such folder; name a run or one of its checkpoints/step_*")
    is_run = not (options.path / STATE_FILE).is_file()
    report = _run_report(options.path) if is_run else {}
    checkpoint = None
    try:
        checkpoint = find_checkpoint(options.path)
        report |= _checkpoint_report(checkpoint, verify=options.verify)
    except UserError as error:
        report |= {"whole": False, "problem": str(error)}
        if is_run and checkpoint:
            report["checkpoints"][checkpoint.name] = False  # its files looked right until they were read
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(_lines(report, options.parameters)))
    return 0 if report["whole"] and all(report.get("checkpoints", {}).values()) else INCOMPLETE


def _run_report(run: Path) -> dict:
    """Checkpoints of a run, name -> whether whole, and the latest."""
    whole = {path.name: is_whole(path) for path in all_checkpoints(run)}
    latest = latest_checkpoint(run)
    return {
        "run": str(run),
        "checkpoints": whole,
        "latest": latest.name if latest else None,
        "finished": (run / "DONE").exists(),
    }


def _checkpoint_report(checkpoint: Path, *, verify: bool) -> dict:
    weights = open_weights(checkpoint)
    state: RunState = weights.state
    weights.read(weights.names[0], kind="master")  # the files are what their names say
    if verify:
        verify_files(checkpoint, state, rank=0, world_size=1)
    probes = checkpoint / PROBE_FILE
    return {
        "checkpoint": str(checkpoint),
        "whole": True,
        "verified": verify,
        "step": state.step,
        "of_steps": state.recipe["schedule"]["steps"],
        "samples": state.samples,
        "tokens": state.tokens,
        "skipped": state.skipped,
        "layout": state.layout,
        "recipe_hash": state.recipe_hash,
        "tokenizers": state.tokenizers,
        "versions": state.versions,
        "commit": state.commit,
        "optimizer_steps": weights.optimizer_steps,
        "probes_sha256": hashlib.sha256(probes.read_bytes()).hexdigest() if probes.exists() else None,
        "num_parameters": sum(math.prod(shape) for _, shape in weights.sizes()),
        "bytes_per_number": weights.dtype.itemsize,
        "parameters": {name: state.parameters[name] for name in weights.names},
        "reconstructor": _reconstructor(checkpoint, state),
        "files": state.files,
        "checksums": state.checksums,
    }


def _reconstructor(checkpoint: Path, state: RunState) -> dict | None:
    """What end-to-end training keeps beside the model; None without it."""
    if state.recipe["model"].get("reconstructor") is None:
        return None
    tensors = read_reconstructor_file(checkpoint)
    sizes = {owner: entries(tensors, owner, "weight") for owner in ("reconstructor", "discriminator", TOKENIZER)}
    return {
        **{owner: sum(tensor.numel() for tensor in found.values()) for owner, found in sizes.items()},
        "moving_average": bool(entries(tensors, "reconstructor", "ema")),
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
        f"checkpoint {report['checkpoint']}: whole "
        f"({'every byte checked' if report['verified'] else 'names and sizes'})",
        f"  step {report['step']} of {report['of_steps']}, {report['samples']:,} pairs, {report['tokens']:,} tokens, "
        f"{report['skipped']['total']} steps skipped",
        "  layout: " + ", ".join(f"{key}={value}" for key, value in report["layout"].items()),
        "  versions: " + ", ".join(f"{key} {value}" for key, value in report["versions"].items())
        + f", commit {report['commit'][:12] or 'unknown'}",
        f"  recipe {report['recipe_hash'][:12]}, text tokenizer {report['tokenizers']['text'][:12]}, "
        f"image tokenizer {report['tokenizers']['image'][:12]}, probes {str(report['probes_sha256'])[:12]}",
        f"  {report['num_parameters']:,} parameters in {len(report['parameters'])} tensors",
    ]
    if found := report["reconstructor"]:
        average = "with" if found["moving_average"] else "without"
        lines.append(
            f"  reconstructor: {found['reconstructor']:,} parameters ({average} a moving average), "
            f"discriminator {found['discriminator']:,}"
            + (f", image tokenizer trained too, {found[TOKENIZER]:,}" if found[TOKENIZER] else "")
        )
    if parameters:
        lines += _table(report["parameters"], report["bytes_per_number"])
    size = sum(report["files"].values())
    lines.append(f"  {len(report['files'])} files, {size / 1e6:.1f} MB")
    return lines + [f"    {name}  {count / 1e6:.2f} MB" for name, count in report["files"].items()]


def _table(parameters: dict[str, dict], width: int) -> list[str]:
    """A line per parameter. width: bytes of a number in the precision that the run computes with."""
    longest = max(map(len, parameters))
    lines = [f"    {'parameter':<{longest}}  {'shape':>14}  {'bytes':>14}  split over tensor ranks, pipeline stage"]
    for name, entry in parameters.items():
        shape, size = "x".join(map(str, entry["shape"])), math.prod(entry["shape"]) * width
        split = "whole on each" if entry["split"] is None else f"along dimension {entry['split']}"
        lines.append(f"    {name:<{longest}}  {shape:>14}  {size:>14,}  {split}, stage {entry['stage']}")
    return lines
