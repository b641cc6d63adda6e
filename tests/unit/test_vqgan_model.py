"""The image tokenizer: what a code sees, how the nearest is found, and the folder on disk."""

import json

import pytest
import safetensors.torch
import torch

from tests.vqgan_support import SMALL, pictures
from vilg.errors import UserError
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.config import QuantizerConfig
from vilg.tokens.vqgan.images import to_float
from vilg.tokens.vqgan.model import Codebook
from vilg.tokens.vqgan.quantize import TrainingQuantizer


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(SMALL).eval()
    vectors = tokenizer.encoder(torch.rand(64, 3, 16, 16) * 2 - 1).permute(0, 2, 3, 1).reshape(-1, SMALL.code_dim)
    tokenizer.codebook.vectors.copy_(vectors[torch.randperm(len(vectors))[: SMALL.num_codes]].detach())
    return tokenizer


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_shapes_types_and_ranges(tokenizer):
    images = torch.rand(3, 3, 16, 24) * 2 - 1
    codes = tokenizer.encode(images)
    assert codes.shape == (3, 4, 6) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < tokenizer.vocab_size
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    assert (tokenizer.factor, tokenizer.image_size, tokenizer.grid, tokenizer.vocab_size) == (4, 16, (4, 4), 32)


def test_a_code_depends_on_its_own_pixels_only(tokenizer):
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    changed = torch.rand(32, 3, 16, 16) * 2 - 1
    changed[..., 4:8, 8:12] = images[..., 4:8, 8:12]
    codes = tokenizer.encode(changed)
    assert (codes[:, 1, 2] == tokenizer.encode(images)[0, 1, 2]).all()
    assert (codes.flatten(1).float().std(dim=0) > 0).sum() == 15


def test_identical_patches_get_identical_codes_in_any_place_and_batch(tokenizer):
    patches = torch.rand(16, 3, 4, 4) * 2 - 1
    alone = torch.stack([tokenizer.encode(p.repeat(1, 4, 4)[None])[0] for p in patches])
    assert (alone.flatten(1) == alone[:, :1, :1].flatten(1)).all()
    together = tokenizer.encode(patches.repeat(7, 1, 5, 3))
    assert torch.equal(together, alone[:, :1, :1].repeat(7, 5, 3))


def test_the_decoder_may_look_at_neighbours(tokenizer):
    codes = torch.zeros(2, 4, 4, dtype=torch.int64)
    codes[1, 0, 0] = 1
    first, second = tokenizer.decode(codes)
    assert not torch.equal(first[:, :4, 4:8], second[:, :4, 4:8])


def test_codes_are_the_same_under_autocast_and_without_gradients(tokenizer):
    images = torch.rand(16, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        codes = tokenizer.encode(images.requires_grad_())
        decoded = tokenizer.decode(codes)
    assert torch.equal(codes, tokenizer.encode(images)) and decoded.dtype == torch.float32
    assert not decoded.requires_grad


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 16, 18), torch.zeros(3, 16, 16), torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 16, 16).byte()],
)
def test_encode_refuses_other_images(tokenizer, images):
    with pytest.raises(ValueError, match="float32|multiples"):
        tokenizer.encode(images)


@pytest.mark.parametrize("codes", [torch.full((1, 4, 4), 32), torch.full((1, 4, 4), -1), torch.zeros(1, 4, 4).int()])
def test_decode_refuses_other_codes(tokenizer, codes):
    with pytest.raises(ValueError, match="outside 0..31|int64"):
        tokenizer.decode(codes)


@pytest.mark.parametrize("lookup", ["euclidean", "cosine"])
def test_nearest_code_agrees_with_brute_force(lookup):
    torch.manual_seed(0)
    codebook = Codebook(40, 6, lookup)
    codebook.vectors.copy_(
        torch.nn.functional.normalize(torch.randn(40, 6)) if lookup == "cosine" else torch.randn(40, 6)
    )
    vectors = torch.randn(2, 6, 5, 5) * 3
    flat = vectors.permute(0, 2, 3, 1).reshape(-1, 1, 6)
    if lookup == "cosine":
        wanted = torch.cosine_similarity(flat, codebook.vectors[None], dim=-1).argmax(1)
    else:
        wanted = (flat - codebook.vectors).square().sum(-1).argmin(1)
    assert torch.equal(codebook.nearest(vectors).flatten(), wanted)
    assert torch.equal(codebook.lookup(codebook.nearest(vectors))[0, :, 2, 3], codebook.vectors[wanted[13]])


