"""`vilg preflight RECIPE`: what would stop or slow a long run, found before it starts: in seconds, or in a minute
where kernels are compiled for the first time.

Runs alone or on all ranks under torchrun or srun; rank 0 prints one table. Exit code 0 if nothing is bad, 1 otherwise, and
75 without a verdict (`passed` is null in the JSON file) if another start may find all that is bad mended, unless bad nodes
are to be left out. A node that is slower than its peers is named (peers.py); with --exclude-bad it counts as bad. A crash has
exit code 1 as well, and leaves no JSON file.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from vilg.config import load_recipe, take_overrides
from vilg.data.manifest import write_json
from vilg.errors import TRY_AGAIN
from vilg.parallel.ranks import Ranks
from vilg.tokens.files import write_atomically
from vilg.tools.findings import Report, Row
from vilg.tools.kernel_check import check_kernels
from vilg.tools.machines import check_machines
from vilg.tools.storage import check_storage
from vilg.train.distributed import distributed, one_voice

BAD = 1


def main(argv: Sequence[str]) -> int:
    """The command `vilg preflight`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    overrides, rest = take_overrides(argv)
    options = _parser().parse_args(rest)
    with distributed(device) as ranks, one_voice(ranks):
        report = examine(options.recipe, overrides, ranks, device, accept=options.accept)
        passed = verdict(report, exclude_bad=options.exclude_bad)
        if ranks.is_main:
            _print(report, options, passed=passed)
    return {True: 0, False: BAD, None: TRY_AGAIN}[passed]


def verdict(report: Report, *, exclude_bad: bool) -> bool | None:
    """Whether the run may start; None: not now. exclude_bad: slow nodes are bad, and bad ones can be left out."""
    statuses = {"bad", "slow"} if exclude_bad else {"bad"}
    bad = [row for row in report.rows if row.status in statuses]
    if bad and all(row.again for row in bad) and not (exclude_bad and report.bad_nodes):
        return None
    return not bad


def examine(
    path: Path, overrides: Sequence[str], ranks: Ranks, device: torch.device, *, accept: str = ""
) -> Report:
    """Check everything; the same report on every rank. Raises SharedError if the recipe itself cannot be read."""
    accepted = tuple(filter(None, accept.split(",")))
    recipe = ranks.on_main(lambda: load_recipe(path, overrides, world_size=ranks.world_size))
    report = Report.begin(ranks)
    report.rows.append(Row("recipe", "ok", f"{path}: {recipe.name}, {ranks.world_size} process(es)"))
    check_storage(report, recipe, ranks, accepted)
    check_machines(report, ranks, device)
    check_kernels(report, recipe, ranks, device)
    return report


def _print(report: Report, options: argparse.Namespace, *, passed: bool | None) -> None:
    width = max(len(row.check) for row in report.rows)
    for row in report.rows:  # line by line: srun would break a long text anywhere
        print(f"{row.status:<6}  {row.check:<{width}}  {row.detail}", flush=True)
    if report.bad_nodes:
        print(f"nodes to run without: {', '.join(report.bad_nodes)}")
    if options.json:
        write_json(options.json, {"passed": passed, **asdict(report)})
    if options.bad_nodes and report.bad_nodes:
        write_atomically(options.bad_nodes, "".join(f"{node}\n" for node in report.bad_nodes).encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilg preflight",
        description="Check recipe, machines and data before a long run. Alone, or on all ranks under torchrun or srun.",
        epilog="exit code 0: nothing is bad; 1: something is; 75: something is that may be over soon; 2: the recipe is wrong",
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and every rank's figures there too")
    parser.add_argument("--bad-nodes", type=Path, metavar="FILE", help="write the bad and slow nodes there, if any")
    parser.add_argument("--exclude-bad", action="store_true", help="a slow node counts as bad in the exit code too")
    parser.add_argument("--accept", default="", metavar="KEY,KEY", help="as for vilg train")
    return parser
