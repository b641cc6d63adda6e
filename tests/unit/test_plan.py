"""`vilg plan` on the shipped recipe and on the ten-billion shape."""

import json
from pathlib import Path

import pytest

from vilg.config import load_recipe
from vilg.errors import UserError
from vilg.tools.plan import format_plan, main, make_plan

ROOT = Path(__file__).resolve().parents[2]
DEBUG = str(ROOT / "launch/recipes/debug.yaml")
TEN_BILLION = [
    "model.num_layers=48", "model.hidden_size=4096", "model.num_heads=64", "tokens.text_slots=64",
    "tokens.grid=[32,32]", "tokens.text_vocab_size=32768", "tokens.image_vocab_size=8192", "precision=bf16",
    "parallel.tensor=4", "parallel.pipeline=4", "batch.global_size=512", "batch.micro_size=4", "data.directions=both", "model.dropout=0.0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name DeepSpeed files relative to the current directory


def test_ten_billion_recipe_fits_its_ranks_as_zero_1_shares_the_optimizer():
    plan = make_plan(load_recipe(DEBUG, TEN_BILLION), gpus=64)
    assert (plan.data, plan.tensor, plan.pipeline, plan.zero_stage, plan.micro_batches) == (4, 4, 4, 1, 32)
    assert plan.parameters == pytest.approx(1.0e10, rel=0.02)
    assert [stage.first_layer for stage in plan.stages][0] == 0 and plan.stages[-1].stop_layer == 50
    for stage in plan.stages:
        assert stage.weight_bytes == stage.gradient_bytes == 2 * stage.parameters
        assert stage.optimizer_bytes == pytest.approx(12 * stage.parameters / 4, rel=1e-6)
        assert stage.parameters == pytest.approx(plan.parameters / 16, rel=0.15)
    assert plan.sequences_per_step == 1024 and plan.tokens_per_step == 1024 * 1088
    assert plan.flops_per_step / plan.tokens_per_step == pytest.approx(6 * plan.parameters, rel=0.06)


def test_command_prints_figures_with_units_and_json(capsys):
    assert main([DEBUG, "--gpus", "2", "--model.dropout=0.0"]) == 0
    text = capsys.readouterr().out
    assert "2 ranks: data 2 x tensor 1 x pipeline 1, ZeRO 1" in text and "MiB" in text and "TFLOP" in text
    assert main([DEBUG, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["gpus"] == 1 and plan["sequences_per_step"] == 16
    assert format_plan(make_plan(load_recipe(DEBUG), gpus=1)).startswith("debug: ")


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="5"):
        main([DEBUG, "--gpus", "5", "--parallel.tensor=2"])
    with pytest.raises(UserError, match="--gpus 5 is no multiple of parallel.tensor=2"):
        make_plan(load_recipe(DEBUG, ["parallel.tensor=2"]), gpus=5)
