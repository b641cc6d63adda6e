"""The core of benchmarks/parity.py: layouts of each kind against one process, and what all ranks must agree on."""

import math
import tempfile
from pathlib import Path

import pytest
import torch

from tests.distributed.helpers import run_distributed
from tests.distributed.parity import Case, Trainer, compare, reference, run_cases
from tests.distributed.resume_support import Layout
from vilg.train.distributed import distributed
from vilg.train.faults import Fault, FaultPlan

STEPS, TOLERANCE = 6, 1e-5
CASES = [
    Case(Layout(data=2, zero=3), recompute="selective", model="dense"),
    Case(Layout(tensor=2), sequence=True, recompute="full"),
    Case(Layout(pipeline=2), recompute="full", every=2),
    Case(Layout(data=2, zero=2), extra="optimizer on the host"),
    Case(Layout(tensor=2, pipeline=2, zero=1), sequence=True, model="dense"),
    Case(Layout(tensor=2, data=2, zero=2)),
    Case(Layout(pipeline=2, data=2, zero=1), recompute="selective"),
]


@pytest.fixture(scope="module")
def outcomes():
    return run_cases(CASES, steps=STEPS)


@pytest.fixture(scope="module")
def references():
    return {model: reference(model, steps=STEPS) for model in ("sparse", "dense")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_has_the_losses_gradients_and_logits_of_one_process(outcomes, references, case):
    wanted = references[case.model]
    assert wanted.losses[-1] < wanted.losses[0]  # it learns, so that later steps test the updates
    errors = compare(outcomes[case], wanted)
    assert errors.largest < TOLERANCE, errors


def skipped_steps(rank: int, world_size: int, cases: list[tuple[Case, int]], folder: Path):
    """For each case and its faulty rank: which of three steps were left out, whether the second one, in which that
    rank's gradients are NaN, left the weights alone, and the losses."""
    found = []
    with distributed(torch.device("cpu")):
        for case, faulty in cases:
            trainer = Trainer.build(case, folder)
            faults = FaultPlan([Fault("nan", 2, faulty)], trainer.engine.model, rank=rank)
            skipped, losses, kept = [], [], None
            for step in (1, 2, 3):
                list(faults.before_step(step))
                before = [p.detach().clone() for p in trainer.engine.model.parameters()]
                result = trainer.step(step)
                skipped.append(result.skipped)
                losses.append(float(result.loss))
                if step == 2:
                    kept = all(map(torch.equal, before, trainer.engine.model.parameters()))
            found.append((skipped, kept, losses))
    return found


def test_all_stages_leave_out_a_step_in_which_one_rank_has_nan_gradients():
    cases = [(Case(Layout(pipeline=2)), 1), (Case(Layout(pipeline=2, zero=1)), 0)]
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_distributed(2, skipped_steps, (cases, Path(folder)), init=False)
    for found in ranks:
        for number, (skipped, kept, losses) in enumerate(found):
            assert skipped == [False, True, False] and kept
            assert losses == ranks[0][number][2] and all(map(math.isfinite, losses))
