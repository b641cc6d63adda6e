"""A run trained end to end, by its commands: stopped and continued, moved to another layout, inspected, exported, drawn from."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.distributed.helpers import run_distributed
from tests.distributed.resume_support import Job, Layout, branch, latest, train_jobs
from tests.golden.make import DEBUG_RECIPE, make_data, read_losses
from vilg.__main__ import main as vilg
from vilg.checkpoint.reconstructor_file import kept_weights, read_reconstructor_file
from vilg.data.tokenize import main as tokenize
from vilg.data.writer import ShardWriter
from vilg.inference.decode import decode_pictures
from vilg.inference.load import load_model

TORCH, SECTION = Layout(engine="torch"), "model.reconstructor."
RECIPE = {
    "schedule.steps": 6, "schedule.warmup_steps": 2, "checkpoint.every_steps": 3, "checkpoint.keep_last": 9,
    "logging.tensorboard": "false", "model.num_layers": 2, "model.hidden_size": 32, "data.text_to_image_fraction": 0.7,
    f"{SECTION}ramp_steps": 4, f"{SECTION}lr": 1e-3, f"{SECTION}ema": 0.5, f"{SECTION}adversarial.weight": 0.5,
    f"{SECTION}adversarial.start_step": 2, f"{SECTION}adversarial.r1_every": 2, f"{SECTION}adversarial.width": 8,
    f"{SECTION}adversarial.layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def common(session_tmp):
    """The golden data's tokenizers, and token shards of random pictures with their images."""
    folder = session_tmp / "end-to-end-data"
    folder.mkdir()
    made, draw = make_data(folder), np.random.default_rng(0)
    with ShardWriter(folder / "raw" / "00000.tar") as shard:
        for number in range(48):
            content = io.BytesIO()
            pixels = np.repeat(np.repeat(draw.integers(0, 256, (4, 4, 3), np.uint8), 8, 0), 8, 1)
            Image.fromarray(pixels).save(content, "PNG")
            shard.write(f"{number:06d}", {"png": content.getvalue(), "txt": b"a red horse", "json": b"{}"})
    arguments = ["--image-model", str(folder / "image"), "--out", str(folder / "pictures"), "--store-images"]
    assert tokenize([str(folder / "raw"), *arguments, "--processes", "1"]) == 0
    return {**made, "data.train": str(folder / "pictures"), **RECIPE}


@pytest.fixture(scope="module")
def unbroken(common, session_tmp):
    """Six steps of one process."""
    run = session_tmp / "end-to-end" / "run"
    overrides = {**common, **TORCH.overrides(), "run_dir": run}
    assert vilg(["train", str(DEBUG_RECIPE), *(f"--{key}={value}" for key, value in overrides.items())]) == 0
    return run


def start(layout: Layout, common, run, **how) -> list[str | None]:
    """Errors of one start of a run, one per rank."""
    job = Job({**common, **layout.overrides(), "run_dir": run}, **how)
    return [errors[0] for errors in run_distributed(layout.processes, train_jobs, ([job],), init=False)]


def test_a_stopped_run_continues_with_the_same_numbers_in_every_digit(common, unbroken, session_tmp):
    run = session_tmp / "end-to-end" / "stopped"
    assert start(TORCH, common, run, stop_after=3) == [None]
    assert start(TORCH, common, run) == [None]
    assert read_losses(run) == read_losses(unbroken)
    found, wanted = (read_reconstructor_file(latest(path)) for path in (run, unbroken))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", [Layout(data=2, zero=3), Layout(pipeline=2, zero=1)], ids=lambda layout: layout.name)
def test_a_run_moves_to_another_layout_with_reconstructor_and_discriminator(common, unbroken, session_tmp, layout):
    run = branch(unbroken, "step_00000003", session_tmp / "end-to-end" / layout.name)
    assert start(layout, common, run) == [None] * layout.processes
    assert read_losses(run) == pytest.approx(read_losses(unbroken), rel=1e-4)
    found, wanted = (read_reconstructor_file(latest(path)) for path in (run, unbroken))
    for name in kept_weights(wanted):
        key = f"reconstructor.ema.{name}"
        assert torch.allclose(found[key], wanted[key], rtol=1e-3, atol=1e-4), name


def test_metrics_hold_what_end_to_end_training_looks_at(unbroken):
    rows = [json.loads(line) for line in (unbroken / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["reconstruction_loss"] > 0 and rows[-1]["balance"] > 0 and rows[-1]["discriminator_grad_norm"] > 0


def test_an_export_draws_from_hidden_states_and_from_the_codebook(unbroken, session_tmp, capsys):
    out = session_tmp / "end-to-end" / "export"
    assert vilg(["export", str(unbroken), "--out", str(out)]) == 0
    bundle = load_model(out)
    ids, codes = bundle.encode_prompt("a red horse"), torch.randint(0, 512, (1, 64))
    hidden, codebook = (decode_pictures(bundle, [ids], codes, decode=decode) for decode in ("hidden", "codebook"))
    assert hidden.shape == codebook.shape == (1, 32, 32, 3) and not np.array_equal(hidden, codebook)
    kept = kept_weights(read_reconstructor_file(latest(unbroken)))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in bundle.reconstructor.state_dict().items())
    pictures = {}
    for decode in ("auto", "hidden", "codebook"):
        folder = session_tmp / "end-to-end" / decode
        options = ["--prompt", "a red horse", "--num", "1", "--decode", decode, "--out", str(folder)]
        assert vilg(["generate", "--model", str(out), *options]) == 0
        pictures[decode] = np.asarray(Image.open(folder / "0000_00.png"))
    assert np.array_equal(pictures["auto"], pictures["hidden"])
    assert not np.array_equal(pictures["auto"], pictures["codebook"])


def test_inspect_names_the_reconstructor(unbroken, capsys):
    assert vilg(["inspect", str(unbroken)]) == 0
    assert "reconstructor: " in capsys.readouterr().out
