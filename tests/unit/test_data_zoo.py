"""The hostile zoo: what a data set may hold, and what becomes of it in each room. The two tables are the promise.

ARCHIVES: damage to a tar. Everyone that reads it gives one error that names the shard, or reads all of it.
SAMPLES: one bad sample of a sound shard. It is counted under a reason where it is met first, and the others stay.
Nothing is executed and nothing is written outside the folder asked for. Pieces in more detail: test_data_shards.py (all
bytes of a header, all cuts), test_data_lint.py (hashes, indices), test_loader.py (replacement of bad samples).
"""

import io
import os
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data_support import (
    CODES, GRID, SPEC, Averages, Bytes, data_config, make_raw, make_shards, picture, sample_fields,
)  # fmt: skip
from vilg.data.dataset import TokenDataset
from vilg.data.fields import encode_codes
from vilg.data.ingest import ingest
from vilg.data.lint import lint
from vilg.data.loader import Loader
from vilg.data.manifest import Manifest, ShardEntry
from vilg.data.records import Record, record_path
from vilg.data.shards import RAW_FIELDS, file_sha256, index_shard
from vilg.data.tokenize import tokenize
from vilg.errors import UserError

Entries = list[tuple[str, bytes]]
KEYS = ("a", "b", "c")


def tar(entries: Entries, *, format: int = tarfile.GNU_FORMAT, links: Sequence[tuple[str, str]] = ()) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return file.getvalue()


def second_header(entries: Entries) -> int:
    """Byte of the second member's header."""
    return 512 + -(-len(entries[0][1]) // 512) * 512


def overwritten(entries: Entries) -> bytes:
    data, at = tar(entries), second_header(entries)
    return data[:at] + b"\xff" * 512 + data[at + 512 :]


def renamed(entries: Entries, rename: Callable[[str], str]) -> Entries:
    return [(rename(name), data) for name, data in entries]


LONG = "d" * 120 + "/" + "k" * 130  # beyond what a tar header holds
WHOLE = None  # read to the last sample

# What it is, how it is made of a sound shard's members, and the error that everyone gives.
ARCHIVES: list[tuple[str, Callable[[Entries], bytes], str | None]] = [
    ("tar cut in a header", lambda e: tar(e)[: second_header(e) + 300], "ends inside a header; it was cut short"),
    ("tar cut in data", lambda e: tar(e)[:600], "reaches .*, beyond the file's 600"),
    ("tar cut between members", lambda e: tar(e)[: second_header(e)], "without an end-of-archive block"),
    ("block overwritten", overwritten, "checksum|no octal number"),
    ("two archives in one", lambda e: tar(e) + tar(e), "data behind the end-of-archive"),
    ("no tar at all", lambda e: b"<html>403 Forbidden</html>" * 100, "checksum|no octal number"),
    ("no bytes", lambda e: b"", "without an end-of-archive block"),
    ("interleaved members", lambda e: tar(sorted(e, key=lambda entry: entry[0][2:])), "comes twice, or .*interleaved"),
    ("keys with dots", lambda e: tar(renamed(e, lambda name: f"cat.{name}")), "key with a dot"),
    ("duplicate keys", lambda e: tar(e + e), "comes twice"),
    ("a field twice", lambda e: tar([e[0], *e]), "comes twice"),
    ("PAX long names", lambda e: tar(renamed(e, lambda n: LONG + n), format=tarfile.PAX_FORMAT), WHOLE),
    ("GNU long names", lambda e: tar(renamed(e, lambda n: LONG + n)), WHOLE),
    ("symlink member", lambda e: tar(e, links=[("d.txt", "/etc/passwd")]), "'d.txt' is a symbolic link"),
    ("../ member", lambda e: tar([*e, ("../outside.txt", b"x")]), "leads outside the archive"),
    ("absolute member", lambda e: tar([*e, ("/tmp/outside.txt", b"x")]), "leads outside the archive"),
    ("sample of .pickle only", lambda e: tar([*e, ("z.pickle", b"x")]), "has none of the fields"),
    ("empty tar", lambda e: tar([]), "empty|not one usable sample|no samples"),
]  # fmt: skip
archives = pytest.mark.parametrize("spoil, error", [row[1:] for row in ARCHIVES], ids=[row[0] for row in ARCHIVES])


def raw_entries() -> Entries:
    return [
        (f"{key}.{field}", data)
        for number, key in enumerate(KEYS)
        for field, data in (("png", picture(number, size=(40, 40))), ("txt", key.encode()), ("json", b"{}"))
    ]


def token_entries() -> Entries:
    return [(f"{key}.{field}", data) for n, key in enumerate(KEYS) for field, data in sample_fields(n).items()]


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@archives
@pytest.mark.parametrize("room", ["index", "ingest", "tokenize"])
def test_raw_archives(tmp_path, room, spoil, error):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    (raw / "00007.tar").write_bytes(spoil(raw_entries()))
    before = files(tmp_path)

    def count() -> int:
        if room == "index":
            return len(index_shard(raw / "00007.tar", RAW_FIELDS))
        if room == "ingest":
            return ingest([raw], out)["kept"]
        return tokenize(raw, out, Averages()).num_samples

    if error is WHOLE:
        assert count() == len(KEYS)
    elif room == "index" and spoil(raw_entries()) == tar([]):
        assert count() == 0  # an empty shard is no fault; a data set without samples is
    else:
        with pytest.raises(UserError, match=error) as caught:
            count()
        assert str(raw) in str(caught.value)
        assert not (out / "manifest.json").exists() and not (out / "report.json").exists() or "empty" in error
    assert files(tmp_path) - files(out) == before


@archives
def test_token_archives(tmp_path, spoil, error):
    """Lint names the fault though the manifest has the damaged file's own size and hash; the loader stops with it."""
    path = tmp_path / "00007.tar"
    path.write_bytes(spoil(token_entries()))
    empty = path.read_bytes() == tar([])
    entry = ShardEntry(path.name, 0 if empty else len(KEYS), path.stat().st_size, file_sha256(path))
    Manifest("hash", GRID, CODES, (entry,)).save(tmp_path)
    faults = list(lint(tmp_path, progress=False))
    if error is WHOLE:
        assert not faults and TokenDataset.open(tmp_path).read(2)[1] == "2"
        return
    assert any(re.search(error, fault) and str(path) in fault for fault in faults) or empty
    with pytest.raises(UserError, match=error):
        TokenDataset.open(tmp_path).sample(0)


class Evil:
    """Unpickled, it would leave a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def bomb() -> bytes:
    """A PNG of some kilobytes that says it has 30,000 x 30,000 pixels, 2.7 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def object_array(mark: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Evil(mark)] * 6, object), allow_pickle=True)
    return file.getvalue()


