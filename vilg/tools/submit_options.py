"""The options of `vilg submit`, and mistakes in them that need no cluster to be seen."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vilg.errors import UserError
from vilg.tools.plan.command import gpu_arguments, gpu_options

_NODES = re.compile(r"(\d+)(?:-(\d+))?")
_LONGEST_WARNING = 65535  # seconds; sbatch's --signal takes no more


@dataclass(frozen=True)
class Nodes:
    """least to most nodes, and the processes on each; SLURM chooses anew at every start."""

    least: int
    most: int
    tasks: int

    @property
    def world_sizes(self) -> list[int]:
        return [nodes * self.tasks for nodes in range(self.least, self.most + 1)]

    def __str__(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least}-{self.most}"


def read_options(argv: Sequence[str]) -> tuple[argparse.Namespace, Nodes]:
    """The options of a command line without overrides. Raises UserError for values and combinations that cannot be, with
    what would work."""
    options = _parser().parse_args(argv)
    if options.chain < 1:
        raise UserError(f"--chain {options.chain} is no number of jobs; use 1 or more")
    if not 0 < options.warn_seconds <= _LONGEST_WARNING:
        raise UserError(
            f"--warn-seconds {options.warn_seconds}: use 1 to {_LONGEST_WARNING}, time enough for a step and its checkpoint"
        )
    if options.cpus_per_task is not None and options.cpus_per_task < 1:
        raise UserError(f"--cpus-per-task {options.cpus_per_task}: use 1 or more, or leave it to the cluster")
    if options.exclude_bad and options.no_preflight:
        raise UserError("--exclude-bad leaves out what preflight finds; give it or --no-preflight, not both")
    given = gpu_arguments(options)
    if not options.gpus_per_node and given:
        raise UserError(f"{given[0]} is for the plan of memory and time, and --gpus-per-node 0 has none; leave it out")
    return options, _nodes(options)


def _nodes(options: argparse.Namespace) -> Nodes:
    found = _NODES.fullmatch(options.nodes)
    least = int(found[1]) if found else 0
    most = int(found[2] or least) if found else 0
    gpus, tasks = options.gpus_per_node, options.tasks_per_node
    if not 0 < least <= most:
        raise UserError(f"--nodes {options.nodes}: write a number of nodes, or the least and the most as in 3-4")
    if gpus < 0:
        raise UserError(f"--gpus-per-node {gpus}: use 1 or more, or 0 with --tasks-per-node N on a cluster without GPUs")
    if gpus and tasks is not None:
        raise UserError(
            f"--tasks-per-node {tasks} beside --gpus-per-node {gpus}: with GPUs a node has one process for each; leave it "
            "out, or add --gpus-per-node 0 on a cluster without GPUs"
        )
    if not gpus and (tasks is None or tasks < 1):
        raise UserError(
            "--gpus-per-node 0 is for clusters without GPUs; say the processes too: --tasks-per-node N, 1 or more"
        )
    return Nodes(least, most, gpus or tasks)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilg submit",
        description="Check a recipe, its run folder and the cluster, and submit launch/train.sbatch for it.",
        epilog="--section.key=value overrides a key of the recipe; what follows -- goes to sbatch: -- --account=x",
        parents=[gpu_options()],
        allow_abbrev=False,  # --node is an option of `vilg plan`, and not short for --nodes
    )
    add = parser.add_argument
    add("recipe", type=Path, help="YAML file, for example launch/recipes/debug.yaml")
    add("--nodes", required=True, metavar="N", help="nodes; 3-4: no start with fewer than 3, for a node may be lost")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node, one process each (default 8)")
    add("--tasks-per-node", type=int, metavar="N", help="processes of a node, with --gpus-per-node 0")
    add("--cpus-per-task", type=int, metavar="N", help="CPU cores of a process (default: the cluster's, often 1)")
    add("--time", metavar="T", help="time limit of one start, as SLURM writes it: 24:00:00, 2-00:00:00")
    add("--partition", metavar="P", help="partition (default: the cluster's)")
    add("--chain", type=int, default=1, metavar="K", help="K jobs in turn instead of one that requeues itself")
    add("--warn-seconds", type=int, default=180, metavar="S", help="seconds before the limit when the run saves (180)")
    add("--exclude-bad", action="store_true", help="start again without nodes that preflight finds bad or slow")
    add("--no-preflight", action="store_true", help="train without checking the machines first")
    add("--accept", default="", metavar="KEY,KEY", help="as for vilg train: keys that may differ from the checkpoint's")
    add("--dry-run", action="store_true", help="print the script and the plan; needs no SLURM and writes nothing")
    return parser
