"""DeepSpeed files: what DeepSpeed would silently ignore is refused, and what the recipe owns is added once."""

import json
import os
from pathlib import Path

import pytest

from vilg.config.deepspeed import merged_deepspeed_config, read_deepspeed_file
from vilg.config.deepspeed_keys import ALLOWED, NOT_USED, OWNED_BY_RECIPE, REMOVED, Kind
from vilg.config.schema import Recipe
from vilg.errors import UserError

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


def problems_of(tmp_path, text: str) -> list[str]:
    path = tmp_path / "zero.json"
    path.write_text(text)
    return [f"{place.line}:{place.column}: {message}" for place, message in read_deepspeed_file(path).problems]


def recipe_with(deepspeed: Path, **changes) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "run_dir": "x",
            "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1},
            "tokens": {
                "text_model": "x",
                "image_model": "x",
                "text_slots": 4,
                "grid": [2, 2],
                "text_vocab_size": 9,
                "image_vocab_size": 8,
            },
            "data": {"train": "x"},
            "batch": {"global_size": 24, "micro_size": 3},
            "optimizer": {"lr": 0.1, "grad_clip": 0.5},
            "schedule": {"steps": 1},
            "checkpoint": {"every_steps": 1},
            "parallel": {"deepspeed": deepspeed},
            **changes,
        }
    )


def test_misspelt_top_level_key_is_refused_with_its_place(tmp_path):
    text = '{\n  "zero_optimisation": {"stage": 2}\n}'
    assert problems_of(tmp_path, text) == ["2:3: zero_optimisation: unknown key; did you mean 'zero_optimization'?"]


def test_misspelt_nested_keys_are_refused_in_tab_indented_files_too(tmp_path):
    text = '{\n\t"zero_optimization": {"stage": 3, "offload_optimizer": {"devise": "cpu"}, "overlap_com": true}\n}'
    assert problems_of(tmp_path, text) == [
        "2:58: zero_optimization.offload_optimizer.devise: unknown key; did you mean 'device'?",
        "2:76: zero_optimization.overlap_com: unknown key; did you mean 'overlap_comm'?",
    ]


@pytest.mark.parametrize("key, owner", OWNED_BY_RECIPE.items())
def test_keys_of_the_recipe_are_refused_and_their_owner_named(tmp_path, key, owner):
    *around, last = key.split(".")
    value = {last: 1}
    for section in around:
        value = {section: value}
    (problem,) = problems_of(tmp_path, json.dumps(value))
    assert f"{key}: belongs to the recipe ({owner})" in problem


@pytest.mark.parametrize(
    "key, expected", [("autotuning", "does not use"), ("sparse_attention", "removed"), ("amp", "removed")]
)
def test_features_without_effect_are_refused(tmp_path, key, expected):
    (problem,) = problems_of(tmp_path, json.dumps({key: {}}))
    assert expected in problem


@pytest.mark.parametrize("stage", ["4", "-1", '"1"', "true", "1.0", "null"])
def test_zero_stage_must_exist(tmp_path, stage):
    text = f'{{"zero_optimization": {{"stage": {stage}}}}}'
    assert any("zero_optimization.stage: should be 0, 1, 2 or 3; found" in p for p in problems_of(tmp_path, text))


def test_duplicate_key_and_wrong_nesting_are_refused(tmp_path):
    text = '{"zero_optimization": 2, "wall_clock_breakdown": {"a": 1}, "dump_state": true, "dump_state": false}'
    messages = " ".join(problems_of(tmp_path, text))
    for expected in ("should be a section", 'wall_clock_breakdown: should be true or false; found {"a": 1}', "dump_state: given twice"):
        assert expected in messages


@pytest.mark.parametrize(
    "section, key, value, expected",
    [
        ("zero_optimization", "reduce_bucket_size", '"big"', 'a whole number of 1 or more; found "big"'),
        ("zero_optimization", "zero_hpz_partition_size", '"8"', 'a whole number of 0 or more; found "8"'),
        ("zero_optimization", "allgather_bucket_size", "1.5", "a whole number of 0 or more; found 1.5"),
        ("zero_optimization", "overlap_comm", "1", "true or false; found 1"),
        ("data_types", "grad_accum_dtype", '"float32"', '"fp32", "bf16" or "fp16"; found "float32"'),
        ("checkpoint", "tag_validation", "null", '"Warn", "Ignore" or "Fail"; found null'),
    ],
)
def test_wrong_values_are_refused_with_what_would_be_right(tmp_path, section, key, value, expected):
    (problem,) = problems_of(tmp_path, f'{{"{section}": {{"{key}": {value}}}}}')
    assert f"{section}.{key}: should be {expected}" in problem


