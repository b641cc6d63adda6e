"""Recipes: every mistake is reported, at once, where it stands, with what would work."""

import subprocess
import sys
from pathlib import Path

import pytest

from vilg.config import check_recipe, dump_recipe, load_recipe, take_overrides
from vilg.errors import UserError

RECIPE = """\
name: debug
run_dir: runs/debug
precision: fp32
model: {num_layers: 4, hidden_size: 64, num_heads: 4}
tokens:
  text_model: tokenizer/text.model
  image_model: tokenizer/image
  text_slots: 16
  grid: [8, 8]
  text_vocab_size: 1000
  image_vocab_size: 512
data: {train: shards}
batch: {global_size: 16, micro_size: 4}
optimizer: {lr: 1e-3}
schedule: {steps: 100, warmup_steps: 10}
parallel: {deepspeed: DEEPSPEED}
checkpoint: {every_steps: 50}
"""


@pytest.fixture
def write(tmp_path):
    """Write a recipe, with (old, new) texts replaced, and a DeepSpeed file of the given stage beside it."""

    def write(*changes: tuple[str, str], stage: int = 1) -> Path:
        deepspeed = tmp_path / f"zero{stage}.json"
        deepspeed.write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
        text = RECIPE.replace("DEEPSPEED", str(deepspeed))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message_of(path, overrides=(), **options) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides, **options)
    return str(caught.value)


def test_values_defaults_and_relative_paths_are_read(write):
    recipe = load_recipe(write())
    assert recipe.model.num_heads == 4 and recipe.model.conv_size == 11
    assert recipe.tokens.grid == (8, 8)
    assert recipe.tokens.text_model == Path("tokenizer/text.model")


@pytest.mark.parametrize(
    "text, value", [("1e-3", 1e-3), ("3", 3.0), ("1_000.5", 1000.5), (".5", 0.5), ("2.5E-4", 2.5e-4)]
)
def test_numbers_are_read_as_people_write_them(write, text, value):
    assert load_recipe(write(("lr: 1e-3", f"lr: {text}"))).optimizer.lr == value


@pytest.mark.parametrize("name", ["no", "12:30", "2026-01-01", "on"])
def test_words_that_old_yaml_turned_into_other_types_stay_text(write, name):
    assert load_recipe(write(("name: debug", f"name: {name}"))).name == name


