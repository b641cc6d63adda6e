"""The core of benchmarks/parity.py: layouts of each kind against one process, and what all ranks must agree on."""

import math
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.distributed.helpers import run_distributed
from tests.distributed.parity import ALL_CUT, ON_HOST, Case, Outcome, Trainer, compare, reference, run_cases, train_all
from tests.distributed.resume_support import Layout
from vilg.train.distributed import distributed
from vilg.train.faults import Fault, FaultPlan

STEPS, TOLERANCE = 6, 1e-5
CASES = [
    Case(Layout(data=2, zero=3), recompute="selective", model="dense"),
    Case(Layout(tensor=2), sequence=True, recompute="full"),
    Case(Layout(pipeline=2), recompute="full", every=2),
    Case(Layout(data=2, zero=2), extra=ON_HOST),
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
    """For each case and its faulty rank, whose gradients are NaN in step 2: which of four steps were left out, which left
    the weights alone, and the losses. In step 3 every loss counts as a spike."""
    found = []
    with distributed(torch.device("cpu")):
        for case, faulty in cases:
            trainer = Trainer.build(case, folder)
            faults = FaultPlan([Fault("nan", 2, faulty)], trainer.engine.model, rank=rank)
            skipped, kept, losses = [], [], []
            for step in (1, 2, 3, 4):
                list(faults.before_step(step))
                before = [p.detach().clone() for p in trainer.engine.model.parameters()]
                result = trainer.step(step, loss_limit=0.1 if step == 3 else math.inf)
                skipped.append(result.skipped)
                kept.append(all(map(torch.equal, before, trainer.engine.model.parameters())))
                losses.append(float(result.loss))
            found.append((skipped, kept, losses))
    return found


def test_all_stages_leave_out_a_step_with_nan_gradients_on_one_rank_and_a_loss_spike():
    cases = [(Case(Layout(pipeline=2)), 1), (Case(Layout(pipeline=2, zero=1)), 0)]
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_distributed(2, skipped_steps, (cases, Path(folder)), init=False)
    for found in ranks:
        for number, (skipped, kept, losses) in enumerate(found):
            assert skipped == kept == [False, True, True, False]
            assert losses == ranks[0][number][2] and all(map(math.isfinite, losses))


def evaluated_between(rank: int, world_size: int, cases: list[Case], folder: Path) -> list[list[list[float]]]:
    """For each case, the losses of three steps without evaluations, then with one before each; and what ranks hold of a
    pipeline's last evaluation."""
    found = []
    with distributed(torch.device("cpu")):
        for case in cases:
            losses: list[list[float]] = []
            for evaluates in (False, True):
                trainer, own = Trainer.build(case, folder), []
                for step in (1, 2, 3):
                    if evaluates:
                        trainer.evaluate()
                        buffers = getattr(trainer.engine.engine, "pipe_buffers", {})
                        assert all(held is None for kept in buffers.values() for held in kept)
                    own.append(float(trainer.step(step).loss))
                losses.append(own)
            found.append(losses)
    return found


def test_evaluations_between_steps_change_no_digit_of_the_training(tmp_path):
    cases = [
        Case(Layout(data=2, zero=3), extra=ALL_CUT, recompute="full"),
        Case(Layout(data=2, zero=1), model="dense"),
        Case(Layout(pipeline=2, zero=1)),
    ]
    for ranks in run_distributed(2, evaluated_between, (cases, tmp_path), init=False):
        for without, with_evaluations in ranks:
            assert without == with_evaluations and len(set(without)) == 3


def compiled_outcomes(rank: int, world_size: int, cases: list[Case], folder: Path) -> tuple[list[Outcome], int]:
    """As `train_all` with parallel.compile, traced and run operation by operation; and how often tracing broke off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        return train_all(rank, world_size, cases, 3, folder), len(counters["graph_break"])


def test_compiled_blocks_train_alike_under_tensor_parallelism_and_in_stages(references, tmp_path):
    cases = [
        Case(Layout(tensor=2), sequence=True, recompute="selective", compiled=True),
        Case(Layout(pipeline=2, zero=1), model="dense", compiled=True),
    ]
    ranks = run_distributed(2, compiled_outcomes, (cases, tmp_path), init=False)
    assert [breaks for _, breaks in ranks] == [0, 0]
    for number, case in enumerate(cases):
        found, wanted = [outcomes[number].losses for outcomes, _ in ranks], references[case.model].losses[:3]
        assert found[0] == found[1]
        assert all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(found[0], wanted, strict=True)), case.name