def test_offload_to_a_disk_is_refused_and_all_problems_come_at_once(tmp_path):
    text = (
        '{"zero_optimization": {"offload_optimizer": {"device": "nvme", "ratio": 2}, "stage": 3,\n'
        '"reduce_bucket_size": 5e8, "sub_group_size": null}, "communication_data_type": null}'
    )
    device, ratio, group = sorted(problems_of(tmp_path, text))
    assert 'offload_optimizer.device: should be "cpu" or "none" (nvme is not used by this trainer); found "nvme"' in device
    assert "offload_optimizer.ratio: should be a number from 0 to 1; found 2" in ratio
    assert "2:28: zero_optimization.sub_group_size: should be a whole number of 0 or more; found null" in group


@pytest.mark.parametrize(
    "text, expected", [("{'a': 1}", "1:2: this is not JSON"), ("[1]", "one JSON object"), ("", "not JSON")]
)
def test_files_that_are_no_json_object_are_refused(tmp_path, text, expected):
    with pytest.raises(UserError, match=expected):
        problems_of(tmp_path, text)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_files_are_sound_and_stage_matches_the_name(path):
    marked = read_deepspeed_file(path)
    assert marked.problems == []
    stage, *_ = path.stem.split("-")  # then what is special: zero1-offload, zero3-node
    assert stage == f"zero{marked.value['zero_optimization']['stage']}"


def test_merged_config_holds_the_recipe_once(tmp_path):
    recipe = recipe_with(SHIPPED[1])
    merged = merged_deepspeed_config(recipe, data_size=4)
    assert merged["train_batch_size"] == 24
    assert merged["train_micro_batch_size_per_gpu"] == 3
    assert merged["gradient_accumulation_steps"] == 2
    assert merged["gradient_clipping"] == 0.5
    assert merged["bf16"] == {"enabled": True, "immediate_grad_update": True} and "fp16" not in merged
    assert "optimizer" not in merged and "scheduler" not in merged
    assert merged["zero_optimization"]["stage"] == 1
    json.dumps(merged)


def test_merged_config_refuses_an_uneven_batch_and_a_bad_file(tmp_path):
    with pytest.raises(UserError, match="batch.global_size=24 is not divisible by batch.micro_size=3 x 5"):
        merged_deepspeed_config(recipe_with(SHIPPED[1]), data_size=5)
    bad = tmp_path / "bad.json"
    bad.write_text('{"zero_optimisation": {}}')
    with pytest.raises(UserError, match=r"bad.json:1:2: zero_optimisation: unknown key"):
        merged_deepspeed_config(recipe_with(bad), data_size=1)


def test_key_table_equals_the_installed_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import config
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def names(model) -> set[str]:
        fields = model.model_fields.items()
        return {f.alias or name for name, f in fields if not (f.json_schema_extra or {}).get("deprecated")}

    zero = ALLOWED["zero_optimization"]
    assert set(zero) == names(DeepSpeedZeroConfig)
    assert set(zero["offload_param"]) == names(DeepSpeedZeroOffloadParamConfig)
    assert set(zero["offload_optimizer"]) == names(DeepSpeedZeroOffloadOptimizerConfig)
    assert set(ALLOWED["comms_logger"]) == names(CommsLoggerConfig)
    for section, model, other in (
        (zero, DeepSpeedZeroConfig, {"stage": 1}),  # some values are refused under another stage only
        (zero["offload_param"], DeepSpeedZeroOffloadParamConfig, {}),
        (zero["offload_optimizer"], DeepSpeedZeroOffloadOptimizerConfig, {}),
        (zero["zenflow"], ZenFlowConfig, {}),
        (ALLOWED["comms_logger"], CommsLoggerConfig, {}),
    ):
        for key, kind in section.items():
            for value in (True, "x", "cpu", "auto", None, -1, 0, 1, 5e8, 1.5, 0.5, ["x"]):
                if isinstance(kind, Kind) and (kind.accepts(value) or (value is None and kind.optional)):
                    model.model_validate({**other, key: value})  # raises for what DeepSpeed would refuse
    assert REMOVED == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert not set(ALLOWED) & (set(OWNED_BY_RECIPE) | NOT_USED | REMOVED)
