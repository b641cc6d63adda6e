"""`vilg submit RECIPE --nodes N`: check what can be wrong, fill in launch/train.sbatch, and hand it to SLURM.

What fails here fails in seconds instead of after hours in the queue: the recipe on this number of processes, its memory
on these GPUs, the run folder, and what SLURM itself says about partition, nodes and time.
"""

import argparse
import contextlib
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vilg.config import Recipe, load_recipe, take_overrides
from vilg.errors import UserError
from vilg.tools.batch import partitions, render, sbatch, script_template, test_only
from vilg.train.changes import check_accept
from vilg.train.requests import refuse_stopped
from vilg.train.rundir import DONE_FILE, LOGS, check_run_dir

TEMPLATE = "train.sbatch"
FRUITLESS_FILE = "fruitless_starts"  # train.sbatch counts starts without a new checkpoint there
_NODES = re.compile(r"(\d+)(?:-(\d+))?")


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


def main(argv: Sequence[str]) -> int:
    """The command `vilg submit`."""
    arguments, extra = _split(argv)
    overrides, rest = take_overrides(arguments)
    options = _parser().parse_args(rest)
    if options.chain < 1:
        raise UserError(f"--chain {options.chain} is no number of jobs; use 1 or more")
    nodes = _nodes(options)
    accept = tuple(filter(None, options.accept.split(",")))
    recipe = _load(options.recipe, overrides, nodes)
    check_accept(accept, recipe)
    passed = [str(options.recipe), *(f"--{o.removeprefix('--')}" for o in overrides)]
    passed += [f"--accept={options.accept}"] if accept else []
    script = _script(recipe, nodes, options, passed)
    plan = plan_text(options, overrides, nodes)
    if options.dry_run:
        print(script + "\n" + "\n".join(f"# {line}".rstrip() for line in plan.splitlines()))
        return 0
    if (recipe.run_dir / DONE_FILE).exists():
        print(f"{recipe.run_dir} is finished: nothing to submit")
        return 0
    refuse_stopped(recipe.run_dir)
    notes = check_run_dir(recipe, accept)
    if options.partition and options.partition not in (known := partitions()):
        raise UserError(
            f"--partition {options.partition}: there is no such partition; this cluster has {', '.join(known)}"
        )
    print(plan)
    for note in [*notes, test_only(script, extra)]:
        print(f"note: {note}")
    logs = recipe.run_dir / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    (logs / FRUITLESS_FILE).unlink(missing_ok=True)  # somebody has looked at what was wrong
    (logs / "submitted.sbatch").write_text(script, encoding="utf-8")
    for number in range(options.chain):
        job = sbatch(script, extra)
        place = f" ({number + 1} of a chain of {options.chain})" if options.chain > 1 else ""
        print(f"submitted job {job}{place}; its log: {logs}/slurm-{job}.out")
    return 0


def plan_text(options: argparse.Namespace, overrides: Sequence[str], nodes: Nodes) -> str:
    """What `vilg plan` says of the recipe on the fewest and the most GPUs. Raises UserError if it does not fit."""
    if not options.gpus_per_node:
        return "no GPUs asked for, so there is no plan of memory and time"
    from vilg.tools.plan import main as plan

    said = io.StringIO()
    gpu = ["--gpu", options.gpu] if options.gpu else []
    with contextlib.redirect_stdout(said):
        for gpus in sorted({nodes.world_sizes[0], nodes.world_sizes[-1]}):
            plan([str(options.recipe), "--gpus", str(gpus), *gpu, *overrides])
            print()
    return said.getvalue().rstrip()


def job_name(recipe: Recipe) -> str:
    """Jobs of one run folder share a name that no other folder has: SLURM starts them one after another (singleton)."""
    folder = hashlib.sha256(str(recipe.run_dir.resolve()).encode()).hexdigest()[:8]
    return f"vilg-{re.sub(r'[^A-Za-z0-9_.-]', '_', recipe.name)}-{folder}"


