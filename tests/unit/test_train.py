"""The trainer's pure parts: learning rate, loss scales, log, guards, run folder, environment."""

import json
import math
import os
import signal
import typing
from dataclasses import replace

import pytest
import torch

from tests.golden.make import DEBUG_RECIPE
from vilg.config import load_recipe
from vilg.config.environment import process_environment
from vilg.config.schema import GuardsConfig, OptimizerConfig, ScheduleConfig
from vilg.data.children import STOP_SIGNALS
from vilg.errors import TRY_AGAIN, UserError
from vilg.model.vilg import Vilg
from vilg.tokens.sequence import SequenceSpec
from vilg.train import rundir
from vilg.train.changes import SHAPE, check_accept, check_tokenizers, compare
from vilg.train.guards import NonFiniteGuard, StopSignals
from vilg.train.log import console_line, cut_metrics, duration
from vilg.train.metrics import Window
from vilg.train.open import num_parameters_here, sequence_spec
from vilg.train.optim import clip_gradients, gradient_norm, learning_rate, parameter_groups
from vilg.train.step import StepResult, plan_step


def recipe(*overrides: str):
    return load_recipe(DEBUG_RECIPE, overrides, cross_checks=False)


def result(*, skipped: bool) -> StepResult:
    zero = torch.zeros(())
    return StepResult(zero, zero, zero, math.inf if skipped else 1.0, skipped, 1e-3)


def test_learning_rate_warms_up_to_the_peak_and_ends_at_its_share():
    optimizer = OptimizerConfig(lr=0.5)
    schedule = ScheduleConfig(steps=100, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, optimizer, schedule) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.05) and rates[9] == 0.5
    assert max(rates) == 0.5 and rates[-1] == pytest.approx(0.05)
    assert rates[54] == pytest.approx(0.5 * 0.55)  # half way down the cosine
    assert all(a < b for a, b in zip(rates[:9], rates[1:10])) and all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_learning_rate_without_warmup_or_decay_is_constant():
    optimizer = OptimizerConfig(lr=0.5)
    flat = ScheduleConfig(steps=10, min_lr_ratio=1.0)
    assert {learning_rate(step, optimizer, flat) for step in range(1, 11)} == {0.5}
    assert learning_rate(3, optimizer, ScheduleConfig(steps=3, warmup_steps=3)) == 0.5


