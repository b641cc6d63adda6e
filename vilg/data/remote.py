"""Token shards behind a URL (s3://, gs://, http:// and whatever fsspec knows), read through a bounded local cache.

The order (`order.py`) visits blocks of 256 neighbouring samples, and each epoch meets every shard dozens of times. Whole
shards would therefore be fetched dozens of times wherever the cache is smaller than the data; what is fetched here is
the byte range of one block, about a megabyte, once an epoch. The next two windows of the order are fetched ahead.

The samples are the same as from a local folder with that manifest, so a run may move from one to the other.
"""

import json
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vilg.data.dataset import INDEX_FOLDER, TokenDataset, index_path, spare_index_folder
from vilg.data.manifest import FILE_NAME, Manifest, ShardEntry
from vilg.data.order import BLOCK_SAMPLES, WINDOW_SAMPLES
from vilg.data.pieces import PieceCache, disk_is_full, free_space
from vilg.data.shards import ShardIndex, ShardReader, file_sha256, fingerprint, index_shard, split_name
from vilg.data.tar import ShardError, members, pread_all
from vilg.errors import TRY_AGAIN, USER_MISTAKE, UserError

Result = TypeVar("Result")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_REFUSALS = ("401", "403", "410")  # HTTP: unauthorized, forbidden, gone
_PAUSES = (0.5, 2.0, 8.0)  # seconds before a read that failed is tried again
_FETCHERS = 4  # threads of a process that fetch ahead, while there is anything to fetch
_OPEN_PIECES = 64  # file descriptors per process; a window of the order touches 32 at most
_LEAST_WINDOWS = 4  # that the cache must hold: the one being read, two ahead, and one for borders


class Url(str):
    """A folder or file behind a URL, joined like a Path."""

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.rstrip('/')}/{name}")


def read_url(url: Url, begin: int | None = None, end: int | None = None) -> bytes:
    """The bytes begin..end - 1 of a file, or all of it. Raises as `_patiently`."""

    def read(store: Any) -> bytes:
        data = store.cat_file(url, start=begin, end=end)
        if end is not None and len(data) != end - begin:
            raise UserError(f"{len(data)} bytes came where {end - begin} were asked for; the server must know ranges", USER_MISTAKE)
        return data

    return _patiently(url, read)


def _patiently(url: Url, action: Callable[[Any], Result]) -> Result:
    """`action` with the file system of a URL, several times if need be.

    Raises ShardError naming the URL: not there, forbidden, or no answer after all attempts; UserError if the package
    for such URLs is missing; OSError if the disk is full to which `action` copies.
    """
    store = _filesystem(url)
    for pause in (*_PAUSES, None):
        try:
            return action(store)
        except Exception as error:  # every kind of store has its own
            if isinstance(error, (FileNotFoundError, PermissionError)) or _is_refusal(error):
                raise ShardError(url, f"cannot be read: {type(error).__name__}: {error}", exit_code=USER_MISTAKE) from error
            if disk_is_full(error):
                raise
            if pause is None:
                what = f"{type(error).__name__}: {error}"
                message = f"could not be read in {len(_PAUSES) + 1} attempts: {what}"
                lasting = isinstance(error, UserError)  # of `action`
                raise ShardError(url, message, exit_code=USER_MISTAKE if lasting else TRY_AGAIN) from error
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _is_refusal(error: Exception) -> bool:
    """Over HTTP, or as gcsfs says it."""
    status = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return str(status) in _REFUSALS or (isinstance(error, OSError) and str(error).startswith("Forbidden"))


def _filesystem(url: Url) -> Any:
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        hint = f"pip install {package}" if package else "install the package that it names"
        raise UserError(f"{url}: {protocol}:// cannot be read: {error}; {hint}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; known are s3://, gs://, http(s):// and what fsspec knows besides") from error