def _script(recipe: Recipe, nodes: Nodes, options: argparse.Namespace, passed: list[str]) -> str:
    log = (recipe.run_dir / LOGS).resolve() / "slurm-%j.out"
    # A number of tasks that SLURM has worked out for the most nodes would stay with the job, which could then never start
    # again on fewer: with a range the script alone knows it, and CPUs are asked for instead.
    is_range = nodes.least < nodes.most
    cpus = nodes.tasks * (options.cpus_per_task or 1)
    tasks = {"mincpus": str(cpus)} if is_range else {"ntasks-per-node": str(nodes.tasks)}
    directives: dict[str, str | None] = {
        "job-name": job_name(recipe),
        "dependency": "singleton",
        "nodes": str(nodes),
        **tasks,
        **({"gpus-per-node": str(options.gpus_per_node)} if options.gpus_per_node else {}),
        **({"cpus-per-task": str(options.cpus_per_task)} if options.cpus_per_task else {}),
        **({"time": options.time} if options.time else {}),
        **({"partition": options.partition} if options.partition else {}),
        "output": str(log).replace("%", "%%").replace("%%j", "%j"),
        "open-mode": "append",
        "requeue": None,
        "signal": f"B:USR1@{options.warn_seconds}",
    }
    variables = {"VILG_RUN_DIR": str(recipe.run_dir)}
    variables |= {"VILG_CHAINED": "yes"} if options.chain > 1 else {}
    variables |= {"VILG_TASKS_PER_NODE": str(nodes.tasks)} if is_range else {}
    variables |= {"VILG_EXCLUDE_BAD": "yes"} if options.exclude_bad else {}
    variables |= {"VILG_PREFLIGHT": "no"} if options.no_preflight else {}
    return render(script_template(TEMPLATE), directives, variables, passed)


def _load(path: Path, overrides: Sequence[str], nodes: Nodes) -> Recipe:
    """The recipe, valid for every number of nodes that SLURM may choose."""
    for world_size in nodes.world_sizes:
        try:
            recipe = load_recipe(path, overrides, world_size=world_size)
        except UserError as error:
            if len(nodes.world_sizes) == 1:
                raise
            place = f"on {world_size // nodes.tasks} of --nodes {nodes} ({world_size} processes)"
            raise UserError(f"{place}: {error}") from None
    return recipe


def _nodes(options: argparse.Namespace) -> Nodes:
    found = _NODES.fullmatch(options.nodes)
    least = int(found[1]) if found else 0
    most = int(found[2] or least) if found else 0
    tasks = options.gpus_per_node or options.tasks_per_node
    if not 0 < least <= most:
        raise UserError(f"--nodes {options.nodes}: write a number of nodes, or the least and the most as in 3-4")
    if tasks < 1:
        raise UserError("--gpus-per-node 0 is for clusters without GPUs; say the processes too: --tasks-per-node N")
    return Nodes(least, most, tasks)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments before and behind `--`: the latter are sbatch's."""
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilg submit",
        description="Check a recipe, its run folder and the cluster, and submit launch/train.sbatch for it.",
        epilog="--section.key=value overrides a key of the recipe; what follows -- goes to sbatch: -- --account=x",
    )
    add = parser.add_argument
    add("recipe", type=Path, help="YAML file, for example launch/recipes/debug.yaml")
    add("--nodes", required=True, metavar="N", help="nodes; 3-4: no start with fewer than 3, for a node may be lost")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node, one process each (default 8)")
    add("--tasks-per-node", type=int, default=0, metavar="N", help="processes of a node, with --gpus-per-node 0")
    add("--cpus-per-task", type=int, metavar="N", help="CPU cores of a process (default: the cluster's, often 1)")
    add("--gpu", metavar="NAME", help="kind of GPU, for the plan's memory and time (vilg plan --help lists them)")
    add("--time", metavar="T", help="time limit of one start, as SLURM writes it: 24:00:00, 2-00:00:00")
    add("--partition", metavar="P", help="partition (default: the cluster's)")
    add("--chain", type=int, default=1, metavar="K", help="K jobs in turn instead of one that requeues itself")
    add("--warn-seconds", type=int, default=180, metavar="S", help="seconds before the limit when the run saves (180)")
    add("--exclude-bad", action="store_true", help="start again without nodes that preflight finds bad or slow")
    add("--no-preflight", action="store_true", help="train without checking the machines first")
    add("--accept", default="", metavar="KEY,KEY", help="as for vilg train: keys that may differ from the checkpoint's")
    add("--dry-run", action="store_true", help="print the script and the plan; needs no SLURM and writes nothing")
    return parser