GBK = "白色背景上的马".encode("gbk")
MEGABYTE = "马 ".encode() * 250_000
JPEG = picture(1, size=(64, 64), format="JPEG")
Edit = Callable[[dict[str, bytes], Path], dict[str, bytes]]
KEPT = None

# What it is, how one sample becomes it, and the reason under which ingest and tokenize count it (KEPT: it passes).
RAW_SAMPLES: list[tuple[str, Edit, str | None, str | None]] = [
    ("zero-byte jpg", lambda f, _: {"jpg": b"", "txt": f["txt"]}, "bad image", "bad image"),
    ("truncated jpg", lambda f, _: {"jpg": JPEG[: len(JPEG) // 2], "txt": f["txt"]}, "bad image", "bad image"),
    ("text named jpg", lambda f, _: {"jpg": b"<html>", "txt": f["txt"]}, "bad image", "bad image"),
    ("30,000 x 30,000 PNG bomb", lambda f, _: f | {"png": bomb()}, "bad image", "bad image"),
    (".pyd and .pickle beside", lambda f, m: f | dict.fromkeys(("pyd", "pickle"), pickle.dumps(Evil(m))), KEPT, KEPT),
    ("pickle named png", lambda f, m: f | {"png": pickle.dumps(Evil(m))}, "bad image", "bad image"),
    ("no image", lambda f, _: {"txt": f["txt"]}, "no image", "no image"),
    ("no caption", lambda f, _: {"png": f["png"]}, "no caption", "no caption"),
    ("caption in GBK", lambda f, _: f | {"txt": GBK}, "caption not UTF-8", "caption not UTF-8"),
    ("1 MB caption", lambda f, _: f | {"txt": MEGABYTE}, KEPT, KEPT),
    ("broken json", lambda f, _: f | {"json": b"{"}, "bad json", "bad json"),
]  # fmt: skip

# The same for token shards: the reason under which the loader replaces it, and what lint says (KEPT: nothing).
TOKEN_SAMPLES: list[tuple[str, Edit, str | None, str | None]] = [
    ("object-dtype .npy", lambda f, m: f | {"img.npy": object_array(m)}, "codes of wrong shape or type", "object"),
    ("pickle named .npy", lambda f, m: f | {"img.npy": pickle.dumps(Evil(m))}, "undecodable codes", "npy|codes"),
    ("code out of range", lambda f, _: f | {"img.npy": encode_codes(np.full(6, CODES))}, "code out of range", "code 50"),
    ("zero-byte .npy", lambda f, _: f | {"img.npy": b""}, "undecodable codes", "npy|codes"),
    (".pyd and .pickle beside", lambda f, m: f | dict.fromkeys(("pyd", "pickle"), pickle.dumps(Evil(m))), KEPT, KEPT),
    ("caption in GBK", lambda f, _: f | {"txt": GBK}, "caption not UTF-8", "not UTF-8"),
    ("1 MB caption", lambda f, _: f | {"txt": MEGABYTE}, "caption too long", KEPT),
]  # fmt: skip


def one_bad(edit: Edit, mark: Path) -> Callable[[int, dict[str, bytes]], dict[str, bytes]]:
    return lambda number, fields: edit(fields, mark) if number == 1 else fields


@pytest.mark.parametrize("edit, ingested, tokenized", [r[1:] for r in RAW_SAMPLES], ids=[r[0] for r in RAW_SAMPLES])
def test_raw_samples(tmp_path, edit, ingested, tokenized):
    mark = tmp_path / "executed"
    raw = make_raw(tmp_path / "raw", [4], one_bad(edit, mark))
    report = ingest([raw], tmp_path / "ingested")
    assert report["dropped"] == ({} if ingested is KEPT else {ingested: 1})
    assert report["seen"] == report["kept"] + sum(report["dropped"].values()) == 4
    manifest = tokenize(raw, tmp_path / "tokens", Averages())
    rejected = Record.load(record_path(tmp_path / "tokens", "00000.tar")).rejected
    assert [(r.key, r.reason) for r in rejected] == ([] if tokenized is KEPT else [("000000001", tokenized)])
    assert manifest.num_samples + len(rejected) == 4
    assert list(lint(tmp_path / "tokens", progress=False)) == []
    assert not mark.exists()


@pytest.mark.parametrize("edit, reason, fault", [r[1:] for r in TOKEN_SAMPLES], ids=[r[0] for r in TOKEN_SAMPLES])
def test_token_samples(tmp_path, edit, reason, fault):
    mark = tmp_path / "executed"
    folder = make_shards(tmp_path / "tokens", [4], one_bad(edit, mark))
    config = data_config(folder, max_bad_fraction=1.0)
    loader = Loader(TokenDataset.open(folder), Bytes(), SPEC, config, seed=1, global_size=4, micro_size=4)
    assert len(next(iter(loader))[0]) == 4
    assert dict(loader.bad_samples) == ({} if reason is KEPT else {reason: 1})
    found = list(lint(folder, progress=False))
    assert len(found) == (fault is not KEPT)
    for line in found:
        assert line.startswith(f"{folder / '00000.tar'}: key '000000001'") and re.search(fault, line)
    assert not mark.exists()


def test_manifest_of_another_tokenizer(tmp_path):
    folder = make_shards(tmp_path / "tokens", [4])
    for fast in (False, True):
        [fault] = lint(folder, fast=fast, progress=False, image_tokenizer_hash="another")
        assert re.search(r"manifest\.json: was made with image tokenizer tokenizer-ha.*another", fault)
        assert not list(lint(folder, fast=fast, progress=False, image_tokenizer_hash="tokenizer-hash"))
    with pytest.raises(UserError, match="made with image tokenizer tokenizer-ha"):
        Loader(
            TokenDataset.open(folder), Bytes(), SPEC, data_config(folder),
            seed=1, global_size=4, micro_size=4, image_tokenizer_hash="another",
        )  # fmt: skip
