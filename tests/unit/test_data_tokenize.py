"""Tokenising: right codes, the same bytes again and after any interruption, bad images counted and bounded."""

import dataclasses
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.data_support import Averages, make_raw, picture
from vilg.data.encode import Recipe
from vilg.data.loader import TokenDataset
from vilg.data.manifest import Manifest
from vilg.data.records import Record
from vilg.data.shards import ShardReader
from vilg.data.tokenize import main, tokenize
from vilg.errors import UserError
from vilg.tokens.vqgan.images import decode_image, to_float


def run(raw: Path, out: Path, encoder: Averages | None = None, **options) -> Manifest:
    ours = {field.name for field in dataclasses.fields(Recipe)} & options.keys()
    recipe = Recipe(**{"image_size": 8, "batch_size": 4, **{name: options.pop(name) for name in ours}})
    return tokenize(raw, out, encoder or Averages(), recipe=recipe, **options)


def published(out: Path) -> dict[str, bytes]:
    """Everything but hidden temporary files."""
    files = (path for path in out.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


class Killed(BaseException):
    """Stands for a process that ends at once."""


class DiesAtCall(Averages):
    def __init__(self, last_call: int):
        super().__init__()
        self.last_call = last_call

    def encode(self, images):
        if self.calls == self.last_call:
            raise Killed
        return super().encode(images)


def test_codes_caption_and_json_arrive(tmp_path):
    raw = make_raw(tmp_path / "raw", [5, 3])
    manifest = run(raw, tmp_path / "out")
    dataset = TokenDataset.open(tmp_path / "out")
    assert (manifest.grid, manifest.image_tokenizer, dataset.num_samples) == ((2, 2), "hash-of-averages", 8)
    for number in range(8):
        codes, caption, meta = dataset.read(number)
        image = to_float(decode_image(picture(number), 8)[None].copy())
        np.testing.assert_array_equal(codes, Averages().encode(image).flatten())
        assert caption == f"caption {number}"
        assert meta == {"url": f"https://example.org/{number}", "width": 8}


def test_another_image_size_gives_another_grid(tmp_path):
    raw = make_raw(tmp_path / "raw", [2], lambda n, f: f | {"png": picture(n, size=(40, 23), format="JPEG")})
    manifest = run(raw, tmp_path / "out", image_size=16)
    assert manifest.grid == (4, 4)
    assert TokenDataset.open(tmp_path / "out").read(1)[0].shape == (16,)
    with pytest.raises(UserError, match="--image-size 18 is not a multiple of the image tokenizer's factor 4; use 16"):
        run(raw, tmp_path / "other", image_size=18)


def test_two_runs_give_the_same_bytes(tmp_path):
    raw = make_raw(tmp_path / "raw", [9, 6])
    run(raw, tmp_path / "one")
    run(raw, tmp_path / "two")
    assert published(tmp_path / "one") == published(tmp_path / "two")


def test_a_finished_job_encodes_nothing_again(tmp_path):
    raw = make_raw(tmp_path / "raw", [9, 6])
    first = run(raw, tmp_path / "out")
    again = Averages()
    assert run(raw, tmp_path / "out", again) == first and again.calls == 0


def test_killed_anywhere_and_started_again_it_ends_with_the_same_bytes(tmp_path):
    raw = make_raw(tmp_path / "raw", [9, 6, 5], lambda n, f: f | {"png": b"broken"} if n == 10 else f)
    run(raw, tmp_path / "whole")
    for last_call in range(7):  # 3 + 2 + 2 batches
        out = tmp_path / f"killed{last_call}"
        with pytest.raises(Killed):
            run(raw, out, DiesAtCall(last_call))
        assert not (out / "manifest.json").exists()
        rest = Averages()
        run(raw, out, rest)
        assert rest.calls == 7 - sum(size for size in (3, 2, 2)[: sum(last_call >= end for end in (3, 5))])
        assert published(out) == published(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["save", "close"])
def test_killed_between_shard_and_record_the_shard_is_made_again(tmp_path, monkeypatch, moment):
    raw = make_raw(tmp_path / "raw", [3, 3])
    run(raw, tmp_path / "whole")

    def die(*_args):
        raise Killed

    with monkeypatch.context() as patch:
        target = "vilg.data.records.Record.save" if moment == "save" else "vilg.data.writer.os.replace"
        patch.setattr(target, die)
        with pytest.raises(Killed):
            run(raw, tmp_path / "out")
    (tmp_path / "out" / ".00000.tar.tmp").write_bytes(b"half a shard")
    run(raw, tmp_path / "out")
    (tmp_path / "out" / ".00000.tar.tmp").unlink(missing_ok=True)
    assert published(tmp_path / "out") == published(tmp_path / "whole")


def test_parts_share_the_shards_and_the_last_one_writes_the_same_manifest(tmp_path):
    raw = make_raw(tmp_path / "raw", [3, 2, 4, 1, 2])
    whole = run(raw, tmp_path / "whole")
    assert run(raw, tmp_path / "parts", part=(2, 2)) is None
    with pytest.raises(Killed):
        run(raw, tmp_path / "parts", DiesAtCall(1), part=(1, 2))
    assert not (tmp_path / "parts" / "manifest.json").exists()
    assert run(raw, tmp_path / "parts", part=(1, 2)) == whole
    assert published(tmp_path / "parts") == published(tmp_path / "whole")


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(UserError, match=f"--part {part} is no part"):
        main(["raw", "--image-model", "none", "--out", "out", "--part", part])


def test_bad_samples_are_left_out_counted_and_named(tmp_path, capsys):
    bombs = {
        1: {"png": b""},
        2: {"png": picture(2)[:60]},
        3: {"txt": "马".encode("gbk")},
        4: {"txt": b" "},
        5: {"json": b"{"},
    }

    def edit(number, fields):
        if number == 6:
            del fields["png"]
        return fields | bombs.get(number, {})

    raw = make_raw(tmp_path / "raw", [10], edit)
    manifest = run(raw, tmp_path / "out")
    assert manifest.num_samples == 4
    rejected = Record.load(tmp_path / "out" / "records" / "00000.tar.json").rejected
    assert [(item.shard, item.key) for item in rejected] == [("00000.tar", f"00000000{n}") for n in range(1, 7)]
    assert [item.reason for item in rejected] == [
        "bad image", "bad image", "caption not UTF-8", "empty caption", "bad json", "no image",
    ]


def test_too_many_bad_samples_stop_the_job(tmp_path):
    raw = make_raw(tmp_path / "raw", [10, 30], lambda n, f: f | {"png": b"x"} if n >= 10 else f)
    with pytest.raises(UserError, match=r"30 of the first 40 samples .*00001\.tar key '000010029'"):
        run(raw, tmp_path / "out")
    assert run(raw, tmp_path / "out", max_bad_fraction=0.9).num_samples == 10


def test_another_tokenizer_size_or_data_is_not_mixed_in(tmp_path):
    raw = make_raw(tmp_path / "raw", [3, 3])
    run(raw, tmp_path / "out")
    other = Averages()
    other.hash = "other"
    with pytest.raises(UserError, match="made with image_tokenizer 'hash-of-averages', now it is 'other'"):
        run(raw, tmp_path / "out", other)
    with pytest.raises(UserError, match="image_size 8, now it is 16"):
        run(raw, tmp_path / "out", image_size=16)
    make_raw(tmp_path / "raw", [2, 2])
    with pytest.raises(UserError, match="00000.tar has changed since"):
        run(raw, tmp_path / "out")
    make_raw(tmp_path / "few", [3])
    with pytest.raises(UserError, match="already holds 00001.tar"):
        run(tmp_path / "few", tmp_path / "out")


def test_several_captions_pass_through_without_a_text_field(tmp_path):
    def edit(_, fields):
        return {"png": fields["png"], "json": json.dumps({"captions": ["一匹马", "a horse"]}).encode()}

    run(make_raw(tmp_path / "raw", [1], edit), tmp_path / "out")
    assert TokenDataset.open(tmp_path / "out").sample(0).captions == ("一匹马", "a horse")


def test_no_shards_and_a_damaged_raw_shard_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    raw = make_raw(tmp_path / "raw", [3, 3])
    shard = raw / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"00001\.tar: byte \d+ "):
        run(raw, tmp_path / "out")


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_views_and_neighbouring_shards_change_no_byte(tmp_path, threads):
    def edit(n, fields):
        return fields | {"png": b"broken" if n % 9 == 4 else picture(n, size=(24, 16), format="JPEG")}

    whole, alone = make_raw(tmp_path / "raw", [9, 1, 6, 4, 1, 1, 1, 5], edit), tmp_path / "alone"
    options = {"views": 2, "least_crop": 0.6, "max_bad_fraction": 0.5}
    run(whole, tmp_path / "out", threads=threads, **options)
    alone.mkdir()
    (whole / "00002.tar").rename(alone / "00002.tar")
    run(alone, tmp_path / "one", threads=0, **options)
    assert (tmp_path / "one" / "00002.tar").read_bytes() == (tmp_path / "out" / "00002.tar").read_bytes()


