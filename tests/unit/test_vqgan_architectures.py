"""The taming and dVAE architectures, Gumbel codebooks, and training with perceptual and adversarial losses."""

import json

import numpy as np
import pytest
import torch

from tests.distributed.helpers import run_distributed
from tests.vqgan_support import SMALL, pictures, small_recipe, write_shards
from vilg.errors import UserError
from vilg.tokens.vqgan import ImageTokenizer, loop, train
from vilg.tokens.vqgan.config import (
    AdversarialConfig,
    ImageTokenizerConfig,
    QuantizerConfig,
    ReconstructionLossConfig,
    TamingConfig,
    dump_tokenizer_recipe,
    load_tokenizer_recipe,
)
from vilg.tokens.vqgan.evaluate import evaluate
from vilg.tokens.vqgan.losses import ssim
from vilg.tokens.vqgan.model import Codebook
from vilg.tokens.vqgan.quantize import GumbelQuantizer, TrainingQuantizer, training_quantizer

HERE = loop.Place(0, 1, torch.device("cpu"))


def taming(factor=4, **changes):
    levels = factor.bit_length()
    shape = {"ch": 8, "ch_mult": (1, *[2] * (levels - 1)), "num_res_blocks": 1, "z_channels": 8, "groups": 4}
    shape |= {"attn_resolutions": (16 // factor,)} | changes.pop("taming", {})
    fields = {"image_size": 16, "factor": factor, "num_codes": 32, "code_dim": 8, **changes}
    return ImageTokenizerConfig(architecture="taming", taming=TamingConfig(**shape), **fields)


def dvae(factor=4, **changes):
    small = {"image_size": 16, "num_codes": 32, "code_dim": 8, "encoder_width": 16, "decoder_width": 16}
    return ImageTokenizerConfig(architecture="dvae", factor=factor, lookup="gumbel", **{**small, **changes})


ALL = [taming(4), taming(8), taming(16), taming(4, lookup="gumbel"), taming(4, lookup="cosine"), dvae(4), dvae(8), dvae(2)]


def named(config):
    return f"{config.architecture}-f{config.factor}-{config.lookup}"


@pytest.mark.parametrize("config", ALL, ids=named)
def test_every_architecture_encodes_decodes_and_survives_the_disk(config, tmp_path):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(config).eval().requires_grad_(False)
    images = torch.rand(3, 3, 16, 32) * 2 - 1
    vectors = tokenizer.encoder(images).permute(0, 2, 3, 1).reshape(-1, 8)
    if config.lookup != "gumbel":
        tokenizer.codebook.vectors.copy_(vectors[torch.arange(32) % len(vectors)])
    codes = tokenizer.encode(images)
    side = 16 // config.factor
    assert codes.shape == (3, side, 2 * side)
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.isfinite().all()
    assert tokenizer.decoder.last_layer.shape[0] == 3
    tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    assert loaded.config == config and loaded.hash == tokenizer.hash
    assert torch.equal(loaded.encode(images), codes) and torch.equal(loaded.decode(codes), decoded)


def test_only_the_fields_of_an_architecture_are_written_so_that_older_hashes_hold(tmp_path):
    assert "taming" not in SMALL.model_dump() and "encoder_width" in SMALL.model_dump()
    written = taming().model_dump(mode="json")
    assert "encoder_width" not in written and written["taming"]["ch"] == 8
    assert ImageTokenizerConfig.model_validate_json(json.dumps(written), strict=True) == taming()
    # what was written before there were other architectures, and its hash
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(SMALL)
    assert SMALL.model_dump_json() == (
        '{"architecture":"patch","image_size":16,"factor":4,"num_codes":32,"code_dim":8,"lookup":"euclidean",'
        '"encoder_width":16,"encoder_blocks":1,"decoder_width":16,"decoder_blocks":1}'
    )
    assert tokenizer.config == SMALL


@pytest.mark.parametrize(
    "settings, message",
    [
        (["model.architecture=taming"], "the section taming belongs to architecture=taming"),
        (["model.taming.ch=64"], "the section taming belongs to architecture=taming"),
        (["model.architecture=taming", "model.taming.ch=64"], r"factor=4 is not 2\^\(levels - 1\) with the 4 levels"),
        (["model.architecture=taming", "model.taming.ch=60"], "ch=60 is not a multiple of groups=32"),
        (
            ["model.architecture=taming", "model.factor=8", "model.taming.attn_resolutions=[7]"],
            r"no level has 7 pixels a side; the levels have \[32, 16, 8, 4\]",
        ),
        (["model.architecture=taming", "model.factor=8", "model.taming.chanels=7"], "chanels: unknown key"),
        (
            ["model.architecture=taming", "model.factor=8", "model.taming.ch=32", "model.encoder_width=7"],
            "encoder_width: not of architecture=taming",
        ),
        (["model.architecture=dvae", "model.factor=3", "model.image_size=33"], "factor=3: architecture=dvae halves"),
        (["loss.adversarial.weigth=1"], "did you mean 'weight'"),
    ],
)
def test_shapes_that_do_not_fit_together_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer_recipe(None, settings)


def test_a_recipe_of_everything_round_trips(tmp_path):
    settings = [
        "model.architecture=taming", "model.factor=8", "model.taming.ch_mult=[1, 1, 2, 4]", "model.num_codes=8192",
        "model.lookup=gumbel", "loss.perceptual=1", "loss.perceptual_weights=lpips", "loss.adversarial.weight=0.8",
        "train.ema=0.999",
    ]  # fmt: skip
    recipe = load_tokenizer_recipe(None, settings)
    (tmp_path / "r.yaml").write_text(dump_tokenizer_recipe(recipe))
    assert load_tokenizer_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("lookup", ["euclidean", "cosine"])
def test_a_codebook_of_16384_codes_learns_renews_dead_codes_and_is_found_again(lookup):
    torch.manual_seed(0)
    config = SMALL.model_copy(update={"lookup": lookup, "num_codes": 16384})
    quantizer = TrainingQuantizer(config, QuantizerConfig(kmeans_steps=1), synchronise=False)
    for _ in range(3):
        quantizer(torch.randn(16, 8, 16, 16))
    codebook, vectors = Codebook(16384, 8, lookup), torch.randn(16, 8, 16, 16)
    quantizer.copy_to(codebook)
    first = codebook.nearest(vectors)
    assert torch.equal(first, quantizer.eval()(vectors)[1])
    assert len(codebook.vectors.unique(dim=0)) > 3000 and len(first.unique()) > 1000


def test_the_gumbel_quantizer_anneals_mixes_and_knows_its_divergence():
    torch.manual_seed(0)
    codebook = Codebook(16, 8, "gumbel")
    config = QuantizerConfig(temperature=1.0, last_temperature=0.25, kl_weight=2.0, diversity=3.0)
    quantizer = training_quantizer(codebook, dvae(), config, synchronise=False)
    assert isinstance(quantizer, GumbelQuantizer)
    quantizer.set_progress(0.5)
    assert quantizer.temperature == pytest.approx(0.5)
    vectors = torch.randn(4, 8, 3, 3, requires_grad=True)
    mixed, codes, loss = quantizer(vectors)
    assert torch.equal(codes, codebook.nearest(vectors))
    rows = mixed.permute(0, 2, 3, 1).reshape(-1, 8)
    assert (torch.cdist(rows, codebook.vectors).min(1).values < 1e-3).all()  # straight through: one code each
    logits = codebook.logits(vectors.permute(0, 2, 3, 1)).detach().double()
    share = logits.softmax(-1)
    mean = share.flatten(0, 2).mean(0)
    single, together = (share * (share * 16).log()).sum(-1).mean(), (mean * (mean * 16).log()).sum()
    assert loss.item() == pytest.approx(2 * float(single) + 3 * float(together), rel=1e-4)
    (mixed.sum() + loss).backward()
    assert vectors.grad.abs().sum() > 0 and codebook.vectors.grad is not None and codebook.logits.weight.grad is not None
    torch.nn.init.zeros_(codebook.logits.weight)
    torch.nn.init.zeros_(codebook.logits.bias)
    assert quantizer(vectors)[2].item() == pytest.approx(0, abs=1e-6)
    torch.nn.init.constant_(codebook.logits.weight, 1e3)
    codebook.logits.weight.data[3:] = 0  # shares that are 0 to the last bit
    (gradient,) = torch.autograd.grad(quantizer(vectors)[2], codebook.logits.weight)
    assert gradient.isfinite().all()
    soft = GumbelQuantizer(codebook, QuantizerConfig(straight_through=False))
    rows = soft(vectors)[0].permute(0, 2, 3, 1).reshape(-1, 8)
    assert (torch.cdist(rows, codebook.vectors).min(1).values > 1e-3).all()


LOSS = ReconstructionLossConfig(
    perceptual=0.5, adversarial=AdversarialConfig(weight=0.3, start_step=20, ramp_steps=10, width=8, layers=1, lr=1e-3)
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("raw"), pictures(120))


def test_training_learns_with_every_loss_on(shards, tmp_path):
    recipe = small_recipe(model=taming(4), steps=70, lr=1e-2, ema=0.9).model_copy(update={"loss": LOSS})
    metrics = train.run(recipe, shards, tmp_path, HERE)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["psnr_db"] > lines[0]["psnr_db"] + 0.2
    assert "discriminator_loss" not in lines[1] and 0 < lines[-1]["discriminator_loss"] < 1.2
    assert lines[-1]["adversarial_factor"] > 0
    assert lines[-1]["perceptual"] < lines[0]["perceptual"]
    assert metrics["hash"] == ImageTokenizer.load(tmp_path).hash
    assert 0 < metrics["ssim"] < 1 and metrics["codebook_used"] > 3


def test_the_average_of_the_weights_is_what_is_saved(shards, tmp_path):
    data = loop.ImageData.read(shards, small_recipe())
    plain, still, slow = (
        loop.train(small_recipe(steps=10, lr=1e-2, ema=ema), data, tmp_path, HERE) for ema in (0.0, 1e-9, 0.99)
    )
    assert plain.hash == still.hash != slow.hash  # a decay of nothing keeps the last step's weights
    assert torch.equal(plain.codebook.vectors, slow.codebook.vectors)


def train_on_rank(rank, world_size, shards, out):
    recipe = small_recipe(steps=26, lr=1e-2, ema=0.9, model=taming(4)).model_copy(update={"loss": LOSS})
    data = loop.ImageData.read(shards, recipe)
    return loop.train(recipe, data, out, loop.Place(rank, world_size, torch.device("cpu"))).hash


def test_two_processes_with_a_discriminator_end_with_the_same_tokenizer(shards, tmp_path):
    hashes = run_distributed(2, train_on_rank, (shards, tmp_path))
    assert hashes[0] == hashes[1]


def plain_ssim(x, y):
    """Wang 2004, place by place, in numpy. x, y: [H, W]."""
    bell = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    found = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb, vab = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum(), (window * (a - ma) * (b - mb)).sum()
            c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
            found.append((2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(found)


def test_ssim_is_the_published_formula():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 14, 16, dtype=torch.float64) * 2 - 1
    y = (x + torch.randn_like(x) * 0.3).clamp(-1, 1)
    wanted = [np.mean([plain_ssim(x[b, c].numpy(), y[b, c].numpy()) for c in range(3)]) for b in range(2)]
    assert ssim(x, y).tolist() == pytest.approx(wanted, rel=1e-9)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    assert ssim(x[..., :4, :4], y[..., :4, :4]).shape == (2,)  # smaller than the window


def test_the_figures_of_an_evaluation_hold_ssim():
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(SMALL).eval()
    images = pictures(5)
    figures = evaluate(tokenizer, images, HERE.device)
    assert figures["ssim"] < 0.9 and figures["num_images"] == 5


def test_a_finished_folder_of_an_older_recipe_counts_as_finished(shards, tmp_path):
    recipe = small_recipe(steps=4)
    train.run(recipe, shards, tmp_path, HERE)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for key in ("perceptual", "perceptual_weights", "adversarial"):
        del metrics["recipe"]["loss"][key]
    del metrics["recipe"]["train"]["ema"]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert train.is_finished(tmp_path, recipe, metrics["data"])
    with pytest.raises(UserError, match="another recipe"):
        train.is_finished(tmp_path, recipe.model_copy(update={"seed": 9}), metrics["data"])
