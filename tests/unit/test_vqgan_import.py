"""Image tokenizers of others: the same codes and pixels after import, nothing dropped silently, nothing unpickled."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.vqgan_sources import LlamaGenNames, Names, Reference, Shape, absent_class, random_network, write_lightning
from tests.vqgan_support import pictures, write_shards
from vilg.__main__ import main as vilg
from vilg.errors import UserError
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.formats import FORMATS
from vilg.tokens.vqgan.images import to_float
from vilg.tokens.vqgan.import_command import import_tokenizer, main

SHAPE = Shape()
LLAMAGEN = Shape(attention=(2,))  # attention at the coarsest level, always
# format, network, its names, the rule that chooses codes
CASES = [
    ("taming", SHAPE, Names(), "distance"),
    ("taming", Shape(mult=(1, 1, 2, 2), attention=(), blocks=1), Names(), "distance"),
    ("taming", Shape(mult=(1, 1, 1, 2, 2), attention=(4,), blocks=1, codes=300), Names(), "distance"),
    ("taming-gumbel", SHAPE, Names(), "logits"),
    ("llamagen", LLAMAGEN, LlamaGenNames(), "normalised"),
]


def some_images():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def write_source(folder, form, shape, names, *, seed=0):
    tensors = random_network(shape, names, seed=seed, gumbel=form == "taming-gumbel")
    if form == "llamagen":
        path = folder / "vq_ds16_c2i.pt"
        torch.save({"model": {**tensors, "quantize.codebook_used": torch.zeros(65536)}}, path)
    else:
        path = folder / "last.ckpt"
        write_lightning(path, tensors)
    return path, tensors


@pytest.mark.parametrize("form, shape, names, rule", CASES)
def test_an_imported_tokenizer_has_the_codes_and_pixels_of_its_source(tmp_path, capsys, form, shape, names, rule):
    path, tensors = write_source(tmp_path, form, shape, names)
    arguments = [str(path), "--format", form, "--out", str(tmp_path / "ours"), "--image-size", "32"]
    assert main([*arguments, "--allow-pickled-objects"]) == 0
    said = capsys.readouterr().out
    ours, theirs, images = ImageTokenizer.load(tmp_path / "ours"), Reference(tensors, shape, names), some_images()
    codes = theirs.codes(images, rule)
    assert len(codes.unique()) > 12  # or agreement would say little
    assert torch.equal(ours.encode(images), codes)
    wanted = theirs.pixels(codes, rule)
    assert wanted.std() > 0.1
    assert (ours.decoder(ours.codebook.lookup(codes)) - wanted).abs().max() < 1e-4
    assert (ours.decode(codes) - wanted.clamp(-1, 1)).abs().max() < 1e-4
    assert ours.factor == 2 ** (len(shape.mult) - 1) and ours.vocab_size == shape.codes
    if form == "llamagen":
        assert "left out: 1 tensors like quantize.codebook_used: a statistic" in said
    else:
        assert "left out: 2 tensors like loss.discriminator.main.0.weight: discriminator" in said
    origin = json.loads((tmp_path / "ours" / "config.json").read_text())["origin"]
    assert origin["format"] == form and origin["file"] == path.name and len(origin["sha256"]) == 64
    assert origin["legacy_beta"] == {"taming": True, "taming-gumbel": None, "llamagen": False}[form]
    ours.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["origin"] == origin


def test_a_tokenizer_of_diffusers_has_its_codes_and_pixels(tmp_path):
    vq_model = pytest.importorskip("diffusers.models.autoencoders.vq_model", reason="diffusers is not installed")
    torch.manual_seed(0)
    theirs = vq_model.VQModel(
        block_out_channels=(16, 32), layers_per_block=2, latent_channels=6, vq_embed_dim=5, num_vq_embeddings=48,
        norm_num_groups=8, down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    ).eval()  # fmt: skip
    torch.nn.init.normal_(theirs.quantize.embedding.weight, std=0.4)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer, left_out = import_tokenizer(tmp_path / "theirs", "diffusers", image_size=32)
    images = some_images()
    with torch.no_grad():
        hidden = theirs.encode(images).latents
        codes = theirs.quantize(hidden)[2][2].reshape(6, 16, 16)
        wanted = theirs.decode(hidden).sample
    assert len(codes.unique()) > 12 and not left_out
    assert torch.equal(tokenizer.encode(images), codes)
    assert (tokenizer.decoder(tokenizer.codebook.lookup(codes)) - wanted).abs().max() < 1e-4
    assert tokenizer.config.taming.groups == 8 and tokenizer.config.taming.attn_resolutions == (16,)


def test_diffusers_itself_computes_what_an_imported_taming_network_does(tmp_path):
    """An independent implementation of the same architecture, given our tensors under its names."""
    vq_model = pytest.importorskip("diffusers.models.autoencoders.vq_model", reason="diffusers is not installed")
    path, _ = write_source(tmp_path, "taming", SHAPE, Names())
    ours, _ = import_tokenizer(path, "taming", image_size=32, allow_pickled_objects=True)
    theirs = vq_model.VQModel(
        block_out_channels=(32, 64, 64), layers_per_block=2, latent_channels=16, vq_embed_dim=8, num_vq_embeddings=64,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    empty, _ = import_tokenizer(tmp_path / "theirs", "diffusers", image_size=32)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in ours.state_dict().items()}
    # number their tensors, import the numbers, and so find out which of theirs is which of ours
    numbered = {name: torch.full_like(tensor, n) for n, (name, tensor) in enumerate(theirs.state_dict().items())}
    safetensors.torch.save_file(numbered, tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    order, _ = import_tokenizer(tmp_path / "theirs", "diffusers", image_size=32)
    place = {int(tensor.flatten()[0]): name for name, tensor in order.state_dict().items()}
    weights = ours.state_dict()
    theirs.load_state_dict(
        {name: weights[place[n]].reshape(tensor.shape) for n, (name, tensor) in enumerate(theirs.state_dict().items())}
    )
    with torch.no_grad():
        hidden = theirs.encode(some_images()).latents
        assert torch.allclose(ours.encoder(some_images()), hidden, atol=1e-5)
        assert (ours.decode(ours.encode(some_images())) - theirs.decode(hidden).sample.clamp(-1, 1)).abs().max() < 1e-4


def test_the_average_of_a_llamagen_file_is_taken_unless_asked_otherwise(tmp_path):
    networks = {key: random_network(LLAMAGEN, LlamaGenNames(), seed=seed) for key, seed in (("model", 1), ("ema", 2))}
    torch.save({**networks, "optimizer": {"state": {}}, "steps": 7}, tmp_path / "vq.pt")
    for weights, key in ((None, "ema"), ("model", "model")):
        tokenizer, _ = import_tokenizer(tmp_path / "vq.pt", "llamagen", image_size=32, weights=weights)
        assert torch.equal(tokenizer.encoder.conv_in.weight, networks[key]["encoder.conv_in.weight"])
    torch.save(networks["model"], tmp_path / "plain.pt")
    with pytest.raises(UserError, match="no 'ema' weights"):
        import_tokenizer(tmp_path / "plain.pt", "llamagen", weights="ema")
    by_distance, _ = import_tokenizer(tmp_path / "plain.pt", "llamagen", image_size=32, lookup="euclidean")
    assert torch.equal(by_distance.codebook.vectors, networks["model"]["quantize.embedding.weight"])
    images, theirs = some_images(), Reference(networks["model"], LLAMAGEN, LlamaGenNames())
    assert torch.equal(by_distance.encode(images), theirs.codes(images, "distance"))
    assert not torch.equal(theirs.codes(images, "distance"), theirs.codes(images, "normalised"))


def test_pickled_objects_need_the_flag(tmp_path):
    path, _ = write_source(tmp_path, "taming", SHAPE, Names())
    with pytest.raises(UserError, match="holds pickled objects .*ModelCheckpoint.*--allow-pickled-objects"):
        import_tokenizer(path, "taming")
    torch.save({"state_dict": random_network(SHAPE, Names())}, path)
    import_tokenizer(path, "taming", image_size=32)  # without objects no flag is needed


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_file_that_would_run_code_is_refused_with_and_without_the_flag(tmp_path):
    trap = tmp_path / "it ran"
    torch.save({"state_dict": random_network(SHAPE, Names()), "callbacks": Malicious(trap)}, tmp_path / "evil.ckpt")
    for allowed in (False, True):
        with pytest.raises(UserError, match="holds pickled objects.*mkdir"):
            import_tokenizer(tmp_path / "evil.ckpt", "taming", allow_pickled_objects=allowed)
    assert not trap.exists()


def test_objects_that_are_not_on_the_list_are_named(tmp_path):
    with absent_class("somewhere.else.Thing") as thing:
        torch.save({"state_dict": random_network(SHAPE, Names()), "extra": thing()}, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match="not on the list of known ones: somewhere.else.Thing"):
        import_tokenizer(tmp_path / "odd.ckpt", "taming", allow_pickled_objects=True)


def edited(change):
    tensors = random_network(SHAPE, Names())
    change(tensors)
    return {"state_dict": tensors}


@pytest.mark.parametrize(
    "content, form, message",
    [
        (edited(lambda t: t.update(extra=torch.zeros(1))), "taming", "not tensors of the format taming: extra"),
        (edited(lambda t: t.pop("decoder.conv_out.bias")), "taming", "decoder.conv_out.bias is missing.*ch=32"),
        (edited(lambda t: t.pop("encoder.conv_in.weight")), "taming", "encoder.conv_in.weight is missing"),
        (edited(lambda t: t.pop("encoder.down.0.downsample.conv.bias")), "taming", "downsample.conv.bias is missing"),
        (
            edited(lambda t: t.update({"encoder.down.1.block.0.conv1.weight": torch.zeros(50, 32, 3, 3)})),
            "taming",
            r"levels of \[32, 50, 64\] channels are not multiples",
        ),
        (edited(lambda t: None), "taming-gumbel", "not tensors of the format taming-gumbel: quantize.embedding.weight"),
        (edited(lambda t: None), "llamagen", "is it of another format than llamagen"),
        ([1, 2], "taming", "holds a list"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, content, form, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"model.pt: .*{message}"):
        import_tokenizer(tmp_path / "model.pt", form, image_size=32)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'; only 'VQModel'"),
        ({"norm_type": "spatial"}, "norm_type is 'spatial'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"_class_name": "VQModel"}, "holds no weights"),
    ],
)
def test_a_diffusers_network_of_another_kind_is_refused(tmp_path, settings, message):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        import_tokenizer(tmp_path, "diffusers")


def test_mistakes_of_the_command_are_named(tmp_path):
    with pytest.raises(UserError, match="not a folder of diffusers: config.json"):
        import_tokenizer(tmp_path / "absent", "diffusers")
    with pytest.raises(UserError, match="absent.ckpt: cannot read"):
        import_tokenizer(tmp_path / "absent.ckpt", "taming")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    arguments = ["x.ckpt", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="is not empty"):
        main([*arguments, "--format", "taming"])
    path, _ = write_source(tmp_path, "taming", SHAPE, Names())
    with pytest.raises(UserError, match="image_size=30 is not a multiple of factor=4"):
        import_tokenizer(path, "taming", image_size=30, allow_pickled_objects=True)


def test_half_precision_weights_become_single_precision(tmp_path):
    tensors = {name: tensor.half() for name, tensor in random_network(SHAPE, Names()).items()}
    safetensors.torch.save_file(tensors, tmp_path / "half.safetensors")
    tokenizer, _ = import_tokenizer(tmp_path / "half.safetensors", "taming", image_size=32)
    assert tokenizer.encoder.conv_in.weight.dtype == torch.float32
    assert torch.equal(tokenizer.encoder.conv_in.weight, tensors["encoder.conv_in.weight"].float())


def test_images_are_tokenised_and_drawn_with_an_imported_tokenizer(tmp_path):
    path, _ = write_source(tmp_path, "llamagen", LLAMAGEN, LlamaGenNames())
    ours, shards = tmp_path / "ours", write_shards(tmp_path / "raw", pictures(8, size=32), per_shard=8)
    tokens, model = str(tmp_path / "tokens"), ["--image-model", str(ours)]
    assert main([str(path), "--format", "llamagen", "--out", str(ours), "--image-size", "32"]) == 0
    assert vilg(["data", "tokenize", str(shards), *model, "--out", tokens, "--device", "cpu"]) == 0
    assert vilg(["data", "lint", tokens, *model]) == 0
    import webdataset

    shard = next(Path(tokens).glob("*.tar"))
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert len(samples) == 8
    codes = torch.from_numpy(np.stack([s["img.npy"] for s in samples]).astype(np.int64)).reshape(8, 8, 8)
    tokenizer = ImageTokenizer.load(ours)
    wanted = {image.tobytes(): tokenizer.encode(to_float(image[None]))[0] for image in pictures(8, size=32)}
    assert all(any(torch.equal(c, w) for w in wanted.values()) for c in codes)
    assert tokenizer.decode(codes).shape == (8, 3, 32, 32)


def test_every_format_of_the_command_is_tested():
    assert {case[0] for case in CASES} | {"diffusers"} == set(FORMATS)
