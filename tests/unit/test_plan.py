"""`vilg plan` on the shipped recipes: memory, traffic, time, what fits, and what would."""

import json
import re
from pathlib import Path

import pytest

from vilg.config import load_recipe
from vilg.errors import UserError
from vilg.model import size
from vilg.tools.plan import GPUS, gpu_named, main, plan, require_fit, search
from vilg.train.open import sequence_spec

ROOT = Path(__file__).resolve().parents[2]
DEBUG = str(ROOT / "launch/recipes/debug.yaml")
SPLIT = str(ROOT / "launch/recipes/10b-tensor4-pipe4.yaml")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name DeepSpeed files relative to the current directory


def test_state_of_a_split_ten_billion_run_is_counted():
    made = plan(load_recipe(SPLIT), gpus=64, gpu="a100-80g")
    assert (made.data, made.tensor, made.pipeline, made.zero_stage, made.micro_batches) == (4, 4, 4, 1, 256)
    assert made.stages[0].first_layer == 0 and made.stages[-1].stop_layer == 50
    for stage in made.stages:
        assert stage.memory.weights == 2 * stage.parameters
        assert stage.memory.gradients == 4 * stage.parameters  # summed up in fp32 (data_types.grad_accum_dtype)
        assert stage.memory.optimizer == pytest.approx(12 * stage.parameters / 4, rel=1e-6)
    # 1F1B: the first stage holds four micro-batches, the last one, which alone has the logits
    assert [stage.in_flight for stage in made.stages] == [4, 3, 2, 1] and made.worst_stage == 0
    assert [stage.memory.logits > 0 for stage in made.stages] == [False, False, False, True]
    assert made.fits and made.memory_limit == int(GPUS["a100-80g"].memory)
    assert made.timing.bubble / (made.timing.bubble + made.timing.compute) == pytest.approx(3 / 259, rel=0.4)
    assert made.sequences_per_step == 4096 and made.tokens_per_step == 4096 * 1088


def test_step_is_the_sum_of_its_parts_and_gives_speed_mfu_and_days():
    made = plan(load_recipe(SPLIT), gpus=64)
    seconds = made.step_seconds
    assert seconds == pytest.approx(sum(vars(made.timing).values()))
    assert made.tokens_per_second == pytest.approx(made.tokens_per_step / seconds / 64)
    assert made.mfu == pytest.approx(made.model_flops / seconds / 64 / 312e12)
    assert made.hfu > made.mfu  # the recipe recomputes attention
    assert made.epoch_days == pytest.approx(2 * 145e6 / 4096 * seconds / 86400)


def test_recomputation_takes_memory_for_operations():
    recipe, memory, hardware, seconds = load_recipe(SPLIT), [], [], []
    for mode in ("none", "selective", "full"):
        changed = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"recompute": mode})})
        made = plan(changed, gpus=64)
        memory.append(made.stages[0].memory.activations)
        hardware.append(made.hardware_flops / made.model_flops)
        seconds.append(made.step_seconds)
    assert memory == sorted(memory, reverse=True) and hardware == sorted(hardware) and seconds == sorted(seconds)
    assert hardware[0] == 1 and hardware[2] == pytest.approx(4 / 3, rel=0.12) and memory[2] < memory[0] / 4


