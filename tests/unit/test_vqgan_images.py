"""Pictures in and out, and where training takes its images from."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vqgan_support import SMALL, encoded, pictures, small_recipe, write_shards
from vilg.errors import UserError
from vilg.tokens.vqgan.images import BadImage, Crop, decode_image, to_float, to_uint8, write_sheet
from vilg.tokens.vqgan.source import ImageData, data_fingerprint


def test_all_levels_survive_the_way_to_the_network_and_back():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    floats = to_float(levels)
    assert floats.shape == (1, 3, 16, 16) and floats.min() == -1 and floats.max() == 1
    assert np.array_equal(to_uint8(floats), levels)
    assert to_uint8(torch.tensor([-7.0, 0.0, 7.0]).reshape(1, 3, 1, 1)).flatten().tolist() == [0, 128, 255]


def test_an_image_of_the_right_size_comes_out_unchanged():
    image = pictures(1)[0]
    assert np.array_equal(decode_image(encoded(image), 16), image)
    assert np.array_equal(decode_image(encoded(image, "WEBP", lossless=True), 16), image)


def test_the_middle_of_an_oblong_image_is_kept():
    image = np.zeros((8, 32, 3), np.uint8)
    image[:, 12:20] = 200
    assert (decode_image(encoded(image), 8) == 200).all()
    assert decode_image(encoded(image), 16).shape == (16, 16, 3)


def test_transparency_lies_on_white():
    image = np.zeros((8, 8, 4), np.uint8)
    image[:, :4, 3] = 255
    decoded = decode_image(encoded(image), 8)
    assert (decoded[:, :4] == 0).all() and (decoded[:, 4:] == 255).all()
    palette = Image.fromarray(image).quantize(4)
    assert np.array_equal(decode_image(encoded(palette), 8), decoded)


def test_exif_orientation_is_followed():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert np.array_equal(decode_image(encoded(image, exif=exif), 8), image[::-1])


@pytest.mark.parametrize("mode, level", [("L", 100), ("1", 255), ("CMYK", None), ("I;16", 100)])
def test_other_colour_modes_become_rgb(mode, level):
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 100 * 257, np.uint16))
    else:
        image = Image.new(mode, (8, 8), 100 if mode == "L" else 1 if mode == "1" else (0, 0, 0, 0))
    decoded = decode_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"), 8)
    assert decoded.dtype == np.uint8 and (decoded == (255 if level is None else level)).all()


@pytest.mark.parametrize("content", [b"", b"junk", encoded(pictures(1)[0])[:60], encoded(pictures(1)[0], "GIF")])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(BadImage):
        decode_image(content, 16)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(BadImage, match="decompression bomb"):
        decode_image(encoded(pictures(1)[0]), 16)


def test_a_sheet_shows_real_above_reconstruction(tmp_path):
    write_sheet(np.full((9, 16, 16, 3), 10, np.uint8), np.full((9, 16, 16, 3), 200, np.uint8), tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet[20, 20] == 10).all() and (sheet[120, 20] == 200).all()
    assert (sheet[-20, 20] == 200).all() and (sheet[-20, -20] == 255).all()


def rows(images):
    return {image.tobytes() for image in np.asarray(images)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("raw"), pictures(200))


def test_held_back_images_are_not_trained_on(shards):
    data = ImageData.read(shards, small_recipe())
    assert len(data.held_back) == 16 and len(data.images) == 184
    assert rows(data.held_back) | rows(data.images) == rows(pictures(200))
    assert not rows(data.held_back) & rows(data.images)


def test_global_batches_do_not_depend_on_the_number_of_processes(shards):
    data = ImageData.read(shards, small_recipe())
    alone = list(itertools.islice(data.batches(rank=0, world_size=1), 50))
    parts = [itertools.islice(data.batches(rank=rank, world_size=4), 50) for rank in range(4)]
    for whole, *split in zip(alone, *parts, strict=True):
        assert torch.equal(whole, torch.cat(split))
    first_epoch = torch.cat(alone)[:184]
    assert rows(first_epoch) == rows(data.images)
    assert not torch.equal(first_epoch, torch.cat(alone)[184:368])


def test_a_batch_may_be_larger_than_the_data(shards):
    data = ImageData.read(shards, small_recipe(batch_size=400))
    assert next(data.batches(rank=0, world_size=1)).shape == (400, 16, 16, 3)


LARGE = SMALL.model_copy(update={"image_size": 128})


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 0), (1, 2), (7, 0)])
def test_data_too_large_for_memory_is_streamed_whole_without_the_held_back(tmp_path, monkeypatch, world_size, workers):
    monkeypatch.setattr("vilg.tokens.vqgan.source._SHUFFLE_BUFFER", 10)
    images = pictures(120, size=128)
    recipe = small_recipe(model=LARGE, batch_size=7, memory_mib=1, held_back=6)
    data = ImageData.read(write_shards(tmp_path, images, per_shard=40), recipe)
    assert data.images is None and len(data.held_back) == 6
    seen = set()
    for rank in range(world_size):
        for batch in itertools.islice(data.batches(rank=rank, world_size=world_size, workers=workers), 120):
            assert batch.shape == (7 // world_size, 128, 128, 3)
            seen |= rows(batch)
    assert seen == rows(images) - rows(data.held_back)


def test_the_stream_is_reproducible_and_differs_between_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr("vilg.tokens.vqgan.source._SHUFFLE_BUFFER", 10)
    recipe = small_recipe(model=LARGE, batch_size=6, memory_mib=1, held_back=6)
    data = ImageData.read(write_shards(tmp_path, pictures(120, size=128), per_shard=40), recipe)
    once, again = (torch.stack(list(itertools.islice(data.batches(rank=0, world_size=1), 38))) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once[:19], once[19:])


def test_few_bad_images_are_skipped_and_named(tmp_path, caplog):
    data = ImageData.read(write_shards(tmp_path, pictures(200), bad=(7, 120)), small_recipe())
    assert (data.bad.bad, data.bad.seen) == (2, 200)
    assert "00000.tar: 000000007" in caplog.text and "00002.tar: 000000120" in caplog.text


def test_many_bad_images_stop_with_shard_and_key(tmp_path):
    write_shards(tmp_path, pictures(100), bad=range(60, 70))
    with pytest.raises(UserError, match=r"00001.tar: 000000062: 3 of 63 images cannot be read.*max_bad_fraction=0.01"):
        ImageData.read(tmp_path, small_recipe())


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="only 12 readable images"):
        ImageData.read(write_shards(tmp_path, pictures(12)), small_recipe())


def test_the_fingerprint_tells_data_apart(shards, tmp_path):
    assert data_fingerprint(shards) == data_fingerprint(shards)
    assert data_fingerprint(shards) != data_fingerprint(write_shards(tmp_path, pictures(60)))


@pytest.mark.parametrize("turned", [False, True])
def test_a_crop_is_that_square_of_the_upright_image(turned):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:20, :40], pixels[:20, 40:], pixels[20:, :40], pixels[20:, 40:] = 10, 80, 150, 220
    image, file = Image.fromarray(pixels), io.BytesIO()
    exif = Image.Exif()
    if turned:
        image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6  # a reader has to turn it back
    image.save(file, "PNG", exif=exif)
    corners = itertools.product((0, 1), (0, 1))
    seen = {(x, y): np.median(decode_image(file.getvalue(), 8, crop=Crop(0.5, x, y))) for x, y in corners}
    assert seen == {(0, 0): 10, (1, 0): 80, (0, 1): 150, (1, 1): 220}
    middle = decode_image(file.getvalue(), 8, crop=Crop(1.0, 0.5, 0.5))
    np.testing.assert_array_equal(middle, decode_image(file.getvalue(), 8))
