"""Token shards behind URLs: the samples of a local folder, through a bounded cache, with errors that name the URL."""

import errno
import http.server
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data_support import SPEC, Bytes, data_config, make_shards
from vilg.config import dump_recipe, load_recipe
from vilg.config.schema import DataConfig
from vilg.data import pieces, remote
from vilg.data.dataset import TokenDataset
from vilg.data.loader import Loader, open_data
from vilg.data.manifest import Manifest
from vilg.data.order import BLOCK_SAMPLES
from vilg.data.pieces import PieceCache
from vilg.data.remote import RemoteDataset
from vilg.errors import TRY_AGAIN, UserError

SIZES = [700, 1, 900]  # blocks reach over the ends of shards
AMPLE = 1 << 30


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with byte ranges. asked: (name, begin, end) of every GET; failing: GETs to answer with `status`."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.failing, self.status, self.ranges = folder, 0, 500, True
        self.asked: list[tuple[str, int, int]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/tokens"


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        server: Server = self.server  # type: ignore[assignment]
        name = self.path.removeprefix("/tokens/")
        path = server.folder / name
        if body and server.failing:
            server.failing -= 1
            self.send_error(server.status)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        asked = self.headers.get("Range")
        if asked and server.ranges:
            begin, end = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            server.asked.append((name, begin, end))
            data, status = data[begin : end + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        """Quiet."""


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    folder = make_shards(tmp_path / "tokens", SIZES)
    local = TokenDataset.open(folder)
    for number in range(len(SIZES)):
        local.shard_index(number)
    return folder


@pytest.fixture
def server(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.0))
    one = Server(tokens)
    thread = threading.Thread(target=one.serve_forever, args=(0.01,))
    thread.start()
    yield one
    one.shutdown()
    one.server_close()
    thread.join()


def opened(url: str, cache: Path, size: int = AMPLE) -> RemoteDataset:
    return RemoteDataset.open(url, cache_dir=cache, cache_bytes=size)


def assert_same_samples(one: TokenDataset, other: TokenDataset, numbers: range) -> None:
    for number in numbers:
        ours, theirs = one.sample(number), other.sample(number)
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        assert (ours.captions, ours.meta) == (theirs.captions, theirs.meta)
        assert one.error(number, "", "").key == other.error(number, "", "").key


def test_http_gives_the_samples_of_the_folder_and_fetches_each_block_once(server, tokens, tmp_path):
    found = opened(server.url, tmp_path / "cache")
    assert found.manifest_hash == TokenDataset.open(tokens).manifest_hash
    assert_same_samples(found, TokenDataset.open(tokens), range(sum(SIZES)))
    blocks = [one for one in server.asked if one[2] - one[1] > 64 * 1024]  # the others were fingerprints
    assert len(set(blocks)) == len(blocks)
    server.asked.clear()
    assert_same_samples(opened(server.url, tmp_path / "cache"), TokenDataset.open(tokens), range(0, sum(SIZES), 50))
    assert not server.asked  # another process of the node


def batches(config: DataConfig, steps: int) -> tuple[list[np.ndarray], Loader]:
    data = open_data(config)
    loader = Loader(data, Bytes(), SPEC, config, seed=5, global_size=64, micro_size=64)
    step = iter(loader)
    return [next(step)[0].image_input.numpy() for _ in range(steps)], loader


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_reads_the_same_from_a_url(server, tokens, tmp_path, workers):
    expected, _ = batches(data_config(tokens), 40)
    remote_data = {"cache_dir": tmp_path / "cache", "workers": workers, "read_timeout": 0.0}
    found, _ = batches(DataConfig(train=server.url, **remote_data), 40)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_url_and_a_folder_blend_as_two_folders_do(tokens, tmp_path):
    other = make_shards(tmp_path / "other", [300])
    place = {"cache_dir": tmp_path / "cache"}
    expected, _ = batches(data_config(tokens, blend=[{"path": other, "weight": 1.0}]), 10)
    mixed = DataConfig(train=tokens, blend=[{"path": f"file://{other}", "weight": 1.0}], **place)
    found, _ = batches(mixed, 10)
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))


