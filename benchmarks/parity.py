"""Claim: every layout trains as one process does.

    python benchmarks/parity.py                                # everything: about half an hour on two cores
    python benchmarks/parity.py --layouts t2p2d1z1 --models sparse --recompute full
    python benchmarks/parity.py --no-extras --steps 5

Layouts are (tensor, pipeline, data, ZeRO), each with sequence parallelism off and on where tensor > 1, with every way of
recomputing activations, for a sparse model (with QK-norm) and a dense one (with RMSNorm, Sandwich-LN, a scaled embedding
gradient, z-loss), both with dropout; then the optimizer in host memory (with every ZeRO layout) and hierarchical
partitioning (`zero_hpz_partition_size`). Micro-batches mix both directions, and some have one only. Model and engine are
built as `vilg train` builds them (tests/distributed/parity.py). Compared with the torch engine in one process, fp32, gloo,
the same initial weights, relative errors:

- loss and gradient norm of each of 20 steps (AdamW, warm-up 5, clipping at norm 1, which is active);
- losses of batches that no step has, without dropout, before the first step and after the last;
- the gathered, clipped gradient of step 1 of every parameter (2-norm), read from the checkpoint that the layout writes;
- the logits after the last step (2-norm), through all stages.

All must be below 1e-5, and losses, norms, evaluated losses and logits the same in every bit on all ranks. Adam's eps is
the recipe's default, 1e-8. Prints a table, writes benchmarks/results/parity.json after a full run, exits with 1 if
anything fails.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

from tests.distributed.parity import MODELS, ON_HOST, WITHIN, Case, Errors, compare, reference, run_cases  # noqa: E402
from tests.distributed.resume_support import Layout  # noqa: E402
from vilg.checkpoint.state import source_commit, versions  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "parity.json"
TOLERANCE, STEPS = 1e-5, 20
CASES_PER_START = 8  # a case makes groups that stay, each with threads of gloo's: after thirty they are in each other's way
LAYOUTS = [
    Layout(*sizes)
    for sizes in (
        (1, 1, 1, 0), (1, 1, 2, 1), (1, 1, 2, 2), (1, 1, 2, 3),
        (2, 1, 1, 0), (2, 1, 2, 1), (2, 1, 2, 3),
        (1, 2, 1, 0), (1, 2, 2, 1),
        (2, 2, 1, 1), (2, 2, 2, 1),
    )
]  # fmt: skip
RECOMPUTE = {"none": ("none", 1), "selective": ("selective", 1), "full": ("full", 1), "every2": ("full", 2)}


@dataclass(frozen=True)
class Row:
    """A case and its errors; failure: why there are none."""

    case: Case
    errors: Errors | None
    failure: str = ""

    @property
    def passed(self) -> bool:
        return self.errors is not None and self.errors.largest < TOLERANCE


def make_cases(layouts: Sequence[Layout], models: Sequence[str], recompute: Sequence[str], extras: bool) -> list[Case]:
    """The product of everything; and once, what DeepSpeed's file may add to ZeRO, with each layout that has it."""
    cases = [
        Case(layout, sequence=sequence, recompute=RECOMPUTE[mode][0], every=RECOMPUTE[mode][1], model=model)
        for layout in layouts
        for sequence in ((False, True) if layout.tensor > 1 else (False,))
        for mode in recompute
        for model in models
    ]
    if extras:
        cases += [Case(layout, model=models[0], extra=ON_HOST) for layout in layouts if layout.zero > 0]
        cases.append(Case(Layout(data=4, zero=3), model=models[0], extra=WITHIN))
    return cases


def measure(cases: Sequence[Case], *, steps: int) -> Iterator[list[Row]]:
    """The rows of a few cases after another, of one layout; they share their processes, and fail together if these die."""
    wanted = {model: reference(model, steps=steps) for model in dict.fromkeys(case.model for case in cases)}
    for same in together(cases):
        try:
            outcomes = run_cases(same, steps=steps, timeout=3600)
        except AssertionError as error:
            yield [Row(case, None, str(error)[-2000:]) for case in same]
            continue
        rows = []
        for case in same:
            try:
                rows.append(Row(case, compare(outcomes[case], wanted[case.model])))
            except AssertionError as error:
                rows.append(Row(case, None, str(error)))
        yield rows


def together(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """Cases of one layout, at most `CASES_PER_START` of them."""
    for layout in dict.fromkeys(case.layout for case in cases):
        same = [case for case in cases if case.layout == layout]
        for start in range(0, len(same), CASES_PER_START):
            yield same[start : start + CASES_PER_START]


def line(row: Row) -> str:
    """A row of the table."""
    verdict = "ok" if row.passed else "FAILED"
    if row.errors is None:
        return f"{row.case.name:<72} {verdict}: {row.failure}"
    e = row.errors
    return f"{row.case.name:<72} {e.loss:8.1e} {e.norm:8.1e} {e.evaluated:9.1e} {e.gradient:8.1e} {e.logits:8.1e}  {verdict}"


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {layout.name: layout for layout in LAYOUTS}
    parser.add_argument("--layouts", nargs="+", choices=names, default=list(names))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTE, default=list(RECOMPUTE))
    parser.add_argument("--no-extras", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path, help=f"where to write the result; a full run writes {RESULT}")
    options = parser.parse_args()
    started = time.monotonic()
    layouts = [names[name] for name in options.layouts]
    cases = make_cases(layouts, options.models, options.recompute, not options.no_extras)
    title = f"relative error over {options.steps} steps"
    print(f"{title:<72} {'loss':>8} {'norm':>8} {'evaluated':>9} {'gradient':>8} {'logits':>8}")
    whole = len(cases) == len(make_cases(LAYOUTS, list(MODELS), list(RECOMPUTE), True)) and options.steps == STEPS
    path = options.json or (RESULT if whole else None)
    rows: list[Row] = []
    for found in measure(cases, steps=options.steps):
        rows += found
        print("\n".join(map(line, found)), flush=True)
        if path:  # what is there stays, should the rest not end
            write(path, rows, planned=len(cases), steps=options.steps, seconds=time.monotonic() - started)
    passed = sum(row.passed for row in rows)
    print(f"{passed} of {len(cases)} cases below {TOLERANCE:g}, {time.monotonic() - started:.0f} s")
    return 0 if passed == len(cases) else 1


def write(path: Path, rows: Sequence[Row], *, planned: int, steps: int, seconds: float) -> None:
    """The result with what it hangs on."""
    content = {
        "format_version": 1,
        "command": "python benchmarks/parity.py",
        "claim": "losses, gradient norms, losses of an evaluation, step 1's gathered gradients and final logits as in one "
        "process, relative",
        "tolerance": TOLERANCE,
        "steps": steps,
        "dtype": "fp32",
        "backend": "gloo",
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": None},
        "versions": versions(),
        "commit": source_commit(),
        "seconds": round(seconds),
        "largest": {
            key: max((getattr(row.errors, key) for row in rows if row.errors), default=None)
            for key in ("loss", "norm", "evaluated", "gradient", "logits")
        },
        "planned": planned,
        "passed": sum(row.passed for row in rows),
        "cases": [
            {
                **asdict(row.case.layout),
                **{key: value for key, value in asdict(row.case).items() if key != "layout"},
                "errors": asdict(row.errors) if row.errors else None,
                "failure": row.failure,
                "passed": row.passed,
            }
            for row in rows
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
