"""A run trained end to end, by its commands: stopped and continued, moved to another layout, inspected, exported, drawn from."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.distributed.end_to_end_support import TORCH, make_pictures, start
from tests.distributed.resume_support import Layout, branch, latest
from tests.golden.make import DEBUG_RECIPE, read_evaluations, read_losses
from vilg.__main__ import main as vilg
from vilg.checkpoint.reconstructor_file import kept_weights, read_reconstructor_file
from vilg.inference.decode import decode_pictures
from vilg.inference.load import load_model


@pytest.fixture(scope="module")
def common(session_tmp):
    return make_pictures(session_tmp / "end-to-end-data")


@pytest.fixture(scope="module")
def unbroken(common, session_tmp):
    """Six steps of one process."""
    run = session_tmp / "end-to-end" / "run"
    overrides = {**common, **TORCH.overrides(), "run_dir": run}
    assert vilg(["train", str(DEBUG_RECIPE), *(f"--{key}={value}" for key, value in overrides.items())]) == 0
    return run


def test_a_stopped_run_continues_with_the_same_numbers_in_every_digit(common, unbroken, session_tmp):
    run = session_tmp / "end-to-end" / "stopped"
    assert start(TORCH, common, run, stop_after=3) == [None]
    assert start(TORCH, common, run) == [None]
    assert read_losses(run) == read_losses(unbroken)
    found, wanted = (read_reconstructor_file(latest(path)) for path in (run, unbroken))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", [Layout(data=2, zero=3), Layout(tensor=2), Layout(pipeline=2, zero=1)], ids=lambda layout: layout.name)
def test_a_run_moves_to_another_layout_with_reconstructor_and_discriminator(common, unbroken, session_tmp, layout):
    run = branch(unbroken, "step_00000003", session_tmp / "end-to-end" / layout.name)
    assert start(layout, common, run) == [None] * layout.processes
    assert read_losses(run) == pytest.approx(read_losses(unbroken), rel=1e-4)
    found, wanted = read_evaluations(run), read_evaluations(unbroken)
    assert list(found) == list(wanted) == [3, 6] and "val_reconstruction_loss" in found[6]
    assert found[6] == pytest.approx(wanted[6], rel=1e-4)
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
