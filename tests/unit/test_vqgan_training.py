"""Training an image tokenizer: what comes out, reproducibly, and what a user may do wrong."""

import json
import math

import numpy as np
import pytest
import torch

from tests.vqgan_support import SMALL, pictures, small_recipe, write_shards
from vilg.errors import UserError
from vilg.tokens.vqgan import ImageTokenizer, loop, objective, train
from vilg.tokens.vqgan.config import (
    ImageTokenizerConfig,
    ImageTokenizerRecipe,
    ReconstructionLossConfig,
    dump_tokenizer_recipe,
    load_tokenizer_recipe,
)
from vilg.tokens.vqgan.evaluate import evaluate
from vilg.tokens.vqgan.losses import code_use, psnr_db, reconstruction_loss

HERE = loop.Place(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("raw"), pictures(200))


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train.run(small_recipe(steps=150, lr=1e-2, sheet_every=100), shards, out, HERE)
    return out


def test_a_finished_folder_holds_tokenizer_figures_and_sheets(trained):
    names = {p.name for p in trained.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "recipe.yaml", "metrics.json", "metrics.jsonl", "recon.png",
        "recon_000100.png",
    }  # fmt: skip
    metrics = json.loads((trained / "metrics.json").read_text())
    tokenizer = ImageTokenizer.load(trained)
    assert metrics["hash"] == tokenizer.hash
    assert {k: metrics[k] for k in ("codebook_size", "num_images", "steps")} == {
        "codebook_size": 32, "num_images": 16, "steps": 150,
    }  # fmt: skip
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 151, 10))


