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
from pathlib import Path

from vilg.config import Recipe, load_recipe, take_overrides
from vilg.errors import UserError
from vilg.tools.batch import partitions, render, sbatch, script_template, test_only
from vilg.tools.plan.command import gpu_arguments
from vilg.tools.plan.command import main as plan
from vilg.tools.plan.hardware import DEFAULT_GPU
from vilg.tools.submit_options import Nodes, read_options
from vilg.train.changes import check_accept
from vilg.train.requests import refuse_stopped
from vilg.train.rundir import DONE_FILE, LOGS, check_run_dir

TEMPLATE = "train.sbatch"
# What train.sbatch remembers there: starts without a new checkpoint, and that the ranks have found a mistake.
REMEMBERED = ("fruitless_starts", "mistake")


def main(argv: Sequence[str]) -> int:
    """The command `vilg submit`."""
    arguments, extra = _split(argv)
    overrides, rest = take_overrides(arguments)
    options, nodes = read_options(rest)
    accept = tuple(filter(None, options.accept.split(",")))
    recipe = _load(options.recipe, overrides, nodes)
    check_accept(accept, recipe)
    passed = [str(options.recipe), *(f"--{o.removeprefix('--')}" for o in overrides)]
    passed += [f"--accept={options.accept}"] if accept else []
    script = _script(recipe, nodes, options, passed)
    planned = plan_text(options, overrides, nodes)
    if options.dry_run:
        print(script + "\n" + "\n".join(f"# {line}".rstrip() for line in planned.splitlines()))
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
    print(planned)
    for note in [*notes, test_only(script, extra)]:
        print(f"note: {note}")
    logs = recipe.run_dir / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    for name in REMEMBERED:  # somebody has looked at what was wrong
        (logs / name).unlink(missing_ok=True)
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
    said = io.StringIO()
    gpu = [*gpu_arguments(options), "--node", str(options.gpus_per_node)]
    with contextlib.redirect_stdout(said):
        if not options.gpu:
            print(f"note: planned for {DEFAULT_GPU}, as no --gpu names the cluster's (vilg plan --help lists them)")
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


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments before and behind `--`: the latter are sbatch's."""
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]
