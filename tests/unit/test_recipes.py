"""Every shipped recipe loads, keeps all cross rules, and survives being written out and read again."""

from pathlib import Path

import pytest

from vilg.config import dump_recipe, load_recipe, merged_deepspeed_config

ROOT = Path(__file__).resolve().parents[2]
# Beside a demo's train.yaml lie the settings of other commands, which their own tests read.
OTHER_SETTINGS = ("scenes.yaml", "image_tokenizer.yaml", "ingest.yaml")
RECIPES = sorted(path for path in (ROOT / "launch").rglob("*.yaml") if path.name not in OTHER_SETTINGS)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    """Recipes name `ds_configs/...` relative to the clone's root, from which users start."""
    monkeypatch.chdir(ROOT)


def test_there_are_recipes():
    assert any(path.name == "debug.yaml" for path in RECIPES)


# Number of GPUs that a recipe is for, as docs/recipes.md says.
GPUS = {"300m": (1, 8, 64, 256), "1b": (1, 8, 64, 256), "10b": (8, 64, 256), "10b-tensor4": (8, 64, 256)}
GPUS["10b-tensor4-pipe4"] = (64, 256)
GPUS |= dict.fromkeys(("tune-caption", "tune-image", "tune-answer"), (1, 8, 64))


@pytest.mark.parametrize(("name", "gpus"), [(name, gpus) for name, counts in GPUS.items() for gpus in counts])
def test_large_recipe_is_sound_for_the_gpus_it_is_made_for(name, gpus):
    load_recipe(f"launch/recipes/{name}.yaml", world_size=gpus)


def test_the_10b_recipes_are_one_model_in_three_mixes():
    recipes = [load_recipe(f"launch/recipes/{name}.yaml") for name in GPUS if name.startswith("10b")]
    first = recipes[0]
    assert (first.model.num_layers, first.model.hidden_size, first.model.num_heads) == (48, 4096, 64)
    assert all((r.model, r.tokens, r.data, r.optimizer) == (first.model, first.tokens, first.data, first.optimizer) for r in recipes)
    assert len({(r.parallel.deepspeed, r.parallel.tensor, r.parallel.pipeline) for r in recipes}) == len(recipes) == 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_recipe_is_sound(path, tmp_path):
    recipe = load_recipe(path)
    if recipe.parallel.engine == "deepspeed":
        merged_deepspeed_config(recipe, data_size=1)
    written = tmp_path / "config.yaml"
    written.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(written) == recipe