class RemoteDataset(TokenDataset):
    """`TokenDataset` of a URL. Indices come from the `index` folder beside the shards, or are made by reading a shard
    once; a shard's fingerprint is checked when the node meets it first."""

    is_remote = True

    def __init__(self, url: Url, manifest: Manifest, cache_dir: Path, cache_bytes: int):
        super().__init__(url, manifest, (spare_index_folder(cache_dir, manifest),))
        self.cache_dir, self.cache_bytes = Path(cache_dir), cache_bytes
        self.cache = PieceCache(Path(cache_dir) / "pieces", cache_bytes)
        self._pieces: OrderedDict[str, int] = OrderedDict()  # name -> descriptor
        self._wanted: deque[tuple[int, int]] = deque()
        self._fetchers: list[threading.Thread] = []

    @staticmethod
    def open(url: str, *, cache_dir: Path, cache_bytes: int) -> "RemoteDataset":
        """Read and check the manifest. Raises UserError naming the URL, or data.cache_gib if that is too little."""
        url = Url(url)
        where = url / FILE_NAME
        content = read_url(where)
        try:
            data = json.loads(content.decode("utf-8"))
        except ValueError as error:
            raise UserError(f"{where} cannot be read as JSON: {error}") from None
        manifest = Manifest.parse(data, where)
        if manifest.num_samples == 0:
            raise UserError(f"{url} holds no samples")
        sample = sum(shard.bytes for shard in manifest.shards) / manifest.num_samples
        least = int(min(manifest.num_samples, _LEAST_WINDOWS * WINDOW_SAMPLES) * sample)
        if cache_bytes < least:
            raise UserError(
                f"data.cache_gib={cache_bytes / 2**30:.3g} is too little for {url}, whose samples take {sample:.0f} "
                f"bytes; use {least / 2**30:.3g} or more"
            )
        return RemoteDataset(url, manifest, cache_dir, cache_bytes)

    def __reduce__(self):
        return RemoteDataset, (self.folder, self.manifest, self.cache_dir, self.cache_bytes)

    def __del__(self) -> None:
        for file in getattr(self, "_pieces", {}).values():
            os.close(file)

    def shard_index(self, number: int) -> ShardIndex:
        """As of a local folder; kept under the cache directory (28 bytes a sample, beside `data.cache_gib`)."""
        entry = self.manifest.shards[number]
        if self.saved_index(number) is not None:
            try:
                return super().shard_index(number)
            except ShardError as error:
                note = f"note: {error.shard} is no whole index, perhaps since a crash of the node; it is made again"
                print(note, file=sys.stderr, flush=True)
        url, saved = (index_path(place, entry.name) for place in (Url(self.folder / INDEX_FOLDER), self.index_folders[0]))
        self.cache.with_room(entry.bytes, lambda: self._fetch_index(url, self.folder / entry.name, entry, saved))
        return super().shard_index(number)

    def read_ahead(self, numbers: np.ndarray) -> None:
        """Begin to fetch what samples (int64 [n]) will need, in that order; returns at once."""
        _, first_seen = np.unique(numbers // BLOCK_SAMPLES, return_index=True)
        blocks = (numbers // BLOCK_SAMPLES)[np.sort(first_seen)]
        self._wanted = deque(piece for block in blocks.tolist() for piece in self._pieces_of(block))
        self._fetchers = [thread for thread in self._fetchers if thread.is_alive()]
        for _ in range(_FETCHERS - len(self._fetchers)):
            self._fetchers.append(threading.Thread(target=self._fetch_wanted, name="read ahead", daemon=True))
            self._fetchers[-1].start()

    def _fetch_wanted(self) -> None:
        while True:
            try:
                number, piece = self._wanted.popleft()
            except IndexError:
                return
            try:
                self.cache.fetch_ahead(*self._piece(number, self._bounds(number, self.shard_index(number)), piece))
            except UserError:  # whoever reads the sample meets it too, and says so
                return

    def _pieces_of(self, block: int) -> list[tuple[int, int]]:
        """(shard, piece of the shard) of a block; more than one where it reaches over the end of a shard."""
        found, sample = [], block * BLOCK_SAMPLES
        while sample < min(self.num_samples, (block + 1) * BLOCK_SAMPLES):
            number, row = self._locate(sample)
            found.append((number, (sample // BLOCK_SAMPLES) - ((sample - row) // BLOCK_SAMPLES)))
            sample += self.manifest.shards[number].samples - row
        return found

    def _bounds(self, number: int, index: ShardIndex) -> np.ndarray:
        """Where the pieces of a shard begin and the last one ends: int64 [pieces + 1] bytes."""
        first = self._ends[number] - len(index)
        rows = np.arange(-(first % BLOCK_SAMPLES), len(index), BLOCK_SAMPLES).clip(0)
        return np.array([0, *index.table[rows[1:], 0].tolist(), index.bytes], np.int64)

    def _piece(self, number: int, bounds: np.ndarray, piece: int) -> tuple[str, int, Callable[[], bytes]]:
        """Name of a piece in the cache, its size, and what fetches it."""
        entry, url = self.manifest.shards[number], self.folder / self.manifest.shards[number].name
        begin, end = int(bounds[piece]), int(bounds[piece + 1])
        return f"{entry.sha256[:32]}-{begin}-{end}", end - begin, lambda: read_url(url, begin, end)

    def _reader(self, number: int) -> ShardReader:
        reader = self._readers.get(number)
        if reader is None:
            index = self.shard_index(number)
            bounds = self._bounds(number, index)

            def opened(piece: int) -> int:
                name, size, fetch = self._piece(number, bounds, piece)
                file = self._pieces.get(name)
                if file is None:
                    file = self._pieces[name] = self.cache.open(name, size, fetch)
                    if len(self._pieces) > _OPEN_PIECES:
                        os.close(self._pieces.popitem(last=False)[1])
                else:
                    self._pieces.move_to_end(name)
                return file

            reader = PieceReader(self.folder / self.manifest.shards[number].name, index, bounds, opened)
            self._readers[number] = reader
            if len(self._readers) > _OPEN_PIECES:
                self._readers.popitem(last=False)
        self._readers.move_to_end(number)
        return reader

    def _fetch_index(self, url: Url, shard: Url, entry: ShardEntry, saved: Path) -> None:
        temporary = saved.with_name(f".{saved.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            saved.parent.mkdir(parents=True, exist_ok=True)
            try:
                content = read_url(url)
            except ShardError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                index = _index_of_whole(shard, entry.sha256, temporary, self.manifest.fields)
                index.save(temporary)
            else:
                temporary.write_bytes(content)
                index = ShardIndex.load(temporary)
            if (index.bytes, index.sha256, len(index)) != (entry.bytes, entry.sha256, entry.samples):
                raise ShardError(url, f"is the index of another {entry.name} than the manifest's")
            size = _patiently(shard, lambda store: store.size(shard))
            if size != entry.bytes or fingerprint(_Ranges(shard, size)) != index.fingerprint:
                raise ShardError(shard, f"was replaced or changed: {size} bytes, the manifest says {entry.bytes}")
            os.replace(temporary, saved)
        except ShardError as error:
            raise _of(url, error, temporary) from None
        except OSError as error:
            room = free_space(saved.parent, error)
            raise UserError(f"{saved}: cannot write: {error.strerror}{room}; data.cache_dir must be writable") from error
        finally:
            if temporary.exists():
                temporary.unlink()


class PieceReader(ShardReader):
    """A shard of which only pieces are here. bounds: of `_bounds`; opened: descriptor of a piece."""

    def __init__(self, shard: Url, index: ShardIndex, bounds: np.ndarray, opened: Callable[[int], int]):
        self.shard, self.index, self.size = shard, index, index.bytes
        self._bounds, self._opened = bounds, opened

    def close(self) -> None:
        """Nothing is held open here."""

    def key(self, sample: int) -> str:
        """As of a local shard."""
        found = next(members(_Members(self), start=int(self.index.table[sample, 0])))
        split = split_name(found.name)
        if split is None:
            raise ShardError(self.shard, "has no sample where the index says", byte=found.start)
        return split[0]

    def _pread(self, offset: int, size: int) -> bytes:
        piece = int(np.searchsorted(self._bounds, offset, side="right")) - 1
        data = pread_all(self._opened(piece), offset - int(self._bounds[piece]), size)
        if len(data) < size:
            message = "a piece in the cache was cut short while it was read; the next start fetches it again"
            raise ShardError(self.shard, message, byte=offset, exit_code=TRY_AGAIN)
        return data


class _Members:
    """What `members` needs of a byte source, from the pieces of a shard."""

    def __init__(self, reader: PieceReader):
        self.shard, self.size, self.read = reader.shard, reader.size, reader._pread


class _Ranges:
    """What `fingerprint` needs of a byte source, straight from the URL."""

    def __init__(self, shard: Url, size: int):
        self.shard, self.size = shard, size

    def read(self, position: int, length: int) -> bytes:
        end = min(position + length, self.size)
        return read_url(self.shard, position, end) if end > position else b""


def _index_of_whole(shard: Url, sha256: str, temporary: Path, fields: Sequence[str]) -> ShardIndex:
    """The index of a shard that came without one: it is read once as a whole, and so is its hash checked."""
    whole = temporary.with_name(f"{temporary.name}.tar")
    try:
        _patiently(shard, lambda store: store.get_file(shard, str(whole)))
        if (found := file_sha256(whole)) != sha256:
            raise ShardError(shard, f"has SHA-256 {found}, the manifest says {sha256}: damaged or replaced")
        return index_shard(whole, fields, sha256=sha256)
    except ShardError as error:
        raise _of(shard, error, whole) from None
    finally:
        whole.unlink(missing_ok=True)


def _of(url: Url, error: ShardError, local: Path) -> ShardError:
    """The error with the URL in place of the local copy's name."""
    if str(error.shard) != str(local):
        return error
    return ShardError(url, error.reason, byte=error.byte, key=error.key)
