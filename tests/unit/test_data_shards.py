"""The strict tar reader: everything readable is found, every damage is an error naming shard and byte."""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from vilg.data.shards import TOKEN_FIELDS, ShardIndex, ShardReader, index_shard, split_name
from vilg.data.tar import ByteSource, ShardError, members
from vilg.data.writer import ShardWriter
from vilg.errors import UserError

FIELDS = ("img.npy", "txt", "json")


def tar_bytes(entries: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT, **pax: dict) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, **pax) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def samples(*keys: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{field}", f"{key} {field}".encode() * 30) for key in keys for field in FIELDS]


def contents(path: Path) -> dict[str, dict[str, bytes]]:
    with ShardReader(path, index_shard(path, TOKEN_FIELDS)) as reader:
        return {reader.key(i): reader.read(i) for i in range(len(reader))}


def expected(*keys: str) -> dict[str, dict[str, bytes]]:
    return {key: {field: f"{key} {field}".encode() * 30 for field in FIELDS} for key in keys}


LONG = "a" * 120 + "/" + "b" * 130  # beyond ustar's name + prefix


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_dialects_are_read(tmp_path, format):
    keys = ["plain", "f" * 80 + "/" + "prefix" * 5]
    keys += [] if format == tarfile.USTAR_FORMAT else [LONG, "白色背景上的马", "last"]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(samples(*keys), format))
    assert contents(path) == expected(*keys)


def test_pax_size_global_headers_directories_and_dot_slash_are_understood(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in samples("one"):
            info = tarfile.TarInfo("./" + name)
            info.size, info.pax_headers = len(data), {"size": str(len(data)), "mtime": "1.5"}
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "x.tar").write_bytes(file.getvalue())
    assert contents(tmp_path / "x.tar") == expected("one")


def test_names_split_by_webdatasets_rule():
    assert split_name("a/b.c/01.img.NPY") == ("a/b.c/01", "img.npy")
    assert split_name("01.txt") == ("01", "txt")
    assert [split_name(name) for name in ("README", ".hidden", "a/.x.txt", "a.")] == [None] * 4


def test_other_fields_are_left_alone_and_missing_ones_are_absent(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes([("a.txt", b"A"), ("a.pyd", b"evil" * 50_000), ("a.img.npy", b"N"), ("b.json", b"{}")]))
    assert contents(path) == {"a": {"img.npy": b"N", "txt": b"A"}, "b": {"json": b"{}"}}


def test_an_empty_archive_has_no_samples(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes([]))
    assert contents(path) == {}
    index_shard(path, TOKEN_FIELDS).save(tmp_path / "x.idx")
    assert len(ShardIndex.load(tmp_path / "x.idx")) == 0


def with_member(kind: bytes, name: str = "b.txt", link: str = "a.txt") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("a.txt")
        tar.addfile(info)
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        tar.addfile(info)
    return file.getvalue()


def overwritten(data: bytes, at: int, patch: bytes) -> bytes:
    return data[:at] + patch + data[at + len(patch) :]


GOOD = tar_bytes(samples("a", "b"))  # six members of two blocks each, then the end at 6144
END = 6 * 1024