def test_of_equally_near_codes_the_first_is_taken():
    codebook = Codebook(8, 4, "euclidean")
    codebook.vectors.copy_(torch.ones(8, 4))
    assert (codebook.nearest(torch.randn(1, 4, 3, 3)) == 0).all()


@pytest.mark.parametrize("lookup", ["euclidean", "cosine"])
def test_codes_learned_in_training_are_found_again_by_the_codebook(lookup):
    torch.manual_seed(0)
    config = SMALL.model_copy(update={"lookup": lookup})
    quantizer = TrainingQuantizer(config, QuantizerConfig(), synchronise=False)
    vectors = torch.randn(16, SMALL.code_dim, 4, 4)
    for _ in range(5):
        quantised, _, loss = quantizer(vectors.requires_grad_())
    assert quantised.requires_grad and loss.isfinite()
    codebook = Codebook(SMALL.num_codes, SMALL.code_dim, lookup)
    quantizer.copy_to(codebook)
    quantised, codes, _ = quantizer.eval()(vectors)
    assert torch.equal(codebook.nearest(vectors), codes)
    assert torch.allclose(codebook.lookup(codes), quantised)
    assert len(codes.unique()) > SMALL.num_codes * 0.9


def test_a_loaded_tokenizer_is_the_saved_one(tokenizer, folder):
    loaded = ImageTokenizer.load(folder)
    images = to_float(pictures(8))
    assert loaded.config == tokenizer.config and loaded.hash == tokenizer.hash
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded.save(folder.parent / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder.parent / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_hash_changes_with_a_weight_and_with_a_setting(tokenizer, folder):
    other = ImageTokenizer.load(folder)
    other.codebook.vectors[3, 2] += 1e-6
    assert other.hash != tokenizer.hash
    other = ImageTokenizer.load(folder)
    other.config = SMALL.model_copy(update={"lookup": "cosine"})
    assert other.hash != tokenizer.hash


def edit_description(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors))


MODEL = SMALL.model_dump(mode="json")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), "not an image tokenizer: config.json: No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "'format' is 'list'"),
        (
            lambda f: edit_description(f, format="vilg-export"),
            "config.json: not an image tokenizer: 'format' is 'vilg-export'",
        ),
        (lambda f: edit_description(f, format_version=2), r"format_version 2 is not known here \(known: 1\)"),
        (lambda f: edit_description(f, model={**MODEL, "windwo": 3}), "config.json: windwo"),
        (lambda f: edit_description(f, model={**MODEL, "architecture": "unheard"}), "config.json: architecture"),
        (lambda f: edit_description(f, model={**MODEL, "lookup": "cosine"}), "do not belong together"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: cannot read"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"junk" * 9),
            "model.safetensors: not a whole safetensors file",
        ),
        (lambda f: edit_tensors(f, lambda t: t.pop("decoder.stem.weight")), "decoder.stem.weight is missing"),
        (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))), "extra is not of this architecture"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"codebook.vectors": torch.zeros(31, 8)})),
            r"codebook.vectors is torch.float32 \[31, 8\], needed torch.float32 \[32, 8\]",
        ),
        (lambda f: edit_tensors(f, lambda t: t["codebook.vectors"].add_(1)), "do not belong together"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_with_the_file_at_fault(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        ImageTokenizer.load(folder)


def test_a_cut_weights_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="model.safetensors: not a whole safetensors file"):
        ImageTokenizer.load(folder)


def test_an_absent_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="absent"):
        ImageTokenizer.load(tmp_path / "absent")
