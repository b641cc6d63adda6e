"""Token shards that hold the resized image: written, checked, and carried only to those who ask for it."""

import json

import numpy as np
import pytest

from tests.unit.data_support import Averages, Bytes, data_config, make_raw, make_shards, picture
from vilg.data.encode import Recipe
from vilg.data.lint import lint
from vilg.data.loader import Loader, TokenDataset
from vilg.data.manifest import Manifest
from vilg.data.tokenize import tokenize
from vilg.errors import UserError
from vilg.tokens.sequence import SequenceSpec, all_images, image_codes
from vilg.tokens.vqgan.images import decode_image, to_float

SPEC = SequenceSpec(text_slots=16, grid=(2, 2), text_vocab_size=300, image_vocab_size=Averages.vocab_size)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    raw = make_raw(folder / "raw", [5, 3])
    tokenize(raw, folder / "out", Averages(), recipe=Recipe(8, 4, images=True))
    return folder / "out"


def batches(folder, *, image_size=None, source_images=False, **choices):
    config = data_config(folder, caption_dropout=0.0, **choices)
    options = dict(seed=0, global_size=8, micro_size=4, image_size=image_size, source_images=source_images)
    return next(iter(Loader(TokenDataset.open(folder), Bytes(), SPEC, config, **options)))


def test_stored_images_are_the_pixels_that_were_encoded(shards):
    manifest = Manifest.load(shards)
    assert manifest.image_size == 8 and json.loads((shards / "manifest.json").read_text())["image_size"] == 8
    data = TokenDataset.open(shards)
    for number in range(8):
        stored = decode_image(data.sample(number).image, 8)
        np.testing.assert_array_equal(stored, decode_image(picture(number), 8))


def test_batches_carry_the_images_of_their_text_to_image_sequences_in_order(shards):
    encoder = Averages()
    for batch in batches(shards, image_size=8, directions="both"):
        drawn = batch.image_is_target.bool()
        assert batch.images.shape == (int(drawn.sum()), 8, 8, 3)
        codes = encoder.encode(to_float(batch.images)).flatten(1)
        np.testing.assert_array_equal(codes, batch.image_target[drawn])
    (only_text, _) = batches(shards, image_size=8, text_to_image_fraction=0.0)
    assert only_text.images is None


@pytest.mark.parametrize("choices", [{"directions": "both"}, {"directions": "alternate"}, {"text_to_image_fraction": 0.0}])
def test_sequences_that_write_carry_their_images_to_those_who_ask(shards, choices):
    encoder = Averages()
    for batch in batches(shards, image_size=8, source_images=True, **choices):
        codes = encoder.encode(to_float(all_images(batch))).flatten(1)
        np.testing.assert_array_equal(codes, image_codes(batch))
    for batch in batches(shards, image_size=8, **choices):
        assert batch.source_images is None


def test_who_wants_no_images_gets_none(shards):
    assert all(batch.images is None for batch in batches(shards, directions="both"))


def test_shards_without_images_are_refused_where_they_are_needed(tmp_path, shards):
    plain = make_shards(tmp_path, [4])
    with pytest.raises(UserError, match="--store-images"):
        TokenDataset.open(plain).check(SequenceSpec(8, (2, 3), 300, 50), image_size=8)
    with pytest.raises(UserError, match="images of 8 pixels"):
        TokenDataset.open(shards).check(SPEC, image_size=16)


def test_lint_names_a_sample_whose_image_is_missing(shards, tmp_path):
    assert not list(lint(shards))
    plain = make_shards(tmp_path, [2])
    manifest = json.loads((plain / "manifest.json").read_text())
    (plain / "manifest.json").write_text(json.dumps({**manifest, "image_size": 8}))
    assert any("has no png" in fault for fault in lint(plain))


def test_old_manifests_keep_their_hash():
    plain = Manifest("hash", (2, 2), 50, ())
    assert "image_size" not in plain.to_dict() and plain.hash != Manifest("hash", (2, 2), 50, (), 8).hash
