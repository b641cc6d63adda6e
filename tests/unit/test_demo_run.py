"""The demo's stages: run once, kept when nothing changed, run again when something did."""

import json
from pathlib import Path

import pytest

from vilg.demo.run import Stage, recipes_folder, run_stages, stages
from vilg.errors import UserError

VERSION = ("vilg", "--version")


def plan(tmp_path: Path) -> list[Stage]:
    recipe = tmp_path / "recipe.yaml"
    if not recipe.exists():
        recipe.write_text("a: 1\n")
    return [Stage("first", "First", VERSION), Stage("second", "Second", VERSION, (recipe,)), Stage("third", "Third", VERSION)]


def ran(output: str) -> list[str]:
    """Titles of the stages that ran, from what was printed."""
    return [line.split("] ")[1] for line in output.splitlines() if "] " in line and "done before" not in line]


def test_a_rerun_skips_finished_stages_and_keeps_their_seconds(tmp_path, capfd):
    first = run_stages(plan(tmp_path), tmp_path / "stages.json")
    assert ran(capfd.readouterr().out) == ["First", "Second", "Third"]
    assert run_stages(plan(tmp_path), tmp_path / "stages.json") == first
    assert ran(capfd.readouterr().out) == []


def test_a_changed_recipe_runs_its_stage_and_all_later_ones_again(tmp_path, capfd):
    run_stages(plan(tmp_path), tmp_path / "stages.json")
    capfd.readouterr()
    (tmp_path / "recipe.yaml").write_text("a: 2\n")
    run_stages(plan(tmp_path), tmp_path / "stages.json")
    assert ran(capfd.readouterr().out) == ["Second", "Third"]


def test_a_failing_stage_is_named_and_earlier_ones_are_kept(tmp_path, capfd):
    broken = [*plan(tmp_path)[:1], Stage("broken", "Broken", ("vilg", "no-such-command"))]
    with pytest.raises(UserError, match="stage 'broken' ended with exit code 2"):
        run_stages(broken, tmp_path / "stages.json")
    assert "first" in json.loads((tmp_path / "stages.json").read_text())["stages"]


def test_state_of_another_version_is_refused(tmp_path):
    (tmp_path / "stages.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="another version"):
        run_stages(plan(tmp_path), tmp_path / "stages.json")


@pytest.mark.parametrize("scale", ["demo", "demo-fast", "demo-gpu-48", "demo-gpu-64"])
def test_every_scale_has_its_recipes(tmp_path, scale):
    for stage in stages(tmp_path, recipes_folder(scale), seed=0, processes=2):
        assert stage.command[0] in ("vilg", "torchrun")
        for recipe in stage.recipes:
            assert recipe.is_file()
