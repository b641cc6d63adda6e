"""End-to-end training under layouts of each kind against one process: the model, and what is trained beside it."""

import math

import pytest
import torch

from tests.distributed.parity import Case, compare, reference, run_cases
from tests.distributed.resume_support import Layout

MODEL, STEPS, TOLERANCE = "end to end", 5, 2e-5
CASES = [
    Case(Layout(data=2, zero=3), model=MODEL),
    Case(Layout(tensor=2, zero=1), sequence=True, model=MODEL),
    Case(Layout(pipeline=2, zero=1), model=MODEL),
]
MORE_CASES = [
    Case(Layout(data=2, zero=2), model=MODEL),
    Case(Layout(tensor=2), model=MODEL),
    Case(Layout(tensor=2, data=2, zero=1), sequence=True, model=MODEL),
    Case(Layout(pipeline=2, data=2), model=MODEL),
]


@pytest.fixture(scope="module")
def outcomes():
    return run_cases(CASES, steps=STEPS)


@pytest.fixture(scope="module")
def wanted():
    return reference(MODEL, steps=STEPS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_trains_model_reconstructor_and_discriminator_as_one_process_does(outcomes, wanted, case):
    expect_same(outcomes[case], wanted)


@pytest.mark.slow
def test_more_layouts_train_the_same(wanted):
    for ranks in run_cases(MORE_CASES, steps=STEPS).values():
        expect_same(ranks, wanted)


def expect_same(ranks, wanted) -> None:
    errors = compare(ranks, wanted)
    assert errors.largest < TOLERANCE, errors
    assert all(rank.figures == ranks[0].figures for rank in ranks)
    for found, expected in zip(ranks[0].figures, wanted.figures, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    kept = [rank.beside for rank in ranks if rank.beside]
    assert len(kept) == 1 and kept[0].keys() == wanted.beside.keys()
    for name, tensor in wanted.beside.items():
        assert torch.allclose(kept[0][name], tensor, rtol=1e-3, atol=1e-5), name


def test_everything_is_at_work_in_these_steps(wanted):
    first, *later = wanted.figures
    assert first["balance"] == 0 and first["discriminator_loss"] == 0  # nothing measured, nothing begun
    assert all(0 < f["balance"] <= 10 and math.isfinite(f["balance"]) for f in later)
    assert all(f["discriminator_grad_norm"] > 0 for f in later)
    assert [f["adaptive"] > 0 for f in later] == [False, True, True, True]  # measured in the first step that has it
    assert all(f["reconstructor_grad_norm"] > 0 for f in wanted.figures)
