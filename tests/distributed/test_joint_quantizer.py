"""The image tokenizer trained beside the model: under layouts of each kind, and in whole runs by their commands."""

import json

import numpy as np
import pytest
import torch

from tests.distributed.end_to_end_support import SECTION, TORCH, make_pictures, start
from tests.distributed.parity import Case, reference, run_cases
from tests.distributed.resume_support import Layout, branch, differing, latest
from tests.distributed.test_end_to_end import expect_same
from tests.golden.make import DEBUG_RECIPE, read_losses
from vilg.__main__ import main as vilg
from vilg.checkpoint.reconstructor_file import read_reconstructor_file, trained_tokenizer
from vilg.checkpoint.state import read_state
from vilg.config.schema import DataConfig
from vilg.data.loader import open_data
from vilg.inference.load import load_model
from vilg.tokens.vqgan import ImageTokenizer, ImageTokenizerConfig
from vilg.tokens.vqgan.images import decode_image, to_float

MODEL, STEPS = "joint quantizer", 4
CASES = [
    Case(Layout(data=2, zero=3), model=MODEL),
    Case(Layout(tensor=2, zero=1), sequence=True, model=MODEL),
    Case(Layout(pipeline=2, zero=1), model=MODEL),
]
MORE_CASES = [
    Case(Layout(data=2, zero=1), model=MODEL),
    Case(Layout(data=2, zero=2), model=MODEL),
    Case(Layout(tensor=2, data=2, zero=1), model=MODEL),
    Case(Layout(pipeline=2, data=2), model=MODEL),
    Case(Layout(pipeline=2, tensor=2, zero=1), model=MODEL),
]
JOINT = f"{SECTION}joint_quantizer."
RECIPE = {f"{JOINT}lr": 1e-2, f"{JOINT}decay": 0.9}


@pytest.fixture(scope="module")
def outcomes():
    return run_cases(CASES, steps=STEPS)


@pytest.fixture(scope="module")
def wanted():
    return reference(MODEL, steps=STEPS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_trains_the_tokenizer_as_one_process_does(outcomes, wanted, case):
    expect_same(outcomes[case], wanted)


@pytest.mark.slow
def test_more_layouts_train_the_same(wanted):
    for ranks in run_cases(MORE_CASES, steps=STEPS).values():
        expect_same(ranks, wanted)


@pytest.fixture(scope="module")
def common(session_tmp):
    """Pictures tokenized by a network of random weights whose codes differ from each other."""
    torch.manual_seed(1)
    shape = dict(encoder_width=16, decoder_width=16, decoder_blocks=1, code_dim=8, num_codes=512)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(image_size=32, factor=4, **shape))
    tokenizer.codebook.vectors.normal_(0.0, 0.3)
    tokenizer.save(session_tmp / "joint-image")
    return make_pictures(session_tmp / "joint-data", session_tmp / "joint-image") | RECIPE


def train(common, run, *changes: str) -> int:
    overrides = {**common, **TORCH.overrides(), "run_dir": run}
    return vilg(["train", str(DEBUG_RECIPE), *(f"--{key}={value}" for key, value in overrides.items()), *changes])


@pytest.fixture(scope="module")
def unbroken(common, session_tmp):
    """Six steps of one process."""
    run = session_tmp / "joint" / "run"
    assert train(common, run) == 0
    return run


