"""Every shipped recipe loads, keeps all cross rules, and survives being written out and read again."""

from pathlib import Path

import pytest

from vilg.config import dump_recipe, load_recipe, merged_deepspeed_config

ROOT = Path(__file__).resolve().parents[2]
# Beside a demo's train.yaml lie the settings of other commands, which their own tests read.
OTHER_SETTINGS = ("scenes.yaml", "image_tokenizer.yaml")
RECIPES = sorted(path for path in (ROOT / "launch").rglob("*.yaml") if path.name not in OTHER_SETTINGS)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    """Recipes name `ds_configs/...` relative to the clone's root, from which users start."""
    monkeypatch.chdir(ROOT)


def test_there_are_recipes():
    assert any(path.name == "debug.yaml" for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_recipe_is_sound(path, tmp_path):
    recipe = load_recipe(path)
    if recipe.parallel.engine == "deepspeed":
        merged_deepspeed_config(recipe, data_size=1)
    written = tmp_path / "config.yaml"
    written.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(written) == recipe