def test_what_comes_is_fetched_ahead_in_the_order_of_the_run(server, tmp_path):
    data = opened(server.url, tmp_path / "cache")
    data.read_ahead(np.array([900, 901, 10, 1500]))
    for thread in data._fetchers:
        thread.join(timeout=30)
    server.asked.clear()
    for number in (768, 899, 0, 255, 1400, 1535):
        data.sample(number)
    assert not server.asked
    data.sample(300)
    assert len(server.asked) == 1


def test_the_cache_stays_within_its_limit_over_epochs_and_keeps_few_files_open(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_LEAST_WINDOWS", 0)
    monkeypatch.setattr(remote, "_OPEN_PIECES", 2)
    total = sum(shard.bytes for shard in Manifest.load(tokens).shards)
    data, local = opened(f"file://{tokens}", tmp_path / "cache", total // 2), TokenDataset.open(tokens)
    descriptors = []
    for _epoch in range(3):
        for first in range(0, sum(SIZES), BLOCK_SAMPLES):
            assert_same_samples(data, local, range(first, first + 2))
            assert sum(file.stat().st_size for file in (tmp_path / "cache" / "pieces").iterdir()) <= total // 2
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert descriptors[0] == descriptors[-1]
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"data\.cache_gib=0\.00\d+ is too little for file://.*; use 0\.0"):
        opened(f"file://{tokens}", tmp_path / "cache", total // 2)


def test_without_an_index_the_shard_is_read_once_and_its_hash_checked(server, tokens, tmp_path):
    shutil.rmtree(tokens / "index")
    local = TokenDataset.open(shutil.copytree(tokens, tmp_path / "copy"))
    assert_same_samples(opened(server.url, tmp_path / "cache"), local, range(0, sum(SIZES), 100))
    assert not list((tmp_path / "cache").rglob(".*"))
    flipped = bytearray((tokens / "00000.tar").read_bytes())
    flipped[700] ^= 1
    (tokens / "00000.tar").write_bytes(flipped)
    with pytest.raises(UserError, match=rf"^{server.url}/00000\.tar: has SHA-256"):
        opened(server.url, tmp_path / "fresh").sample(0)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: (d / "00000.tar").unlink(), r"/00000\.tar: cannot be read: FileNotFoundError"),
        (lambda d: (d / "00000.tar").write_bytes(b"x" * 9), r"/00000\.tar: was replaced or changed: 9 bytes"),
        (lambda d: _exchange(d, b"000000001.txt", b"000000009.txt"), r"/00000\.tar: was replaced or changed"),
        (lambda d: (d / "index/00000.tar.idx").write_bytes(b"{}"), r"/index/00000\.tar\.idx: is no shard index"),
        (lambda d: shutil.copy(d / "index/00001.tar.idx", d / "index/00000.tar.idx"), "is the index of another 00000.tar"),
        (lambda d: (d / "manifest.json").unlink(), r"/manifest\.json: cannot be read: FileNotFoundError"),
        (lambda d: (d / "manifest.json").write_text("{"), r"/manifest\.json cannot be read as JSON"),
        (lambda d: (d / "manifest.json").write_text("{}"), r"/manifest\.json: 'format_version' is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_behind_a_url_is_an_error_that_names_it(server, tokens, tmp_path, spoil: Callable, message):
    spoil(tokens)
    with pytest.raises(UserError, match=f"^{server.url}.*{message}"):
        opened(server.url, tmp_path / "cache").sample(0)


def _exchange(folder: Path, old: bytes, new: bytes) -> None:
    (folder / "00000.tar").write_bytes((folder / "00000.tar").read_bytes().replace(old, new))


def test_a_failing_server_is_asked_again_and_then_named(server, tmp_path):
    data = opened(server.url, tmp_path / "cache")
    data.sample(0)
    server.failing = 2
    assert data.sample(300).captions == ("300",)
    server.failing = 100
    with pytest.raises(UserError, match=rf"^{server.url}/00000\.tar: could not be read in 3 attempts: .*500") as error:
        data.sample(600)
    assert error.value.exit_code == pickle.loads(pickle.dumps(error.value)).exit_code == TRY_AGAIN
    with pytest.raises(UserError, match=rf"^{server.url}/manifest\.json: could not be read in 3 attempts") as error:
        opened(server.url, tmp_path / "cache")
    assert error.value.exit_code == TRY_AGAIN
    server.status = 403
    with pytest.raises(UserError, match=r"00000\.tar: cannot be read: .*403") as error:
        data.sample(600)
    assert error.value.exit_code == 2 and server.failing > 90  # asked once
    server.failing, server.ranges = 0, False
    with pytest.raises(UserError, match=r"00002\.tar.*bytes came where .*the server must know ranges") as error:
        data.sample(1200)
    assert error.value.exit_code == 2


def test_stores_without_their_package_or_unknown_ones_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/x/manifest\.json: s3:// cannot be read: .*pip install s3fs"):
        opened("s3://bucket/x", tmp_path)
    with pytest.raises(UserError, match="nonsense://x/manifest.json: .*known are s3://"):
        opened("nonsense://x", tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_bytes(b"a file where a folder should be")
    with pytest.raises(UserError, match="pieces: Not a directory; data.cache_dir wants"):
        PieceCache(tmp_path / "cache" / "pieces", 100).open("name", 1, lambda: b"x")
    make_shards(tmp_path / "tokens", [2])
    with pytest.raises(UserError, match=r"00000\.tar\.idx: cannot write: Not a directory; data\.cache_dir"):
        opened(f"file://{tmp_path / 'tokens'}", tmp_path / "cache").sample(0)


def test_what_a_crash_of_the_node_has_cut_short_is_fetched_again_and_said_once(server, tokens, tmp_path, capfd):
    cache, local, all_samples = tmp_path / "cache", TokenDataset.open(tokens), range(0, sum(SIZES), 100)
    assert_same_samples(opened(server.url, cache), local, all_samples)
    for file in (cache / "pieces").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    for file, left in zip(sorted(cache.rglob("*.idx")), (0, 500, 2000), strict=True):
        os.truncate(file, min(left, file.stat().st_size - 1))
    assert_same_samples(opened(server.url, cache), local, all_samples)
    said = capfd.readouterr().err
    assert said.count("fetched again") == 1 and said.count(".tar.idx is no whole index") == len(SIZES)
    (first, *_others) = (cache / "pieces").iterdir()
    whole = first.read_bytes()
    os.truncate(first, 0)
    PieceCache(cache / "pieces", AMPLE).fetch_ahead(first.name, len(whole), lambda: whole)
    server.asked.clear()
    assert_same_samples(opened(server.url, cache), local, all_samples)
    assert not server.asked


class Disk:
    """Refuses files below a folder where those that are there leave less than so many bytes."""

    def __init__(self, folder: Path, room: int, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.room, self.create = folder, room, os.open
        monkeypatch.setattr(os, "open", self)

    def __call__(self, path, flags: int, *mode: int, **options) -> int:
        if flags & os.O_CREAT and self.folder in Path(path).parents and self.taken() > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return self.create(path, flags, *mode, **options)

    def taken(self) -> int:
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())


def test_on_a_disk_that_others_fill_pieces_make_room_for_each_other(tmp_path, monkeypatch):
    cache, data = PieceCache(tmp_path / "c" / "pieces", AMPLE // 1000), {f"{i}-10000": bytes([i]) * 10000 for i in range(30)}
    disk = Disk(tmp_path / "c", 100_000, monkeypatch)
    for name, content in data.items():
        file = cache.open(name, 10000, lambda content=content: content)
        assert os.pread(file, 20000, 0) == content
        os.close(file)
        assert disk.taken() <= 110_000
    left = {file.name for file in (tmp_path / "c" / "pieces").iterdir()}
    assert left == set(list(data)[-len(left) :]) and len(left) > 5  # the longest unused go, and no more than is needed


def test_without_any_room_small_pieces_are_read_from_memory_and_large_ones_end_the_run(tmp_path, monkeypatch, capfd):
    Disk(tmp_path, -1, monkeypatch)
    cache = PieceCache(tmp_path / "pieces", AMPLE)
    for _ in range(2):
        file = cache.open("a", 5, lambda: b"small")
        assert os.pread(file, 9, 0) == b"small"
        os.close(file)
    cache.fetch_ahead("b", 5, lambda: pytest.fail("there is no place for it"))
    assert capfd.readouterr().err.count("GiB free); every process keeps pieces in its memory") == 1
    monkeypatch.setattr(pieces, "_IN_MEMORY", 4)
    with pytest.raises(UserError, match=r"pieces: No space left on device \(.* GiB free\); data\.cache_dir wants") as error:
        cache.open("a", 5, lambda: b"large")
    assert error.value.exit_code == TRY_AGAIN and not list((tmp_path / "pieces").iterdir())


def test_an_index_takes_the_room_of_pieces_and_is_a_reason_to_try_again_without(server, tokens, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    data = opened(server.url, cache)
    data.sample(0)
    state = "until pieces go"

    def write_bytes(path: Path, content: bytes) -> int:
        if state == "for good" or any((cache / "pieces").iterdir()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        with open(path, "wb") as file:
            return file.write(content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert data.sample(SIZES[0]).captions == TokenDataset.open(tokens).sample(SIZES[0]).captions
    state = "for good"
    message = r"00002\.tar\.idx: cannot write: No space left on device \(.* GiB free\); data\.cache_dir"
    with pytest.raises(UserError, match=message) as error:
        data.sample(SIZES[0] + 1)
    assert error.value.exit_code == TRY_AGAIN


def test_a_recipe_takes_a_url_as_it_is_and_wants_a_cache_for_it(repository, tmp_path):
    url, cache = "--data.train=s3://bucket/tokens", f"--data.cache_dir={tmp_path}"
    recipe = load_recipe(repository / "launch/recipes/debug.yaml", [url, cache])
    assert recipe.data.train == "s3://bucket/tokens" and recipe.data.cache_dir == tmp_path
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    with pytest.raises(UserError, match="data.train=s3://bucket/tokens is a URL, and data.cache_dir is not set"):
        load_recipe(repository / "launch/recipes/debug.yaml", [url])
    with pytest.raises(UserError, match="is a chain of URLs"):
        load_recipe(repository / "launch/recipes/debug.yaml", ["--data.train=zip://x::s3://bucket/a.zip", cache])
    with pytest.raises(UserError, match="data.train.* should be a path"):
        load_recipe(repository / "launch/recipes/debug.yaml", ["--data.train=5"])


def test_several_processes_fetch_once_and_none_waits_for_one_that_hangs(tmp_path, monkeypatch):
    cache, begun, go_on, fetched = PieceCache(tmp_path / "c", 1000), threading.Event(), threading.Event(), []

    def slow() -> bytes:
        begun.set()
        go_on.wait(30)
        return b"slow"

    holder = threading.Thread(target=lambda: os.close(cache.open("a", 4, slow)))
    holder.start()
    assert begun.wait(30)
    cache.fetch_ahead("a", 4, lambda: fetched.append("ahead") or b"")  # leaves it to the other
    monkeypatch.setattr(pieces, "_PATIENCE", 0.05)
    file = cache.open("a", 4, lambda: fetched.append("again") or b"fast")
    assert fetched == ["again"] and os.pread(file, 9, 0) == b"fast"
    go_on.set()
    holder.join(timeout=30)
    assert os.pread(file, 9, 0) == b"fast"  # whole, though its name now leads to the other copy
    os.close(file)
