"""Indices are made once, in parallel, beside the data or apart from them, and then nobody reads whole shards again."""

import shutil
from pathlib import Path

import pytest

from tests.unit.data_support import data_config, make_shards
from vilg.__main__ import main as vilg
from vilg.data import dataset
from vilg.data.blend import open_data
from vilg.data.dataset import TokenDataset
from vilg.data.index_command import make_indices
from vilg.errors import UserError

SIZES = [5, 3, 4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "data", SIZES)


@pytest.fixture
def read_only(folder: Path) -> Path:
    (folder / "index").write_bytes(b"a file where a folder should be")  # as unwritable as read-only data, also for root
    return folder


def read_all(data: TokenDataset) -> list[str]:
    return [data.sample(number).captions[0] for number in range(sum(SIZES))]


EVERYTHING = [str(number) for number in range(sum(SIZES))]


@pytest.fixture
def no_hashing(monkeypatch):
    """Whoever reads a whole shard from now on fails."""

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was read as a whole")

    return lambda: monkeypatch.setattr(dataset, "file_sha256", refuse)


def test_missing_indices_are_made_by_several_processes_and_the_others_left_alone(folder, capsys, no_hashing):
    TokenDataset.open(folder).sample(6)
    of_the_second = folder / "index" / "00001.tar.idx"
    before = of_the_second.stat().st_mtime_ns, of_the_second.read_bytes()
    assert vilg(["data", "index", str(folder), "--workers", "2"]) == 0
    assert capsys.readouterr().out == f"{folder}: 2 indices were missing and made\n"
    assert (of_the_second.stat().st_mtime_ns, of_the_second.read_bytes()) == before
    assert sorted(path.name for path in (folder / "index").iterdir()) == [f"0000{n}.tar.idx" for n in range(3)]
    no_hashing()
    assert read_all(TokenDataset.open(folder)) == EVERYTHING
    assert make_indices(folder) == 0


def test_indices_of_read_only_data_lie_apart_and_are_found_there_by_a_run(read_only, tmp_path, no_hashing):
    assert make_indices(read_only, cache_dir=tmp_path / "cache", progress=False) == len(SIZES)
    no_hashing()
    assert read_all(open_data(data_config(read_only, cache_dir=tmp_path / "cache"))) == EVERYTHING
    moved = shutil.copytree(read_only, tmp_path / "moved")  # the same data in another place
    assert read_all(open_data(data_config(moved, cache_dir=tmp_path / "cache"))) == EVERYTHING


def test_an_index_that_can_be_saved_nowhere_is_kept_in_memory_by_a_run_and_an_error_here(read_only, capsys, no_hashing):
    data = TokenDataset.open(read_only)
    assert read_all(data) == EVERYTHING
    no_hashing()
    assert read_all(data) == EVERYTHING
    with pytest.raises(AssertionError, match="read as a whole"):
        TokenDataset.open(read_only).sample(0)


def test_what_cannot_be_indexed_is_named_whoever_met_it(read_only, tmp_path, capsys):
    assert vilg(["data", "index", str(read_only), "--workers", "0"]) == 2
    assert f"{read_only / 'index'} cannot be written to; name another place with --cache-dir" in capsys.readouterr().err
    data = bytearray((read_only / "00002.tar").read_bytes())
    data[600] ^= 1
    (read_only / "00002.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"00002\.tar: has SHA-256 .* damaged or replaced"):
        make_indices(read_only, cache_dir=tmp_path / "cache", workers=1, progress=False)
