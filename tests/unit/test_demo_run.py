"""The demo's stages: run once, kept when nothing changed, run again when something did."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vilg.demo.run import Stage, main, precision_option, read_train_recipe, recipes_folder, run_stages, stages
from vilg.errors import UserError
from vilg.parallel import precision

VERSION = ("vilg", "--version")


def plan(tmp_path: Path) -> list[Stage]:
    recipe = tmp_path / "recipe.yaml"
    if not recipe.exists():
        recipe.write_text("a: 1\n")
    second = Stage("second", "Second", VERSION, (recipe,))
    return [Stage("first", "First", VERSION), second, Stage("third", "Third", VERSION)]


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
    for stage in stages(tmp_path, recipes_folder(scale), seed=0, processes=2, prompts=["a", "b"]):
        assert stage.command[0] in ("vilg", "torchrun")
        for recipe in stage.recipes:
            assert recipe.is_file()


@pytest.mark.parametrize("flags, option", [
    ("flags : fpu avx2 avx512_bf16 erms", ()),
    ("Features : fp asimd bf16", ()),
    ("flags : fpu avx2", ("--precision=fp32",)),
])  # fmt: skip
def test_training_is_fp32_where_bf16_would_be_emulated(flags, option, tmp_path, monkeypatch, capsys):
    processor = tmp_path / "cpuinfo"
    processor.write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(precision.computes_bf16, "__defaults__", (processor,))
    monkeypatch.setattr(precision.torch.cuda, "is_available", lambda: False)
    recipe = read_train_recipe(recipes_folder("demo"), 2)
    assert precision_option(recipe) == option
    assert ("training in fp32" in capsys.readouterr().out) == bool(option)
    plan = stages(tmp_path, recipes_folder("demo"), seed=0, processes=2, prompts=["a"], training=option)
    assert [set(option) <= set(stage.command) for stage in plan if stage.name == "train"] == [True]


def test_a_stage_whose_product_was_deleted_runs_again(tmp_path, capfd):
    product = tmp_path / "product"
    product.touch()
    kept = [Stage("first", "First", VERSION, makes=product)]
    run_stages(kept, tmp_path / "stages.json")
    capfd.readouterr()
    product.unlink()
    with pytest.raises(UserError, match="stage 'first' was stopped before it was through"):
        run_stages(kept, tmp_path / "stages.json")
    assert ran(capfd.readouterr().out) == ["First"]


@pytest.mark.parametrize(
    ("scale", "processes"), [("demo", 2), ("demo-fast", 2), ("demo-gpu-48", 1), ("demo-gpu-64", 1)]
)
def test_every_scale_trains_on_its_default_number_of_processes_and_names_prompts(
    repository, monkeypatch, scale, processes
):
    monkeypatch.chdir(repository)
    assert len(read_train_recipe(recipes_folder(scale), processes).samples.prompts) >= 2


@pytest.mark.parametrize(
    ("options", "message"), [("--processes 0", "--processes 0"), ("--processes 3", "batch.global_size")]
)
def test_processes_that_training_cannot_use_are_refused_before_the_first_stage(
    repository, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(repository)
    with pytest.raises(UserError, match=message):
        main([*options.split(), "--out", str(tmp_path / "demo")])
    assert not (tmp_path / "demo").exists()


def test_the_demo_says_where_to_run_it_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run this in"):
        main(["--fast"])
    assert not (tmp_path / "runs").exists()


SLOW_TO_STOP = """
import signal, sys, time
from pathlib import Path
def stop(*_):
    time.sleep(1)  # saving
    Path({saved!r}).touch()
    sys.exit(1)
signal.signal(signal.SIGINT, stop)
Path({started!r}).touch()
time.sleep(60)
"""
WAITING = """
import subprocess, sys
from vilg.demo.run import _wait
_wait(subprocess.Popen([sys.executable, {script!r}]))
"""


def test_an_interrupted_demo_waits_until_its_stage_has_saved(tmp_path):
    """As a terminal does it: Ctrl-C goes to the demo and its stage at once; the stage takes a while to end in order."""
    saved, started, script = (tmp_path / name for name in ("saved", "started", "stage.py"))
    script.write_text(SLOW_TO_STOP.format(saved=str(saved), started=str(started)))
    command = [sys.executable, "-c", WAITING.format(script=str(script))]
    demo = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if started.exists():
            break
        time.sleep(0.05)
    os.killpg(demo.pid, signal.SIGINT)
    demo.wait(timeout=60)
    assert saved.exists()