def test_dumped_recipe_loads_as_the_same_recipe(write, tmp_path):
    prompts = '["1e-3", "null", 白色背景上的马, "- x: y"]'
    recipe = load_recipe(write(), [f"samples.prompts={prompts}", "optimizer.lr=1e-5"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe


def test_recipe_starts_from_its_base_and_says_in_which_file_a_mistake_stands(write, tmp_path):
    base = write()
    heir = tmp_path / "heir.yaml"
    heir.write_text(f"base: {base.name}\nname: heir\nmodel:\n  num_heads: 1\ntokens:\n  grid: [4, 2]\n", encoding="utf-8")
    recipe, first = load_recipe(heir), load_recipe(base)
    assert (recipe.name, recipe.model.num_heads, recipe.tokens.grid) == ("heir", 1, (4, 2))
    assert recipe.model.hidden_size == first.model.hidden_size and recipe.optimizer == first.optimizer
    heir.write_text(f"base: {base.name}\nmodel:\n  num_heads: 7\n  hiden: 1\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe(heir, ["optimizer.lr=-1"])
    assert f"{heir}:4:3: model.hiden: unknown key" in str(error.value)
    assert f"{heir}:3:3: model.hidden_size={first.model.hidden_size} is not divisible" in str(error.value)
    assert "--optimizer.lr=-1: " in str(error.value)
    base.write_text(base.read_text(encoding="utf-8").replace("seed:", "sead:") + "\nsead: 1\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"{base}:\d+:1: sead: unknown key"):
        load_recipe(heir)


def test_recipe_that_starts_from_itself_or_from_nothing_is_refused(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("base: second.yaml\n")
    second.write_text("base: first.yaml\n")
    with pytest.raises(UserError, match="starts from itself: first.yaml -> second.yaml -> first.yaml"):
        load_recipe(first)
    second.write_text("base: secnd.yaml\n")
    with pytest.raises(UserError, match=r"second.yaml:1:1: base: recipe .*secnd.yaml does not exist; did you mean"):
        load_recipe(second)


def test_unknown_key_names_the_nearest_one_with_its_position(write):
    path = write(("text_slots: 16", "text_slost: 16"))
    message = message_of(path)
    assert f"{path}:8:3: tokens.text_slost: unknown key; did you mean 'text_slots'?" in message
    assert f"{path}:5:1: tokens.text_slots: missing" in message


def test_key_in_the_wrong_section_is_pointed_to_the_right_one(write):
    path = write(("name: debug\n", "name: debug\nlr: 1e-3\n"))
    assert f"{path}:2:1: lr: unknown key; did you mean 'optimizer.lr'?" in message_of(path)


def test_duplicate_key_is_refused_with_both_places(write):
    path = write(("name: debug\n", "name: debug\nname: other\n"))
    assert message_of(path) == f"{path}:2:1: name: given twice (first in line 1); keep one of the two"


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("num_layers: 4", "num_layers: four", "4:9: model.num_layers: should be an integer; found \"four\""),
        ("num_layers: 4", "num_layers: true", "4:9: model.num_layers: should be an integer; found true"),
        ("num_layers: 4", "num_layers: 4.0", "4:9: model.num_layers: should be an integer; found 4.0"),
        ("num_layers: 4", "num_layers: 0", "4:9: model.num_layers: should be greater than 0; found 0"),
        ("lr: 1e-3", "lr: .inf", "14:13: optimizer.lr: should be a finite number"),
        ("lr: 1e-3", "lr:", "14:13: optimizer.lr: should be a number; found null"),
        ("[8, 8]", "[8, -8]", "9:13: tokens.grid[1]: should be greater than 0; found -8"),
        ("[8, 8]", "[8, 8, 8]", "9:3: tokens.grid: should have 2 items"),
        ("[8, 8]", "[8]", "tokens.grid[1]: missing"),
        ("data: {train: shards}", "data: shards", "12:1: data: should be a section of keys"),
        ("{train: shards}", "{train: shards, directions: up}", "should be 'both', 'alternate' or 'answer'; found \"up\""),
    ],
)
def test_wrong_values_are_named_with_key_place_and_value(write, old, new, expected):
    assert expected in message_of(write((old, new)))


def test_all_kinds_of_problems_come_in_one_error_in_order(write):
    path = write(
        ("num_heads: 4", "num_heads: 5, windows: 3"),
        ("grid: [8, 8]", "grid: 8\n  grid: [8, 8]"),
        ("warmup_steps: 10", "warmup_steps: 1000"),
        ("train: shards", "trian: shards"),
    )
    lines = message_of(path).splitlines()
    assert lines[0].startswith("7 problems in recipe ")
    keys = ["num_heads=5", "model.windows", "tokens.grid: should be a list", "tokens.grid: given twice", "data.trian"]
    for key in keys:
        assert any(key in line for line in lines), key
    positions = [int(line.split(f"{path}:")[1].split(":")[0]) for line in lines[1:]]
    assert positions == sorted(positions)


def test_cross_rules_are_checked_beside_a_broken_key(write):
    message = message_of(write(("text_vocab_size: 1000", "text_vocab_size: many"), ("num_heads: 4", "num_heads: 5")))
    assert "text_vocab_size: should be an integer" in message
    assert "model.hidden_size=64 is not divisible by model.num_heads=5; use 1, 2, 4 or 8 heads" in message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model: [1, 2", "this is not YAML"),
        ("a: b: c", "1:5: this is not YAML"),
        ("\tname: x", "1:1: this is not YAML"),
        ("", "is empty"),
        ("- a\n- b", "a recipe is a mapping"),
        ("a: &a [*a]", "alias"),
        ("name: !!python/object/apply:os.system [ls]", "problems in recipe"),
        ("name: a\x00b", "this is not YAML"),
    ],
)
def test_files_that_are_no_recipe_are_refused_in_one_sentence(tmp_path, text, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert expected in message_of(path)


def test_binary_file_folder_and_missing_file_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00binary")
    assert "cannot be read" in message_of(path)
    assert "cannot be read" in message_of(tmp_path)
    missing = tmp_path / "recipe.yml"
    assert message_of(missing) == f"recipe {missing} does not exist; did you mean 'recipe.yaml'?"


def test_overrides_replace_values_and_create_sections(write):
    recipe = load_recipe(write(), ["--optimizer.lr=1e-4", "seed=7", "tokens.grid=[4, 4]", "loss.text_weight=2"])
    assert (recipe.optimizer.lr, recipe.seed, recipe.tokens.grid, recipe.loss.text_weight) == (1e-4, 7, (4, 4), 2.0)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("--optimizer.lrr=1", "--optimizer.lrr=1: optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("--optimizer.lr=fast", "--optimizer.lr=fast: optimizer.lr: should be a number; found \"fast\""),
        ("--tokens.grid=[8, x]", "--tokens.grid=[8, x]: tokens.grid[1]: should be an integer"),
        ("--name.first=x", "--name.first=x: name: is a value, it has no key 'first'"),
        ("--model.num_heads=5", "--model.num_heads=5: model.hidden_size=64 is not divisible by model.num_heads=5"),
        ("--tokens.grid=[8", "is not a YAML value"),
        ("optimizer.lr", "is no override; write --section.key=value"),
    ],
)
def test_errors_of_overrides_name_the_flag(write, override, expected):
    assert expected in message_of(write(), [override])


def test_same_override_twice_is_refused(write):
    assert "given twice on the command line" in message_of(write(), ["--seed=1", "--seed=2"])


def test_command_line_is_split_into_overrides_and_the_rest():
    overrides, rest = take_overrides(["r.yaml", "--optimizer.lr=1", "--out=x", "--seed=3", "-n", "2", "a.b=c"])
    assert overrides == ["--optimizer.lr=1", "--seed=3"]
    assert rest == ["r.yaml", "--out=x", "-n", "2", "a.b=c"]


CROSS_RULES = [
    ("--model.num_heads=30 --model.hidden_size=60 --parallel.tensor=4", "use 2, 3, 5 or 6", 4),
    ("--model.conv_size=10", "use 9 or 11", None),
    ("--parallel.engine=torch", "parallel.engine=torch runs one process, but there are 2", 2),
    ("--parallel.engine=torch --parallel.tensor=2", "parallel.tensor=2 needs parallel.engine=deepspeed", None),
    ("--parallel.pipeline=5", "parallel.pipeline=5 stages, but model.num_layers=4; use at most 4", None),
    ("--parallel.tensor=2", "3 processes are not divisible by parallel.tensor=2 x parallel.pipeline=1", 3),
    ("--parallel.sequence=true", "parallel.tensor=1; use false, or parallel.tensor of 2 or more", None),
    ("--parallel.sequence=true --parallel.tensor=2 --tokens.text_slots=15", "use tokens.text_slots=16, or false", 2),
    ("--parallel.recompute_every=2", "but parallel.recompute=none; use 1, or parallel.recompute=full", None),
    ("--parallel.recompute=full --parallel.recompute_every=5", "use 1 to 4, or parallel.recompute=none", None),
    ("--samples.every_steps=5 --samples.prompts=[a] --parallel.pipeline=2", "stages of parallel.pipeline=2", None),
    ("--batch.global_size=18", "batch.micro_size=4; use 16 or 20", None),
    ("--batch.global_size=12", "batch.micro_size=4 x 2 data-parallel ranks; use 8 or 16", 2),
    ("--batch.global_size=2", "use 4", None),
    ("--parallel.tensor=4 --tokens.text_vocab_size=1001", "use 1004", 4),
    ("--parallel.tensor=4 --tokens.image_vocab_size=511", "use parallel.tensor=1", 4),
    ("--parallel.tensor=4 --tokens.image_vocab_size=510", "use parallel.tensor=1 or 2", 4),
    ("--schedule.warmup_steps=101", "use at most 100", None),
    ("--tokens.image_vocab_size=65537", "use at most 65536", None),
    ("--tokens.text_slots=1", "use 2 or more", None),
    ("--tokens.text_vocab_size=4", "use 5 or more", None),
    ("--loss.text_weight=0 --loss.image_weight=0", "nothing would be learnt", None),
    ("--data.text_to_image_fraction=1 --loss.image_weight=0", "the weight of its loss is 0", None),
    ("--data.directions=answer --loss.text_weight=0", "data.directions: answer has no other loss", None),
    ("--samples.every_steps=5", "samples.prompts is empty", None),
    ("--samples.top_k=513", "use 0 to keep all codes", None),
]


@pytest.mark.parametrize("overrides, expected, world_size", CROSS_RULES)
def test_cross_rule_names_values_and_what_would_work(write, overrides, expected, world_size):
    assert expected in message_of(write(), overrides.split(), world_size=world_size)


@pytest.mark.parametrize("setting", ['"zero_hpz_partition_size": 2', '"zero_quantized_gradients": true'])
def test_settings_that_group_neighbouring_ranks_are_refused_with_tensor_ranks(write, tmp_path, setting):
    path = write(stage=3)
    file = tmp_path / "zero3.json"
    file.write_text(f'{{"zero_optimization": {{"stage": 3, {setting}}}}}')
    assert load_recipe(path, world_size=4).parallel.tensor == 1
    message = message_of(path, ["--parallel.tensor=2"], world_size=4)
    given = setting.replace('"', "").replace(": ", "=")
    assert f"--parallel.tensor=2: parallel.tensor=2 cannot be joined with {given} of {file}" in message
    assert "use parallel.tensor=1" in message


@pytest.mark.parametrize("stage", [2, 3])
def test_pipeline_with_high_zero_stage_is_refused(write, stage):
    message = message_of(write(stage=stage), ["--parallel.pipeline=2"])
    assert f"parallel.pipeline=2 cannot be joined with ZeRO stage {stage}" in message


def test_fused_blocks_are_refused_where_nothing_would_be_fused(write):
    assert "parallel.compile=true fuses nothing under ZeRO stage 3" in message_of(write(stage=3), ["--parallel.compile=true"])
    assert load_recipe(write(stage=2), ["--parallel.compile=true"]).parallel.compile


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_needs_zero_one(write, precision):
    path = write(("precision: fp32", f"precision: {precision}"), stage=0)
    assert f"{path}:3:1: precision={precision} needs ZeRO stage 1 or more" in message_of(path)


def test_the_torch_engine_takes_bf16_but_not_fp16_which_needs_loss_scaling(write):
    path = write(stage=0)
    assert load_recipe(path, ["--parallel.engine=torch", "--precision=bf16"]).precision == "bf16"
    assert "needs DeepSpeed's loss scaling" in message_of(path, ["--parallel.engine=torch", "--precision=fp16"])


def test_sample_sheets_of_weights_that_zero_three_cuts_up_are_refused(write):
    drawn = ["--samples.every_steps=5", "--samples.prompts=[a cat]"]
    assert "which ZeRO stage 3 of" in message_of(write(stage=3), drawn)
    assert load_recipe(write(stage=1), drawn).samples.every_steps == 5


def test_missing_deepspeed_file_is_a_problem_of_its_key(write):
    path = write()
    message = message_of(path, ["--parallel.deepspeed=nowhere/zero1.json", "--seed=-1"])
    assert "--parallel.deepspeed=nowhere/zero1.json: parallel.deepspeed file nowhere/zero1.json does not" in message
    assert "--seed=-1: seed: should be greater than or equal to 0" in message


def test_recipe_of_another_machine_is_read_without_cross_checks(write):
    recipe = load_recipe(write(), ["--parallel.deepspeed=nowhere/zero1.json"], cross_checks=False)
    assert recipe.parallel.deepspeed == Path("nowhere/zero1.json")


def test_check_recipe_finds_nothing_in_a_sound_recipe(write):
    recipe = load_recipe(write())
    assert check_recipe(recipe, world_size=2, deepspeed={"zero_optimization": {"stage": 1}}) == []
    assert len(check_recipe(recipe, world_size=3)) == 1


def test_reading_recipes_needs_neither_torch_nor_deepspeed(repository):
    code = "import sys, vilg.config, vilg.__main__; print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, check=True)
    assert result.stdout.strip() == "[]"
