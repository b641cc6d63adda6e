"""Lint and manifest: every fault named, sound data pass, and the loader refuses what lint reports."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data_support import CODES, GRID, make_shards, sample_fields
from vilg.data.dataset import TokenDataset
from vilg.data.fields import encode_codes
from vilg.data.lint import lint, main
from vilg.data.manifest import Manifest, ShardEntry
from vilg.data.tar import ShardError
from vilg.data.writer import ShardWriter
from vilg.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_shards(tmp_path, [4, 3])
    dataset = TokenDataset.open(tmp_path)
    for number in range(2):
        dataset.shard_index(number)  # saved beside the shards
    return tmp_path


def faults(folder: Path, **options) -> list[str]:
    return list(lint(folder, progress=False, **options))


def test_sound_data_pass_in_both_modes(folder, capsys):
    assert faults(folder) == [] and faults(folder, fast=True) == []
    assert main([str(folder)]) == 0
    assert "2 shards, 7 samples, every byte checked: no faults" in capsys.readouterr().out


def test_faults_are_printed_and_give_exit_code_1(folder, capsys):
    (folder / "00001.tar").unlink()
    assert main([str(folder), "--fast"]) == 1
    assert "00001.tar: is in the manifest, but: No such file" in capsys.readouterr().out


def cut(folder: Path, length: int) -> None:
    (folder / "00000.tar").write_bytes((folder / "00000.tar").read_bytes()[:length])


def flip(folder: Path, at: int) -> None:
    data = bytearray((folder / "00000.tar").read_bytes())
    data[at] ^= 1
    (folder / "00000.tar").write_bytes(data)


@pytest.mark.parametrize(
    "spoil, fast, expected",
    [
        (lambda d: cut(d, 3000), True, "has 3000 bytes"),
        (lambda d: cut(d, 3000), False, r"00000\.tar: byte \d+"),
        (lambda d: flip(d, 3), False, "00000.tar: byte 0 header checksum"),
        (lambda d: flip(d, 3), True, "replaced or changed"),
        (lambda d: flip(d, 700), False, "SHA-256 is"),
        (lambda d: (d / "extra.tar").write_bytes(b""), True, "extra.tar: is not in the manifest"),
        (lambda d: (d / "index" / "00001.tar.idx").write_bytes(b"?"), True, "is no shard index"),
        (lambda d: (d / "00001.tar").write_bytes((d / "00000.tar").read_bytes()), True, "00001.tar"),
    ],
)
def test_each_fault_of_a_file_is_named(folder, spoil: Callable[[Path], None], fast, expected):
    spoil(folder)
    found = faults(folder, fast=fast)
    assert any(re.search(expected, line) for line in found), found


def test_each_bad_sample_is_named_by_shard_and_key(tmp_path):
    bad = {
        1: {"img.npy": encode_codes(np.full(6, CODES))},
        3: {"txt": b"\xff\xfe"},
        5: {"json": b"nonsense", "img.npy": b"\x93NUMPY"},
    }
    make_shards(tmp_path, [4, 3], lambda number, fields: fields | bad.get(number, {}))
    found = faults(tmp_path)
    assert [line.split(": ")[1] for line in found] == [
        "key '000000001'", "key '000000003'", "key '000010001'", "key '000010001'",
    ]
    assert "holds code 50, outside 0..49" in found[0] and "not UTF-8" in found[1] and "json cannot be read" in found[3]
    assert faults(tmp_path, fast=True) == []  # which looks at no sample


def test_several_processes_find_the_same_faults_in_the_same_order(tmp_path):
    spoil = lambda number, fields: fields | {"json": b"{"} if number % 3 == 1 else fields  # noqa: E731
    folder = make_shards(tmp_path, [5, 4, 6], spoil)
    (folder / "00001.tar").unlink()
    expected = faults(folder)
    assert len(expected) == 5 and faults(folder, workers=2) == expected


def test_grouping_faults_are_all_named(tmp_path):
    with ShardWriter(tmp_path / "00000.tar") as writer:
        writer.write("a", sample_fields(0))
        writer.write("x", {"y.txt": b""})
        writer.write("z", {"pickle": b""})
    entry = ShardEntry("00000.tar", 1, writer.bytes, writer.sha256)
    Manifest("h", GRID, CODES, (entry,)).save(tmp_path)
    found = faults(tmp_path)
    assert len(found) == 2 and "key with a dot" in found[0] and "none of the fields" in found[1]
    with pytest.raises(ShardError, match="key with a dot"):
        TokenDataset.open(tmp_path).read(0)


def test_the_dataset_refuses_missing_cut_and_replaced_shards(folder):
    data = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(data[:-512])
    with pytest.raises(ShardError, match=rf"has {len(data) - 512} bytes, the manifest says {len(data)}"):
        TokenDataset.open(folder)
    (folder / "00000.tar").write_bytes(data.replace(b"000000001.txt", b"000000009.txt"))
    with pytest.raises(ShardError, match="was replaced or changed"):
        TokenDataset.open(folder).read(0)
    (folder / "index" / "00000.tar.idx").unlink()
    with pytest.raises(ShardError, match="SHA-256"):
        TokenDataset.open(folder).read(0)
    (folder / "00000.tar").unlink()
    with pytest.raises(ShardError, match="is in the manifest, but"):
        TokenDataset.open(folder)


def test_manifest_survives_saving_and_its_hash_covers_everything(folder):
    manifest = Manifest.load(folder)
    assert (manifest.num_samples, manifest.grid, manifest.image_vocab_size) == (7, GRID, CODES)
    manifest.save(folder / "again")
    assert Manifest.load(folder / "again") == manifest and Manifest.load(folder / "again").hash == manifest.hash
    other = Manifest(manifest.image_tokenizer, manifest.grid, manifest.image_vocab_size, manifest.shards[::-1])
    assert other.hash != manifest.hash


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "format_version 2 is unknown"),
        ({"grid": [2]}, "grid .* is not"),
        ({"num_samples": 8}, "num_samples is 8, but the shards add up to 7"),
        ({"image_vocab_size": 70_000}, "image_vocab_size 70000"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"shards": [{"name": "../x.tar", "samples": 7, "bytes": 1, "sha256": ""}]}, "shard name .* is not a plain"),
        ({"shards": {}}, "shards is not a list"),
    ],
)
def test_a_manifest_that_is_not_right_is_refused(folder, change, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"{path}: {message}"):
        Manifest.load(folder)


def test_a_missing_or_broken_manifest_is_a_clear_error(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        main([str(folder)])
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json does not exist: .*is no folder of token shards"):
        TokenDataset.open(folder)