def test_norms_biases_and_embeddings_are_not_decayed():
    spec = SequenceSpec(16, (8, 8), 512, 512)
    named = list(Vilg(recipe().model, spec, device="meta").named_parameters())
    decayed, others = parameter_groups(named, 0.04)
    by_tensor = {id(p): name for name, p in named}
    names = {by_tensor[id(p)] for p in decayed["params"]}
    assert decayed["weight_decay"] == 0.04 and others["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(others["params"]) == len(named)
    assert names and not any("norm" in n or n.endswith("bias") or "table" in n or "position" in n for n in names)


def test_clipping_leaves_small_gradients_and_shortens_long_ones():
    weights = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norm = gradient_norm(weights)
    assert norm == 5.0
    clip_gradients(weights, norm, 10.0)
    assert weights[1].grad == 4.0
    clip_gradients(weights, norm, 1.0)
    assert gradient_norm(weights) == pytest.approx(1.0, rel=1e-5)


def test_scales_divide_by_targets_or_by_pairs():
    mean = plan_step(recipe("loss.text_weight=0.5"), 1, text_targets=20, image_targets=0)
    assert mean.text_scale == 0.5 / 20 and mean.image_scale == 1.0  # no targets: the sum it multiplies is 0
    plain = plan_step(recipe("loss.reduction=sum"), 1, text_targets=20, image_targets=640)
    assert plain.text_scale == plain.image_scale == 1 / 16


def test_guard_stops_after_more_nonfinite_steps_in_a_row_than_allowed():
    guard, config = NonFiniteGuard(), GuardsConfig(max_nonfinite_steps=2)
    assert "2 in a row" in [guard.check(step, result(skipped=True), config) for step in (1, 2)][1]
    assert guard.check(3, result(skipped=False), config) is None and guard.in_a_row == 0 and guard.total == 2
    for step in (4, 5):
        guard.check(step, result(skipped=True), config)
    with pytest.raises(UserError, match="max_nonfinite_steps=2"):
        guard.check(6, result(skipped=True), config)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_for_a_stop_and_the_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked == number.name
    assert signal.getsignal(number) is before


def test_console_line_carries_units_and_says_where_no_peak_is_known():
    row = {"step": 120, "loss": 5.31, "image_loss": 6.02, "text_loss": None, "lr": 2e-3, "grad_norm": 0.5}
    window = Window(0.5, 41_200.0, 0.014, int(61.3 * 2**30), None, None, 3 * 3600 + 12 * 60)
    line = console_line(row, 5000, window, "gpu")
    assert line == (
        "step 120/5000  loss 5.310 (image 6.020)  lr 2.00e-03  grad 0.50  "
        "41.2k tok/s/gpu  MFU n/a  data 1%  mem 61.3 GiB  eta 3h12m"
    )
    known = console_line(row, 5000, replace(window, mfu=0.382, hfu=0.514), "gpu")
    assert "tok/s/gpu  MFU 38%  HFU 51%  data" in known
    assert "MFU 38%  data" in console_line(row, 5000, replace(window, mfu=0.382, hfu=0.382), "gpu")
    assert duration(59.6) == "1m00s" and duration(3) == "3s"


def test_metrics_after_the_checkpoint_and_a_cut_line_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    cut_metrics(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def open_run_dir(recipe):
    """Open and let go again, as a start that ends does."""
    lock = rundir.RunLock(recipe.run_dir)
    try:
        return rundir.open_run_dir(recipe, lock)
    finally:
        lock.release()


def test_a_folder_in_use_by_another_run_is_refused_until_that_ends(tmp_path):
    mine = recipe(f"run_dir={tmp_path / 'run'}")
    lock = rundir.RunLock(mine.run_dir)
    rundir.open_run_dir(mine, lock)
    rundir.write_recipe(mine)
    with pytest.raises(UserError, match="in use by a run that is still going") as error:
        open_run_dir(mine)
    assert error.value.exit_code == TRY_AGAIN  # a job of a chain that starts too early is no mistake of the recipe
    lock.release()
    assert open_run_dir(mine) == (None, [])


def test_run_folder_of_another_recipe_is_refused_with_all_differing_keys(tmp_path):
    mine = recipe(f"run_dir={tmp_path / 'run'}")
    open_run_dir(mine)
    rundir.write_recipe(mine)
    with pytest.raises(UserError) as error:
        open_run_dir(
            recipe(f"run_dir={tmp_path / 'run'}", "optimizer.lr=0.1", "model.num_layers=2", "logging.every_steps=1")
        )
    assert "optimizer.lr: 0.002 there, 0.1 here" in str(error.value) and "model.num_layers" in str(error.value)
    assert "logging" not in str(error.value)
    assert load_recipe(tmp_path / "run" / "config.yaml", cross_checks=False) == mine


def test_harmless_changes_of_a_recipe_become_notes(tmp_path):
    mine = recipe(f"run_dir={tmp_path / 'run'}")
    open_run_dir(mine)
    rundir.write_recipe(mine)
    changed = recipe(f"run_dir={tmp_path / 'run'}", "schedule.steps=60", "samples.temperature=0.5")
    checkpoint, notes = open_run_dir(changed)
    assert checkpoint is None and len(notes) == 2 and "schedule.steps changed from 50 to 60" in notes[1]


def test_a_harmful_change_can_be_accepted_and_one_of_the_models_shape_cannot():
    mine = recipe()
    with pytest.raises(UserError, match="--accept=loss.*,seed"):
        compare(mine, recipe("seed=1", "loss.text_weight=0.5"), "the checkpoint", ["loss.*"])
    notes = compare(mine, recipe("seed=1", "loss.text_weight=0.5"), "the checkpoint", ["loss.*", "seed"])
    assert [note.split(" changed")[0] for note in notes] == ["loss.text_weight", "seed"]
    with pytest.raises(UserError, match="model.hidden_size.*weights are of another model"):
        compare(mine, recipe("model.hidden_size=32"), "the checkpoint", ["model.*"])
    with pytest.raises(UserError, match="--accept=sead: a recipe has no such key; did you mean 'seed'"):
        check_accept(["sead"], mine)


def test_every_key_that_changes_the_models_parameters_is_known_as_one_of_its_shape():
    before = recipe()

    def shapes(changed) -> dict[str, torch.Size]:
        model = Vilg(changed.model, sequence_spec(changed), device="meta")
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    for section, config in (("model", before.model), ("tokens", before.tokens)):
        for name, value in config:
            choices = typing.get_args(type(config).model_fields[name].annotation)
            if isinstance(value, bool):
                other = str(not value).lower()
            elif isinstance(value, int):
                other = 2 * value + 1 if name == "conv_size" else 2 * value
            elif isinstance(value, str):
                other = next(choice for choice in choices if choice != value)
            else:
                continue  # numbers that are no sizes, and paths
            changed = recipe(f"{section}.{name}={other}")
            assert (shapes(changed) == shapes(before)) or f"{section}.{name}" in SHAPE, name


def test_another_tokenizer_is_refused_unless_accepted():
    was, now = {"text": "a" * 64, "image": "b" * 64}, {"text": "a" * 64, "image": "c" * 64}
    assert check_tokenizers(was, was, "here", []) == []
    with pytest.raises(UserError, match="image tokenizer bbbbbbbbbbbb, but tokens.image_model is cccccccccccc.*--accept"):
        check_tokenizers(was, now, "here", [])
    assert len(check_tokenizers(was, now, "here", ["tokens.*"])) == 1


@pytest.mark.parametrize("content", ["file", "foreign"])
def test_a_place_that_is_no_run_folder_is_refused(tmp_path, content):
    if content == "file":
        (tmp_path / "run").write_text("x")
    else:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is a file" if content == "file" else "thesis.tex"):
        open_run_dir(recipe(f"run_dir={tmp_path / 'run'}"))


def test_slurm_variables_become_torch_ones():
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "17000",
    }
    found = process_environment(slurm)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("3", "8", "1")
    assert process_environment({}) == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert process_environment(slurm, slurm=False)["WORLD_SIZE"] == "1"
    del slurm["MASTER_PORT"]
    with pytest.raises(UserError, match="MASTER_PORT not set"):
        process_environment(slurm)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE='0' in the environment should be a whole number of 1 or more"),
        ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE='two' in the environment should be"),
        ("RANK=-1 WORLD_SIZE=1", "RANK='-1' in the environment should be a whole number of 0 or more"),
        ("RANK=1 WORLD_SIZE=1", "RANK=1 is none of WORLD_SIZE=1 processes"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=x", "LOCAL_RANK='x' in the environment should be"),
        ("WORLD_SIZE=2", "WORLD_SIZE='2' is set in the environment, but RANK is not"),
        ("SLURM_PROCID=0 SLURM_NTASKS=many", "SLURM_NTASKS='many' in the environment should be"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        process_environment(dict(pair.split("=") for pair in given.split()))


def test_parameters_that_zero_three_has_cut_are_counted_whole():
    model = torch.nn.Linear(3, 5)
    model.weight.ds_numel, model.weight.data = 15, torch.empty(0)
    assert num_parameters_here(model) == 20
