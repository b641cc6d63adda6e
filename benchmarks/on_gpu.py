"""Everything that needs a GPU, in the order of its worth, within a time limit: for whoever has one for a quarter of an hour.

    python benchmarks/on_gpu.py --minutes 14 --out found          # then look at found/summary.json
    python benchmarks/on_gpu.py --only train_step attention_96    # some of it
    python benchmarks/on_gpu.py --tiny --out /tmp/tried           # tries the script on a CPU; its figures say nothing

Correctness first: `pytest -m gpu`. Each job has its own process, log (`NAME.log`) and result (`NAME.json`) in the folder. A job
for which not half of its time is left is left out, one that takes longer than its limit is ended; both are said, and those
after them still run. Move a result to benchmarks/results/ under the name that its script gives there. Exit code 1 if a job
failed or was ended.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = (  # all that has the mark
    "tests/kernels/test_gpu.py tests/kernels/test_head_norm.py tests/unit/test_preflight_kernels.py "
    "tests/unit/test_drawing.py tests/unit/test_serve.py"
)
TINY_ATTENTION = "--device cpu --grids 8x8 --heads 1 --text-slots 8 --repeats 2"


@dataclass(frozen=True)
class Job:
    """command: arguments of Python; {out}: the folder. tiny: the same for a CPU. minutes: its limit."""

    name: str
    minutes: float
    command: str
    tiny: str


def attention(name: str, minutes: float, options: str) -> Job:
    script = f"benchmarks/attention.py --json {{out}}/{name}.json"
    return Job(name, minutes, f"{script} {options}", f"{script} {TINY_ATTENTION}")


def train_step(name: str, minutes: float, options: str) -> Job:
    script = f"benchmarks/train_step.py --json {{out}}/{name}.json"
    return Job(name, minutes, f"{script} {options}", f"{script} --tiny --device cpu --steps 1 --peer-steps 1 --micro 1 --accumulate 1")


JOBS = (
    Job("gpu_tests", 4, f"-m pytest -m gpu -q --continue-on-collection-errors {GPU_TESTS}", f"-m pytest -m gpu -q {GPU_TESTS}"),
    Job("head_norm", 2, "benchmarks/head_norm.py --json {out}/head_norm.json",
        "benchmarks/head_norm.py --device cpu --batch 1 --heads 2 --repeats 2 --json {out}/head_norm.json"),
    train_step("train_step", 5, "--steps 50 --profile"),
    train_step("train_step_compiled", 4, "--layers 10 --steps 15 --peer-steps 8 --compile"),
    train_step("train_step_64", 4, "--steps 10 --peer-steps 6 --grid 64 64 --micro 1"),
    attention("attention_32", 3, "--grids 32x32 --flex none --repeats 12"),
    attention("attention_64", 3, "--grids 64x64 --patterns row,column,conv --flex none --repeats 6"),
    Job("attention_settings", 6, "benchmarks/attention_settings.py --patterns row,conv --json {out}/attention_settings.json",
        "benchmarks/attention_settings.py --device cpu --patterns row --kernels text_key_gradient --json {out}/attention_settings.json"),
    Job("attention_stationary", 4, "benchmarks/attention_stationary.py --json {out}/attention_stationary.json",
        "benchmarks/attention_stationary.py --device cpu --grids 32x32 --tiles 8 --stages 2 --warps 4 --json {out}/attention_stationary.json"),
    attention("attention_96", 3, "--grids 96x96 --flex none --directions text_to_image --repeats 4"),
    attention("attention_short", 2, "--grids 32x32 --text-len 20 --flex none --repeats 8"),
    attention("attention_wrap", 2, "--grids 32x32,64x64 --patterns row_wrap --repeats 6"),
    attention("attention_flex_64", 4, "--grids 64x64 --directions text_to_image --repeats 4"),
    Job("end_to_end_step", 4, "benchmarks/end_to_end_step.py --steps 100 --json {out}/end_to_end_step.json",
        "benchmarks/end_to_end_step.py --tiny --device cpu --steps 2 --json {out}/end_to_end_step.json"),
    Job("decode", 8, "benchmarks/decode.py --device cuda --json {out}/decode.json",
        "benchmarks/decode.py --quick --json {out}/decode.json"),
)  # fmt: skip


def run(job: Job, out: Path, seconds: float, *, tiny: bool) -> dict:
    """Outcome of a job: ok, failed with its exit code, or ended at its limit."""
    command = (job.tiny if tiny else job.command).format(out=shlex.quote(str(out)))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    started = time.monotonic()
    with open(out / f"{job.name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            passed, outcome = code == 0, "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            passed, outcome = False, f"ended after its {seconds / 60:.1f} min"
        finally:
            if process.poll() is None:  # also where this script is interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {"passed": passed, "outcome": outcome, "seconds": round(time.monotonic() - started, 1), "command": f"python {command}"}


def main() -> int:
    """Run what the command line and the clock allow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu"), help="folder for logs and results")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for everything; default: no limit")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], help="these jobs, in their order")
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU")
    args = parser.parse_args()
    out, started, summary = args.out.resolve(), time.monotonic(), {}
    out.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in JOBS if not args.only or job.name in args.only]
    for number, job in enumerate(jobs, 1):
        left = 60 * args.minutes - (time.monotonic() - started)
        if left < 30 * job.minutes:  # half of what it may take
            summary[job.name] = {"passed": None, "outcome": f"left out: {left / 60:.1f} min left, it may take {job.minutes:g}"}
        else:
            print(f"[{number}/{len(jobs)}] {job.name}: at most {min(left / 60, job.minutes):.1f} min ...", flush=True)
            summary[job.name] = run(job, out, min(left, 60 * job.minutes), tiny=args.tiny)
        took = summary[job.name].get("seconds")
        print(f"{job.name}: {summary[job.name]['outcome']}" + (f" in {took:.0f} s" if took else ""), flush=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return int(any(found["passed"] is False for found in summary.values()))


if __name__ == "__main__":
    sys.exit(main())
