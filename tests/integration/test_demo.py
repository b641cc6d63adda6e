"""`vilg demo --fast` from data to pictures, and every command of the README on what it leaves behind."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.test_eval_fid import StandIn

ROOT = Path(__file__).resolve().parents[2]
README_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder that looks like a clone from inside: recipes, DeepSpeed files and launch scripts, and a `.venv`."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch", "ds_configs", "Makefile", "vilg", "kernels", "requirements.txt", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    bin_folder = folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    # A link to a virtual environment's Python would not find its packages; a script does.
    for name, options in (("vilg", "-m vilg"), ("torchrun", "-m torch.distributed.run"), ("python", "")):
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {options} "$@"\n')
        script.chmod(0o755)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """That of a user in a clone, with this project's code and one thread."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}",
    }


def run(command: str, folder: Path, *, timeout: float = 600, code: int = 0) -> str:
    """Run a shell command as a user would in a clone; returns its output."""
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment(folder), timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == code, f"$ {command}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(workplace) -> tuple[Path, str]:
    """The finished fast demo and what it printed."""
    output = run("vilg demo --fast --out runs/demo", workplace)
    return workplace / "runs" / "demo", output


def test_the_demo_leaves_a_sheet_a_loss_curve_and_a_report(demo):
    folder, _ = demo
    report = json.loads((folder / "report.json").read_text())
    stages = "data text_tokenizer image_tokenizer tokenize tokenize_held_out train export evaluate generate caption".split()
    assert list(report["seconds"]) == stages
    assert 0 < report["peak_memory_gb"] < 6
    assert set(report["vq"]) == {"psnr_db", "codebook_used", "codebook_size", "perplexity"}
    for split in ("seen", "held_out"):
        assert report[split]["real"]["glyph_recall"] == report[split]["real"]["background_accuracy"] == 1.0
        assert 0 <= report[split]["reconstruction"]["glyph_recall"] <= 1
        for language in ("zh", "en"):
            figures = report[split][language]
            for key in ("caption_exact", "image_glyph_recall", "image_glyph_recall_best_of_n", "image_background_accuracy"):
                assert 0 <= figures[key] <= 1
            assert 0 < figures["nll_right"] < 10 and 0 < figures["nll_wrong_caption"] < 10
    for name in ("samples.png", "loss.png"):
        assert np.asarray(Image.open(folder / name).convert("RGB")).std() > 10


def test_the_demo_prints_each_stage_as_a_command_that_can_be_typed(demo):
    _, output = demo
    commands = [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("$ ")]
    assert len(commands) == 10
    assert {command[0] for command in commands} == {"vilg", "torchrun"}


def test_a_rerun_of_the_demo_skips_every_stage(demo, workplace):
    again = run("vilg demo --fast --out runs/demo", workplace)
    assert again.count("done before") == 10
    assert "$ " not in again


def test_the_exported_model_draws_the_same_pictures_again(demo, workplace):
    draw = "vilg generate --model runs/demo/export --prompt 'a cat on a white background' --num 3 --best 2 --seed 5 --out runs/"
    run(draw + "once", workplace)
    run(draw + "twice --batch 1", workplace)
    for name in ("0000_00.png", "0000_01.png"):
        once, twice = (Image.open(workplace / "runs" / folder / name) for folder in ("once", "twice"))
        assert np.array_equal(once, twice)
        assert once.text["prompt"] == "a cat on a white background" and once.text["seed"] == "5"
    scores = [json.loads(line) for line in (workplace / "runs/once/scores.jsonl").read_text().splitlines()]
    assert [s["score"] for s in scores] == sorted((s["score"] for s in scores), reverse=True)
    assert [s["file"] for s in scores] == ["0000_00.png", "0000_01.png", None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--prompt ''", "is empty"),
        ("--prompt '" + "猫狗" * 40 + "'", "shorten it"),
        ("", "no prompt"),
        ("--prompt a --num 0", "--num 0"),
        ("--prompt a --num 2 --best 3", "--best 3"),
        ("--prompt a --guidance -1", "guidance=-1"),
        ("--prompts missing.txt", "missing.txt"),
    ],
)
def test_generate_explains_bad_input(demo, workplace, options, message):
    output = run(f"vilg generate --model runs/demo/export {options} --out runs/bad", workplace, code=2)
    assert message in output and "Traceback" not in output
    assert not (workplace / "runs" / "bad").exists()


def test_caption_explains_a_file_that_is_no_picture(demo, workplace):
    (workplace / "not.png").write_text("hello")
    output = run("vilg caption --model runs/demo/export not.png", workplace, code=2)
    assert "not.png" in output and "Traceback" not in output


def test_the_tools_for_figures_take_what_the_commands_leave(demo, workplace):
    """rFID of the exported image tokenizer, FID of drawn pictures, and captions scored, with a stand-in network."""
    torch.jit.script(StandIn()).save(str(workplace / "network.pt"))
    real = workplace / "scored"
    real.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(real / f"{index}.png")
    fid = "vilg eval fid --real scored --inception network.pt --out fid.json "
    for options, name in (("--reconstruct runs/demo/export", "rfid"), ("runs/demo/generated", "fid")):
        run(fid + options, workplace)
        assert json.loads((workplace / "fid.json").read_text())[name] > 0
    run("vilg caption --model runs/demo/export scored/*.png > captions.jsonl", workplace)
    references = [{"image": f"{index}.png", "captions": ["a cat", "一只猫"]} for index in range(3)]
    (workplace / "references.jsonl").write_text("".join(json.dumps(line) + "\n" for line in references))
    command = "vilg eval caption captions.jsonl --references references.jsonl --no-meteor --tokenizer plain"
    assert "on characters" in run(command, workplace)


def test_another_format_version_of_an_export_is_refused(demo, workplace):
    shutil.copytree(workplace / "runs/demo/export", workplace / "runs/newer", dirs_exist_ok=True)
    config = workplace / "runs/newer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format_version": 99}))
    output = run("vilg caption --model runs/newer runs/demo/generated/0000_00.png", workplace, code=2)
    assert "format_version 99" in output


def test_every_command_of_the_readme_runs(demo, workplace):
    """`make` is checked without building; tests/slurm submits on a real SLURM what is only rendered here."""
    pictures = workplace / "my_pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for index in range(80):
        color = tuple(int(c) for c in rng.integers(0, 256, 3))
        Image.new("RGB", (40, 32), color).save(pictures / f"{index:03d}.png")
        (pictures / f"{index:03d}.txt").write_text(f"a plain picture of the colour number {index % 7}")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for block in README_BLOCK.findall(text) for line in block.splitlines() if line.strip()]
    assert len(commands) >= 10
    for command in commands:
        if "vilg serve " in command:
            serve_and_stop(command, workplace)
        else:
            run(command.replace("make ", "make --dry-run ", 1) if command.startswith("make ") else command, workplace)


def serve_and_stop(command: str, folder: Path) -> None:
    """Start the server, look at its page, and stop it with Ctrl-C, as a user would; only the port is a free one."""
    process = subprocess.Popen(
        f"exec {command} --port 0", shell=True, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert address, line + process.stdout.read()
        with urllib.request.urlopen(address[0], timeout=60) as page:
            assert "<title>vilg</title>" in page.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