def test_training_learns_and_the_figures_are_of_the_saved_tokenizer(shards, trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["psnr_db"] > lines[0]["psnr_db"] + 5
    metrics = json.loads((trained / "metrics.json").read_text())
    data = loop.ImageData.read(shards, small_recipe())
    again = evaluate(ImageTokenizer.load(trained), data.held_back, HERE.device)
    assert again == {k: metrics[k] for k in again}
    assert metrics["psnr_db"] > 13 and metrics["codebook_used"] > 12 and 8 < metrics["perplexity"] <= 32


def test_the_seed_decides_the_tokenizer(shards, tmp_path):
    data = loop.ImageData.read(shards, small_recipe())
    hashes = [loop.train(small_recipe(seed=s, steps=12), data, tmp_path, HERE).hash for s in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_diverging_loss_stops_the_training(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(objective, "reconstruction_loss", lambda output, images, config: output.sum() * math.nan)
    data = loop.ImageData.read(shards, small_recipe())
    with pytest.raises(UserError, match="step 1: loss nan.*lower train.lr"):
        loop.train(small_recipe(), data, tmp_path, HERE)


def arguments(shards, out, *more):
    settings = [
        "model.image_size=16",
        "model.num_codes=32",
        "model.code_dim=8",
        "model.encoder_width=16",
        "train.steps=4",
    ]
    settings += ["model.decoder_width=16", "model.decoder_blocks=1", "train.batch_size=8", "train.held_back=16"]
    return [
        "--data",
        str(shards),
        "--out",
        str(out),
        "--device",
        "cpu",
        *(a for s in settings for a in ("--set", s)),
        *more,
    ]


def test_the_command_runs_once_and_knows_its_finished_work(shards, tmp_path, capsys):
    out = tmp_path / "tokenizer"
    assert train.main(arguments(shards, out)) == 0
    assert "held-back images: psnr" in capsys.readouterr().out
    before = (out / "metrics.json").read_bytes()
    assert train.main(arguments(shards, out)) == 0
    assert "nothing to do" in capsys.readouterr().out and (out / "metrics.json").read_bytes() == before
    with pytest.raises(UserError, match="of another recipe.*--overwrite"):
        train.main(arguments(shards, out, "--set", "seed=5"))
    other = write_shards(tmp_path / "other", pictures(60))
    with pytest.raises(UserError, match="of other data.*--overwrite"):
        train.main(arguments(other, out))
    assert train.main(arguments(shards, out, "--set", "seed=5", "--overwrite")) == 0
    assert json.loads((out / "metrics.json").read_text())["recipe"]["seed"] == 5
    written = load_tokenizer_recipe(out / "recipe.yaml")
    assert written.seed == 5 and written.train.steps == 4


def test_an_interrupted_training_leaves_no_tokenizer_and_starts_anew(shards, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "train", interrupted)
        assert train.main(arguments(shards, tmp_path)) == 130
    assert "starts the training anew" in capsys.readouterr().err
    with pytest.raises(UserError):
        ImageTokenizer.load(tmp_path)
    assert train.main(arguments(shards, tmp_path)) == 0
    ImageTokenizer.load(tmp_path)


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_folder_of_another_kind_is_not_written_over(shards, tmp_path, more):
    (tmp_path / "config.json").write_text('{"format": "vilg-export"}')
    with pytest.raises(UserError, match="'format' is 'vilg-export'"):
        train.main(arguments(shards, tmp_path, *more))


def test_a_gpu_that_is_not_there_and_an_uneven_batch_are_refused(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="no GPU of its own"):
        train.main([*arguments(shards, tmp_path), "--device", "cuda"])
    place = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "17000"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="train.batch_size=8 is not a multiple of the 3 processes"):
        train.main(arguments(shards, tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "three")
    with pytest.raises(UserError, match="WORLD_SIZE='three' in the environment should be a whole number"):
        train.main(arguments(shards, tmp_path))


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    recipe = small_recipe(steps=100, warmup_steps=10, lr=1.0)
    rates = [loop.learning_rate(step, recipe) for step in range(101)]
    assert max(rates) == pytest.approx(1, abs=0.03) and rates.index(max(rates)) == 10
    assert rates[0] < 0.1 and rates[100] == pytest.approx(0)


def test_reconstruction_loss_adds_its_terms():
    output, images = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    # error -1, 0, 0, 0: mean |e| = mean e^2 = 1/4; of two differences along each axis one is 1: 1/2 each
    config = ReconstructionLossConfig(l1=1, gradient=10, mse=100)
    assert reconstruction_loss(output, images, config).item() == pytest.approx(0.25 + 10 * 1.0 + 100 * 0.25)
    assert reconstruction_loss(images, images, config).item() == 0


def test_measures():
    assert psnr_db(0.04) == pytest.approx(20)
    assert code_use(torch.tensor([5, 0, 5, 5, 5])) == (4, pytest.approx(4))
    assert code_use(torch.tensor([9, 0, 0])) == (1, pytest.approx(1))
    tokenizer = ImageTokenizer(SMALL).eval()
    torch.nn.init.zeros_(tokenizer.decoder.head.weight)
    torch.nn.init.zeros_(tokenizer.decoder.head.bias)  # grey 128 everywhere
    result = evaluate(tokenizer, np.full((70, 16, 16, 3), 118, np.uint8), HERE.device)
    assert result["psnr_db"] == pytest.approx(20 * math.log10(255 / 10)) and result["num_images"] == 70


def test_a_recipe_round_trips_through_yaml(tmp_path):
    recipe = load_tokenizer_recipe(None, ["model.num_codes=64", "train.lr=1e-3", "loss.mse=0", "model.lookup=cosine"])
    assert (recipe.model.num_codes, recipe.train.lr, recipe.loss.mse, recipe.model.lookup) == (64, 1e-3, 0, "cosine")
    (tmp_path / "r.yaml").write_text(dump_tokenizer_recipe(recipe))
    assert load_tokenizer_recipe(tmp_path / "r.yaml") == recipe
    (tmp_path / "empty.yaml").write_text("")
    assert load_tokenizer_recipe(tmp_path / "empty.yaml") == ImageTokenizerRecipe()


def test_all_mistakes_of_a_recipe_are_named_with_their_place(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("seed: 1\nmodel:\n  num_code: 64\n  factor: 5\ntrain:\n  steps: many\n")
    with pytest.raises(UserError) as error:
        load_tokenizer_recipe(path, ["train.lr=-1", "loss.sharpness=2"])
    message = str(error.value)
    assert "r.yaml:3:3: model.num_code: unknown key; did you mean 'num_codes'?" in message
    assert "r.yaml:6:3: train.steps" in message and "'many'" in message
    assert "--set train.lr=-1: train.lr: should be greater than 0" in message
    assert "--set loss.sharpness=2: loss.sharpness: unknown key; valid here: l1, gradient, mse" in message


@pytest.mark.parametrize("override", ["train.lr", "=3", "seed.x=1", "train.lr=[1"])
def test_settings_that_are_none_are_refused(override, tmp_path):
    (tmp_path / "r.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError):
        load_tokenizer_recipe(tmp_path / "r.yaml", [override])


@pytest.mark.parametrize("settings, message", [({"image_size": 30}, "not a multiple"), ({"num_codes": 65537}, "65536")])
def test_shapes_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageTokenizerConfig(**settings)