def test_activations_are_shown_for_every_way_of_recomputing(capsys):
    recipe = load_recipe(SPLIT, ["parallel.recompute=full", "parallel.recompute_every=2"])
    made = plan(recipe, gpus=64)
    shown = made.activations_by_mode
    assert shown["full"] == made.stages[made.worst_stage].memory.activations and shown["selective"] < shown["none"]
    whole = plan(load_recipe(SPLIT, ["parallel.recompute=full"]), gpus=64).activations_by_mode
    assert whole["full"] < shown["full"] < whole["selective"] == shown["selective"]
    assert main([SPLIT, "--gpus", "64"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"by parallel.recompute: none \d+\.\d\d GiB, selective \d+\.\d\d GiB, full \d", text)
    assert "NOT COUNTED" not in text


def test_what_end_to_end_training_adds_is_said_not_to_be_counted(capsys):
    end_to_end = ["--model.reconstructor.ramp_steps=4", "--model.reconstructor.joint_quantizer.lr=1e-2"]
    for search_too in ([], ["--search"]):
        assert main([DEBUG, "--gpus", "1", *search_too, *end_to_end]) == 0
        assert "NOT COUNTED, neither memory nor time: model.reconstructor, model.reconstructor.joint" in capsys.readouterr().out


@pytest.mark.parametrize(("result", "time", "memory"), [
    ("train_step", -0.19, 0.02),
    ("train_step_compiled", -0.11, 0.03),
])  # fmt: skip
def test_our_own_timed_runs_are_predicted_as_the_docs_say(result, time, memory):
    timed = json.loads((ROOT / "benchmarks/results" / f"{result}.json").read_text())
    sparse = timed["contenders"]["sparse"]
    given = [f"model.num_layers={timed['layers']}", f"batch.micro_size={timed['pairs']}", "parallel.recompute=none",
             f"batch.global_size={timed['pairs'] * timed['micro_batches']}", "parallel.deepspeed=ds_configs/zero1.json"]  # fmt: skip
    made = plan(load_recipe(str(ROOT / "launch/recipes/10b.yaml"), given), gpus=1, gpu="h200")
    allocated = made.memory_per_rank - made.stages[0].memory.overhead  # torch counts neither the context nor holes
    assert made.step_seconds / (sparse["median_ms"] / 1e3) - 1 == pytest.approx(time, abs=0.01)
    assert allocated / 2**30 / sparse["peak_memory_gib"] - 1 == pytest.approx(memory, abs=0.01)


def test_slower_links_slow_what_they_carry():
    recipe = load_recipe(SPLIT)
    fast = plan(recipe, gpus=64).timing
    slow = plan(recipe, gpus=64, gpu=gpu_named("a100-80g", network=1e9, nvlink=30e9)).timing
    assert slow.tensor == pytest.approx(10 * fast.tensor) and slow.boundary == pytest.approx(25 * fast.boundary)
    assert slow.compute == fast.compute and slow.data > 10 * fast.data


def test_what_does_not_fit_is_refused_with_layouts_that_would():
    recipe = load_recipe(str(ROOT / "launch/recipes/10b.yaml"), ["parallel.deepspeed=ds_configs/zero1.json"])
    made = plan(recipe, gpus=8, gpu="a100-40g")
    assert not made.fits
    message = r"needs \d+\.\d GiB .* 39\.4 GiB of a a100-40g(.|\n)*--parallel\.deepspeed="
    with pytest.raises(UserError, match=message) as caught:
        require_fit(made, recipe)
    options = str(caught.value).splitlines()[1].split("   (")[0].split()
    changed = load_recipe(str(ROOT / "launch/recipes/10b.yaml"), [option.removeprefix("--") for option in options])
    assert plan(changed, gpus=8, gpu="a100-40g").fits
    with pytest.raises(UserError, match="no layout of it fits"):
        require_fit(plan(recipe, gpus=1, gpu=gpu_named("a100-40g", memory=2**30)), recipe)


def test_search_lists_what_fits_fastest_first_and_keeps_the_rules():
    found = search(load_recipe(SPLIT), gpus=16, gpu="a100-40g")
    assert len(found) > 3 and all(made.fits for made in found)
    assert [made.step_seconds for made in found] == sorted(made.step_seconds for made in found)
    assert all(made.zero_stage <= 1 for made in found if made.pipeline > 1)
    assert all(made.micro_size * made.micro_batches * made.data == 2048 for made in found)


def test_search_offers_no_tensor_ranks_where_neighbours_share_weights():
    recipe = load_recipe(str(ROOT / "launch/recipes/10b.yaml"))
    found = search(recipe, gpus=32, gpu="a100-80g")
    shared = [made for made in found if made.zero_file.endswith("zero3-node.json")]
    assert [made.tensor for made in shared] == [1] and any(made.tensor > 1 for made in found)


def test_search_passes_over_a_broken_file_beside_the_recipes_own(tmp_path):
    for name, extra in (("zero1.json", ""), ("zero2-mine.json", ', "data_types": {"grad_accum_dtype": "float32"}')):
        (tmp_path / name).write_text(f'{{"zero_optimization": {{"stage": {name[4]}}}{extra}}}')
    found = search(load_recipe(DEBUG, [f"parallel.deepspeed={tmp_path / 'zero1.json'}"]), gpus=2)
    assert {Path(made.zero_file).name for made in found} == {"zero1.json"}


def test_command_prints_figures_with_units_and_json(capsys):
    assert main([DEBUG, "--gpus", "2", "--model.dropout=0.0"]) == 0
    text = capsys.readouterr().out
    assert "data 2 x tensor 1 x pipeline 1, ZeRO 1" in text and "MiB" in text and "MFU" in text and "days" in text
    assert main([DEBUG, "--json", "--gpu", "h100", "--network-gbs", "25"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["gpus"] == 1 and made["sequences_per_step"] == 16 and made["gpu"]["network"] == 25e9
    assert made["fits"] is True and made["stages"][0]["memory"]["weights"] > 0
    recipe = load_recipe(DEBUG)
    assert made["parameters"] == size.num_parameters(recipe.model, sequence_spec(recipe))
    assert main([DEBUG, "--gpus", "2", "--search"]) == 0
    assert "fastest first" in capsys.readouterr().out


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(UserError, match="5"):
        main([DEBUG, "--gpus", "5", "--parallel.tensor=2"])
    with pytest.raises(UserError, match="--gpus 5 is no multiple of parallel.tensor=2"):
        plan(load_recipe(DEBUG, ["parallel.tensor=2"]), gpus=5)
    for wrong in (["--gpus", "0"], ["--gpus", "-4"], ["--gpus", "0", "--search"]):
        with pytest.raises(UserError, match=rf"--gpus {wrong[1]} is no number of ranks; use 1 or more"):
            main([DEBUG, *wrong])
    with pytest.raises(UserError, match="--gpu k80 is not in the table; name the nearest of a100-40g"):
        main([DEBUG, "--gpu", "k80"])
    with pytest.raises(UserError, match="network=-1e"):
        main([DEBUG, "--network-gbs", "-1"])
    with pytest.raises(UserError, match="engine=torch is one process"):
        plan(load_recipe(DEBUG, ["parallel.engine=torch"]), gpus=2)