def test_views_are_random_crops_drawn_by_seed_key_and_view(tmp_path):
    def coarse(number: int) -> bytes:
        file = io.BytesIO()
        with Image.open(io.BytesIO(picture(number, size=(6, 4)))) as image:
            image.resize((96, 64)).save(file, "PNG")
        return file.getvalue()

    raw = make_raw(tmp_path / "raw", [6], lambda n, f: f | {"png": coarse(n)})

    def views(out: str, **options) -> dict[str, bytes]:
        run(raw, tmp_path / out, least_crop=0.5, image_size=16, **options)
        dataset = TokenDataset.open(tmp_path / out)
        with ShardReader(tmp_path / out / "00000.tar", dataset.shard_index(0)) as reader:
            return {reader.key(i): dataset.read(i)[0].tobytes() for i in range(dataset.num_samples)}

    two, three = views("two", views=2), views("three", views=3)
    assert len(two) == 12 and list(two)[:7] == [*(f"00000000{n}-0" for n in range(6)), "000000000-1"]
    assert all(three[key] == codes for key, codes in two.items())  # another number of views changes none
    assert len(set(three.values())) == 18
    assert list(views("one", views=1).values()) == [two[f"00000000{n}-0"] for n in range(6)]
    assert not set(views("seed", views=2, seed=1).values()) & set(two.values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"views": 2}, "would all be the same middle of the image; add --least-crop 0.8"),
        ({"least_crop": 0.2}, "--least-crop 0.2 is not from 0.5 to 1"),
        ({"views": 0}, "must be at least 1"),
    ],
)
def test_unfit_views_are_clear_errors(options, message):
    with pytest.raises(UserError, match=message):
        Recipe(8, 4, **options)


def test_a_batch_is_decoded_while_another_one_is_encoded(tmp_path, monkeypatch):
    """The encoder waits for the next shard's first picture, which a job that does one after the other never begins."""
    begun = threading.Semaphore(0)

    class Waits(Averages):
        def encode(self, images):
            if self.calls == 0:  # four pictures are in this batch
                assert all(begun.acquire(timeout=20) for _ in range(5)), "nothing is decoded ahead"
            return super().encode(images)

    def decoded(*arguments, **options):
        begun.release()
        return decode_image(*arguments, **options)

    raw = make_raw(tmp_path / "raw", [4, 4, 4, 4])
    monkeypatch.setattr("vilg.data.encode.decode_image", decoded)
    run(raw, tmp_path / "out", Waits(), threads=2)