@pytest.mark.parametrize(
    "data, byte, message",
    [
        (GOOD[:700], 0, "beyond the file's 700"),
        (GOOD[:2300], 2048, "ends inside a header"),
        (GOOD[:2048], 2048, "without an end-of-archive block"),
        (GOOD[: END + 512], END, "only one end-of-archive block"),
        (b"", 0, "without an end-of-archive block"),
        (overwritten(GOOD, 3072, b"\xff" * 512), 3072, "no octal number|checksum"),
        (overwritten(GOOD, 3072, bytes(512)), 3072 + 512, "data behind the end-of-archive"),
        (overwritten(GOOD, 3072, b"X"), 3072, "header checksum"),
        (GOOD + GOOD, len(GOOD), "data behind the end-of-archive"),
        (with_member(tarfile.SYMTYPE), 512, "'b.txt' is a symbolic link"),
        (with_member(tarfile.LNKTYPE), 512, "'b.txt' is a hard link"),
        (with_member(tarfile.FIFOTYPE), 512, "FIFO"),
        (with_member(tarfile.CHRTYPE), 512, "character device"),
        (tar_bytes([("../b.txt", b"x")]), 0, "leads outside"),
        (tar_bytes([("/etc/b.txt", b"x")]), 0, "leads outside"),
        (tar_bytes([("a/../../b.txt", b"x")]), 0, "leads outside"),
        (tar_bytes(samples("a") + samples("b")[:1] + [("a.jpg", b"")]), 4096, "key 'a' .*comes twice.*interleaved"),
        (tar_bytes(samples("a", "b", "a")), END, "key 'a' .*comes twice"),
        (tar_bytes([("a.txt", b"1"), ("a.txt", b"2")]), 1024, "field 'txt' comes twice"),
        (tar_bytes([("cat.1.txt", b"1")]), 0, "key with a dot.*'cat'"),
        (tar_bytes([("README", b"1")]), 0, "not KEY.FIELD"),
        (tar_bytes([("a.pickle", b"1"), ("b.txt", b"1")]), 0, "none of the fields"),
    ],
)
def test_each_fault_is_an_error_naming_shard_and_byte(tmp_path, data, byte, message):
    path = tmp_path / "00007.tar"
    path.write_bytes(data)
    with pytest.raises(ShardError, match=message) as caught:
        index_shard(path, TOKEN_FIELDS)
    assert (caught.value.shard, caught.value.byte) == (path, byte)
    assert f"{path}: byte {byte}" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_no_cut_of_a_shard_passes(tmp_path):
    path = tmp_path / "x.tar"
    whole = tar_bytes(samples("a", LONG), tarfile.PAX_FORMAT)
    archive = -(-len(whole.rstrip(b"\0")) // 512) * 512 + 1024  # behind it is only padding
    for length in range(0, archive, 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ShardError):
            index_shard(path, TOKEN_FIELDS)


def test_a_damaged_header_never_shortens_a_shard_silently(tmp_path):
    """Any one byte changed in any header: an error, unless tar calls the block valid all the same (none does)."""
    path = tmp_path / "x.tar"
    for position in range(0, 512, 7):
        for header in (0, 1024, 5120):
            path.write_bytes(overwritten(GOOD, header + position, bytes([GOOD[header + position] ^ 0x15])))
            with pytest.raises(ShardError):
                index_shard(path, TOKEN_FIELDS)


def test_grouping_faults_are_collected_where_asked(tmp_path):
    path = tmp_path / "x.tar"
    dotted, useless = ("x.y.txt", b""), ("z.bin", b"")
    path.write_bytes(tar_bytes([*samples("a"), dotted, *samples("b"), *samples("a"), useless, *samples("c")]))
    faults: list[ShardError] = []
    index = index_shard(path, TOKEN_FIELDS, on_fault=faults.append)
    assert len(index) == 3
    assert [fault.byte for fault in faults] == [3072, 6656, 9728]


def test_index_survives_saving_and_is_compact(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(samples(*(f"{i:04d}" for i in range(200)))))
    index = index_shard(path, TOKEN_FIELDS)
    index.save(tmp_path / "x.idx")
    loaded = ShardIndex.load(tmp_path / "x.idx")
    np.testing.assert_array_equal(loaded.table, index.table)
    assert (loaded.bytes, loaded.sha256, loaded.fields) == (index.bytes, index.sha256, index.fields)
    assert (tmp_path / "x.idx").stat().st_size == 1024 + 200 * 28


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda b: b[:-1], "incomplete"),
        (lambda b: b[:500], "incomplete"),
        (lambda b: b"", "is no shard index"),
        (lambda b: b.replace(b'"format_version": 1', b'"format_version": 9'), "version 9 is unknown"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, spoil: Callable[[bytes], bytes], message):
    (tmp_path / "x.tar").write_bytes(GOOD)
    index_shard(tmp_path / "x.tar", TOKEN_FIELDS).save(tmp_path / "x.idx")
    (tmp_path / "x.idx").write_bytes(spoil((tmp_path / "x.idx").read_bytes()))
    with pytest.raises(ShardError, match=message):
        ShardIndex.load(tmp_path / "x.idx")


@pytest.mark.parametrize("other", [tar_bytes(samples("a", "c")), GOOD + bytes(512), GOOD[:-512]])
def test_a_replaced_shard_is_refused(tmp_path, other):
    path = tmp_path / "x.tar"
    path.write_bytes(GOOD)
    index = index_shard(path, TOKEN_FIELDS)
    path.write_bytes(other)
    with pytest.raises(ShardError, match="was replaced or changed"):
        ShardReader(path, index)


def test_writer_gives_the_same_bytes_that_tar_and_our_reader_read(tmp_path):
    for name in ("one.tar", "two.tar"):
        with ShardWriter(tmp_path / name) as writer:
            for key in ("k1", LONG, "马"):
                writer.write(key, expected(key)[key])
    data = (tmp_path / "one.tar").read_bytes()
    assert data == (tmp_path / "two.tar").read_bytes() and len(data) == writer.bytes and len(data) % 10_240 == 0
    assert index_shard(tmp_path / "two.tar", TOKEN_FIELDS).sha256 == writer.sha256
    assert contents(tmp_path / "one.tar") == expected("k1", LONG, "马")
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert tar.getnames() == [f"{key}.{field}" for key in ("k1", LONG, "马") for field in FIELDS]
        assert {info.mtime for info in tar} == {0}


def test_writer_leaves_nothing_behind_on_an_error_and_refuses_bad_keys(tmp_path):
    for key in ("a", "b.c", ""):
        with pytest.raises(UserError, match="key"), ShardWriter(tmp_path / "x.tar") as writer:
            writer.write("a", {"txt": b""})
            writer.write(key, {"txt": b""})
    assert list(tmp_path.iterdir()) == []


def test_plain_webdataset_reads_what_we_write(tmp_path):
    with ShardWriter(tmp_path / "x.tar") as writer:
        for key in ("a", "b"):
            writer.write(key, expected(key)[key])
    read = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    assert {sample["__key__"]: {f: sample[f] for f in FIELDS} for sample in read} == expected("a", "b")


def test_signed_checksums_of_old_writers_are_accepted(tmp_path):
    data = bytearray(tar_bytes([("é.txt", b"x")], tarfile.GNU_FORMAT))
    header = bytes(data[:148]) + b" " * 8 + bytes(data[156:512])
    signed = sum(byte - 256 if byte > 127 else byte for byte in header)
    data[148:156] = b"%06o\0 " % signed
    (tmp_path / "x.tar").write_bytes(data)
    with ByteSource(tmp_path / "x.tar") as source:
        assert [member.name for member in members(source)] == ["é.txt"]
