"""Claim: kill -9 of the whole job at any moment, also during a save, costs only the steps since the last checkpoint.

    python benchmarks/kill_resume.py                # 30 kills, a few minutes on two cores

Two ranks (ZeRO 1, fp32, a tiny model) save every third step, in the background and, in a second series, while training
stands still. Every start is killed outright, both ranks at once: in turn at a random moment after its start, after a
random step, and as soon as a save is seen on the disk. The last start is left to finish. Checked: every loss of the run
that was put together so equals that of the unbroken run in every digit, and so does every tensor of the last
checkpoint. Writes benchmarks/results/kill_resume.json; exits with 1 if anything differs.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

from tests.distributed.helpers import free_port, rank_environment
from tests.distributed.resume_support import differing, latest
from tests.golden.make import DEBUG_RECIPE, make_data, read_losses
from vilg.checkpoint.state import source_commit, versions

RESULT = Path(__file__).parent / "results" / "kill_resume.json"
RANKS = 2
RECIPE = {
    "schedule.steps": 240,
    "schedule.warmup_steps": 5,
    "checkpoint.every_steps": 3,
    "logging.every_steps": 1,
    "logging.tensorboard": "false",
    "model.num_layers": 3,
    "model.hidden_size": 32,
}
KINDS = ("time", "step", "save")
LONGEST_WAIT = 120.0  # seconds for a start to reach its moment


def rank_main(rank: int, port: int, arguments: list[str], output: str) -> None:
    """One rank of `vilg train`, its console in a file."""
    os.environ.update(rank_environment(rank, RANKS, port))
    console = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(console, 1)
    os.dup2(console, 2)
    from vilg.__main__ import main

    sys.exit(main(["train", *arguments]))


def start(overrides: dict[str, object]) -> list:
    """The rank processes of a start, forked from a server that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "vilg.train.loop"])
    arguments = [str(DEBUG_RECIPE), *(f"--{key}={value}" for key, value in overrides.items())]
    port, output = free_port(), f"{overrides['run_dir']}.console"
    ranks = [context.Process(target=rank_main, args=(rank, port, arguments, output)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    return ranks


def finish(ranks: list, overrides: dict[str, object]) -> None:
    """Wait for a start that nobody kills."""
    for process in ranks:
        process.join(600)
        assert process.exitcode == 0, Path(f"{overrides['run_dir']}.console").read_text()[-3000:]


def last_step(run: Path) -> int:
    """The last step in the metrics."""
    try:
        lines = (run / "logs" / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, json.JSONDecodeError):  # not there yet, or a line that is being written
        return 0


def saving(run: Path) -> bool:
    """Whether a save is on its way: its hidden folder is there."""
    return any((run / "checkpoints").glob(".step_*"))


def wait_for_moment(kind: str, run: Path, ranks: list, draw: random.Random) -> None:
    """Return at a random moment of the kind; at once if the run has ended."""
    began, first = time.monotonic(), last_step(run)
    steps, delay = draw.randint(1, 6), draw.uniform(0.0, 6.0)
    while all(process.is_alive() for process in ranks) and time.monotonic() < began + LONGEST_WAIT:
        passed = time.monotonic() - began
        if kind == "time" and passed > delay:
            return
        if kind != "time" and last_step(run) >= first + steps and (kind == "step" or saving(run)):
            time.sleep(draw.uniform(0.0, 0.05) if kind == "step" else draw.uniform(0.0, 0.005))
            return
        time.sleep(0.001)


def series(folder: Path, common: dict, unbroken: Path, kills: int, *, asynchronous: bool, draw: random.Random) -> dict:
    """Kill and continue until the run is done; what was seen."""
    run = folder / f"killed-{'asynchronous' if asynchronous else 'synchronous'}"
    overrides = {**common, "run_dir": run, "checkpoint.asynchronous": str(asynchronous).lower()}
    moments = []
    while len(moments) < kills and not (run / "DONE").exists():
        kind = KINDS[len(moments) % len(KINDS)]
        ranks = start(overrides)
        wait_for_moment(kind, run, ranks, draw)
        for process in ranks:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.join()
        if all(process.exitcode == 0 for process in ranks):
            break  # it was finished before its moment came
        moments.append({"kind": kind, "after_step": last_step(run), "during_a_save": saving(run)})
        print(f"{run.name}: kill {len(moments)}: {moments[-1]}", flush=True)
    finish(start(overrides), overrides)
    different = differing(latest(run), latest(unbroken))
    return {
        "kills": len(moments),
        "during_a_save": sum(moment["during_a_save"] for moment in moments),
        "losses_equal": read_losses(run) == read_losses(unbroken),
        "tensors_that_differ": different,
        "moments": moments,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="in all, two thirds of them with background saves")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw, started = random.Random(options.seed), time.time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        common = {**make_data(folder), **RECIPE}
        unbroken = {**common, "run_dir": folder / "unbroken"}
        finish(start(unbroken), unbroken)
        background = round(options.kills * 2 / 3)
        found = {
            name: series(folder, common, folder / "unbroken", count, asynchronous=name == "asynchronous", draw=draw)
            for name, count in (("asynchronous", background), ("synchronous", options.kills - background))
        }
    good = all(part["losses_equal"] and not part["tensors_that_differ"] for part in found.values())
    content = {
        "format_version": 1,
        "claim": "kill -9 of the whole job at random moments, then continued: the unbroken run's losses in every digit",
        "command": "python benchmarks/kill_resume.py",
        "commit": source_commit(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": None},
        "versions": versions(),
        "seconds": round(time.time() - started, 1),
        "recipe": {key: value for key, value in RECIPE.items()},
        "good": good,
        **found,
    }
    kills = sum(part["kills"] for part in found.values())
    during = sum(part["during_a_save"] for part in found.values())
    print(f"{kills} kills, {during} during a save: {'good' if good else 'FAILED'}")
    if kills >= 30:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
