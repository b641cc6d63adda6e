"""The streaming reader of raw shards: samples in order, and no damage goes unnoticed."""

import io
import tarfile

import pytest

from vilg.errors import UserError
from vilg.tokens.raw import raw_shards, read_raw


def make_shard(path, samples=3, tar_format=tarfile.USTAR_FORMAT, folder=""):
    with tarfile.open(path, "w", format=tar_format) as archive:
        for number in range(samples):
            for suffix in ("png", "txt", "json"):
                content = f"{number}.{suffix} ".encode() * 80
                info = tarfile.TarInfo(f"{folder}{number:05d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_come_in_file_order_with_the_suffixes_asked_for(tmp_path, tar_format):
    folder = "a" * 60 + "/" + "b" * 60 + "/"
    shard = make_shard(tmp_path / "0.tar", tar_format=tar_format, folder=folder)
    samples = list(read_raw(shard, ("png", "txt")))
    assert [key for key, _ in samples] == [f"{folder}{i:05d}" for i in range(3)]
    assert samples[1][1] == {"png": b"1.png " * 80, "txt": b"1.txt " * 80}


def test_a_sample_without_the_suffixes_is_left_out(tmp_path):
    assert list(read_raw(make_shard(tmp_path / "0.tar"), ("webp",))) == []


def test_every_cut_of_a_shard_is_noticed(tmp_path):
    shard = make_shard(tmp_path / "0.tar", samples=2)
    whole = shard.read_bytes()
    used = 2 * 3 * (512 + 512)  # a header and a block of content each
    for cut in [0, 1, *range(256, used + 512, 256)]:
        shard.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="0.tar: damaged after byte"):
            list(read_raw(shard, ("png",)))


def test_a_damaged_header_is_noticed(tmp_path):
    shard = make_shard(tmp_path / "0.tar")
    content = bytearray(shard.read_bytes())
    content[512 + 512 + 5] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(UserError, match="0.tar: damaged after byte 1024"):
        list(read_raw(shard, ("txt",)))


def test_a_folder_without_shards_says_where_they_are(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        raw_shards(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no .tar shards"):
        raw_shards(tmp_path)
    (tmp_path / "train").mkdir()
    make_shard(tmp_path / "train" / "1.tar")
    with pytest.raises(UserError, match=r"there are some in .*train"):
        raw_shards(tmp_path)
    make_shard(tmp_path / "train" / "0.tar")
    assert [s.name for s in raw_shards(tmp_path / "train")] == ["0.tar", "1.tar"]