def expect_same_beside(run, other) -> None:
    found, wanted = (read_reconstructor_file(latest(path)) for path in (run, other))
    assert found.keys() == wanted.keys() and trained_tokenizer(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_codes_leave_those_of_the_shards_as_the_tokenizer_learns(unbroken):
    rows = [json.loads(line) for line in (unbroken / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["codes_changed"] == 0  # the tokenizer that made the shards, on the images that they hold
    assert rows[-1]["codes_changed"] > 0 and rows[-1]["tokenizer_grad_norm"] > 0 and rows[-1]["commitment_loss"] > 0
    assert all(1 <= row["code_perplexity"] <= row["codes_used"] for row in rows)


def test_a_stopped_run_continues_with_the_same_numbers_in_every_digit(common, unbroken, session_tmp):
    run = session_tmp / "joint" / "stopped"
    assert start(TORCH, common, run, stop_after=3) == [None]
    assert start(TORCH, common, run) == [None]
    assert read_losses(run) == read_losses(unbroken) and not differing(latest(run), latest(unbroken))
    expect_same_beside(run, unbroken)


def test_a_run_moves_to_another_layout_with_its_tokenizer(common, unbroken, session_tmp):
    run = branch(unbroken, "step_00000003", session_tmp / "joint" / "moved")
    assert start(Layout(data=2, zero=2), common, run) == [None, None]
    assert read_losses(run) == pytest.approx(read_losses(unbroken), rel=1e-4)
    found, wanted = (trained_tokenizer(read_reconstructor_file(latest(path))) for path in (run, unbroken))
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-4) for name in wanted)


def test_without_the_section_the_tokenizer_is_frozen_and_in_no_checkpoint(common, unbroken, session_tmp):
    run = session_tmp / "joint" / "frozen"
    assert train({k: v for k, v in common.items() if k not in RECIPE}, run) == 0
    frozen, joint = read_losses(run), read_losses(unbroken)
    assert frozen[0] == joint[0] and frozen[-1] != joint[-1]  # the first step has the same codes
    tensors = read_reconstructor_file(latest(run))
    assert not trained_tokenizer(tensors) and not any(name.startswith("image_tokenizer") for name in tensors)


def test_an_export_holds_the_trained_tokenizer_and_draws_and_writes_with_it(common, unbroken, session_tmp, capsys):
    out = session_tmp / "joint" / "export"
    assert vilg(["export", str(unbroken), "--out", str(out)]) == 0
    bundle = load_model(out)
    kept = trained_tokenizer(read_reconstructor_file(latest(unbroken)))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in bundle.image.state_dict().items())
    hash_before = read_state(latest(unbroken)).tokenizers["image"]
    named = json.loads((out / "config.json").read_text())["image_tokenizer"]["hash"]
    assert hash_before == ImageTokenizer.load(common["tokens.image_model"]).hash != bundle.image.hash == named
    described = json.loads((out / "image_tokenizer" / "config.json").read_text())["origin"]
    assert described == {"trained_on_from": hash_before, "steps": 6}
    sample = open_data(DataConfig(train=common["data.train"])).sample(0)
    codes = bundle.image.encode(to_float(decode_image(sample.image, 32)[None])).flatten()
    assert not np.array_equal(codes, sample.codes)
    for decode in ("hidden", "codebook"):
        folder = session_tmp / "joint" / decode
        options = ["--prompt", "a red horse", "--num", "1", "--decode", decode, "--out", str(folder)]
        assert vilg(["generate", "--model", str(out), *options]) == 0
    assert vilg(["caption", "--model", str(out), str(session_tmp / "joint" / "codebook" / "0000_00.png")]) == 0


def test_inspect_names_the_tokenizer(unbroken, capsys):
    assert vilg(["inspect", str(unbroken)]) == 0
    assert "image tokenizer trained too" in capsys.readouterr().out


def test_sheets_of_a_run_are_drawn_by_the_tokenizer_of_now(common, session_tmp, monkeypatch):
    from vilg.train.run import Run

    seen = []
    monkeypatch.setattr(Run, "draw_samples", lambda run: seen.append(run.sampler.image is run.engine.reconstruction.quantizer.tokenizer))
    changes = ["--samples.every_steps=1", "--samples.prompts=[a red horse]", "--schedule.steps=2"]
    assert train({k: v for k, v in common.items() if k != "schedule.steps"}, session_tmp / "joint" / "sheets", *changes) == 0
    assert seen == [True, True]
