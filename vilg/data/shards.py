"""Shards with random access: samples grouped by key, an index of byte ranges, and a reader by `pread`.

A sample is a run of neighbouring members with one key. webdataset's rule splits a name: the key is the directory and
the base name up to its first dot, the field is the rest in lower case (`a/01.img.npy` -> key `a/01`, field `img.npy`).
webdataset would therefore merge `cat.1.jpg` and `cat.2.jpg` into one sample `cat`; here a key with dots is an error.

The index is a file of one JSON line and one array [samples, 1 + 2 * fields] of uint32 (uint64 from 4 GiB): start of the
sample, then offset and size of each field (offset 0: the field is missing). 28 bytes a sample for three fields.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vilg.data.tar import ByteSource, Member, ShardError, members, pread_all
from vilg.tokens.files import write_atomically
from vilg.tokens.vqgan.images import IMAGE_SUFFIXES

TOKEN_FIELDS = ("img.npy", "txt", "json")
PIXELS = "png"  # field of the resized image, in token shards for end-to-end training
IMAGE_FIELDS = IMAGE_SUFFIXES
RAW_FIELDS = (*IMAGE_FIELDS, "txt", "json")
INDEX_VERSION = 1
_INDEX_HEADER = 1024  # bytes of the JSON line, padded with blanks


@dataclass(frozen=True)
class ShardIndex:
    """Byte ranges of one shard's samples.

    bytes, sha256, fingerprint: identity of the file indexed (`fingerprint` is quick to recompute, see there).
    table: unsigned [samples, 1 + 2 * len(fields)], as described at the top of this file.
    """

    bytes: int
    sha256: str
    fingerprint: str
    fields: tuple[str, ...]
    table: np.ndarray

    def __len__(self) -> int:
        return len(self.table)

    def save(self, path: Path) -> None:
        """Write under a temporary name, then rename. Raises UserError if the place is not writable."""
        header = {
            "format_version": INDEX_VERSION,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "fingerprint": self.fingerprint,
            "fields": self.fields,
            "samples": len(self.table),
            "dtype": self.table.dtype.str,
        }
        write_atomically(path, json.dumps(header).encode().ljust(_INDEX_HEADER - 1) + b"\n" + self.table.tobytes())

    @staticmethod
    def load(path: Path) -> "ShardIndex":
        """Read with the table mapped, not copied. Raises ShardError if this is no whole index of our version."""
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(_INDEX_HEADER))
            if header["format_version"] != INDEX_VERSION:
                raise ShardError(path, f"index version {header['format_version']!r} is unknown; delete the file")
            shape = (header["samples"], 1 + 2 * len(header["fields"]))
            dtype = np.dtype({"<u4": "<u4", "<u8": "<u8"}[header["dtype"]])
            if os.path.getsize(path) != _INDEX_HEADER + shape[0] * shape[1] * dtype.itemsize:
                raise ShardError(path, "the index file is incomplete; delete it, it will be made again")
            if shape[0]:
                table = np.memmap(path, dtype, "r", _INDEX_HEADER, shape).view(np.ndarray)  # whose rows are quicker
            else:
                table = np.zeros(shape, dtype)
            return ShardIndex(
                header["bytes"], header["sha256"], header["fingerprint"], tuple(header["fields"]), table
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError(path, f"is no shard index ({error!r}); delete it, it will be made again") from error


def split_name(name: str) -> tuple[str, str] | None:
    """(key, field) of a member's name by webdataset's rule; None if the base name has no key or no field."""
    folder, slash, base = name.rpartition("/")
    stem, dot, field = base.partition(".")
    return (folder + slash + stem, field.lower()) if stem and dot and field else None


def fingerprint(source: ByteSource) -> str:
    """SHA-256 (hex) over the size, both ends and eight places in between: 160 KiB read whatever the size.

    Tells a replaced shard at once (other codes, other headers); a single flipped byte is `vilg data lint`'s business.
    """
    digest = hashlib.sha256(str(source.size).encode())
    end, piece = 64 * 1024, 4096
    digest.update(source.read(0, end))
    for i in range(1, 9):
        digest.update(source.read(source.size * i // 9, piece))
    digest.update(source.read(max(0, source.size - end), end))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a whole file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def index_shard(
    shard: Path,
    fields: Sequence[str],
    *,
    sha256: str | None = None,
    on_fault: Callable[[ShardError], None] | None = None,
) -> ShardIndex:
    """Walk a shard's headers and group its members into samples.

    sha256: of the file where the caller knows it, else computed by reading the file once. Members with other fields are
    left alone (they are never opened). Raises ShardError at the first fault; with `on_fault`, faults of grouping (a key
    that comes twice, a field given twice, a key with dots, a sample with none of the fields) are handed over instead
    and the member or sample is left out; a broken archive still raises: nothing behind the break can be trusted.
    """

    def fault(message: str, member: Member, key: str | None = None) -> None:
        error = ShardError(shard, message, byte=member.start, key=key)
        if on_fault is None:
            raise error
        on_fault(error)

    column = {field: 1 + 2 * i for i, field in enumerate(fields)}
    rows: list[list[int]] = []
    seen: set[str] = set()
    current: str | None = None
    row: list[int] = []
    first: Member | None = None

    def close() -> None:
        if first is not None:
            if any(row[1::2]):
                rows.append(row)
            else:
                fault(f"the sample has none of the fields {', '.join(fields)}", first, current)

    with ByteSource(shard) as source:
        for member in members(source):
            split = split_name(member.name)
            if split is None:
                fault(f"member {member.name!r} is not KEY.FIELD", member)
                continue
            key, field = split
            if field not in column and any(field.endswith("." + known) for known in column):
                fault(f"member {member.name!r} has a key with a dot; webdataset would read {key!r}: rename it", member)
                continue
            if key != current:
                close()
                if key in seen:
                    fault("the key comes twice, or its members are interleaved with another sample's", member, key)
                    current, first = key, None
                    continue
                seen.add(key)
                current, first, row = key, member, [member.start, *[0] * (2 * len(fields))]
            if field in column and first is not None:  # else: a member of a sample that is left out
                at = column[field]
                if row[at]:
                    fault(f"field {field!r} comes twice", member, key)
                    continue
                row[at], row[at + 1] = member.offset, member.size
        close()
        dtype = np.dtype("<u4" if source.size < 1 << 32 else "<u8")
        table = np.array(rows, dtype).reshape(len(rows), 1 + 2 * len(fields))
        digest = sha256 if sha256 is not None else file_sha256(shard)
        return ShardIndex(source.size, digest, fingerprint(source), tuple(fields), table)


class ShardReader:
    """Random access to an indexed shard. Refuses a file that is not the one indexed (size or fingerprint differ)."""

    def __init__(self, shard: Path, index: ShardIndex, *, verify: bool = True):
        self.shard, self.index = Path(shard), index
        with ByteSource(self.shard) as source:
            if source.size != index.bytes or (verify and fingerprint(source) != index.fingerprint):
                raise ShardError(
                    self.shard,
                    f"was replaced or changed since it was indexed ({index.bytes} bytes then, {source.size} now); "
                    "`vilg data lint` says more",
                )
        self._fd = os.open(self.shard, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __len__(self) -> int:
        return len(self.index)

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)
        del self._fd

    def __del__(self) -> None:  # readers are left behind, unclosed, where a read is tried again with new ones
        if hasattr(self, "_fd"):
            self.close()

    def read(self, sample: int) -> dict[str, bytes]:
        """The present fields of a sample, in the order of `index.fields`; one `pread` where its members are close."""
        row = self.index.table[sample].tolist()
        parts = [(f, row[1 + 2 * i], row[2 + 2 * i]) for i, f in enumerate(self.index.fields) if row[1 + 2 * i]]
        begin = min(offset for _, offset, _ in parts)
        end = max(offset + size for _, offset, size in parts)
        if end - begin > 64 * 1024 + 2 * sum(size for _, _, size in parts):  # a large member lies in between
            return {field: self._pread(offset, size) for field, offset, size in parts}
        data = self._pread(begin, end - begin)
        return {field: data[offset - begin : offset - begin + size] for field, offset, size in parts}

    def key(self, sample: int) -> str:
        """The sample's key, read back from the shard: for messages, the index does not hold it."""
        with ByteSource(self.shard) as source:
            split = split_name(next(members(source, start=int(self.index.table[sample, 0]))).name)
        if split is None:
            raise ShardError(self.shard, "has no sample where the index says", byte=int(self.index.table[sample, 0]))
        return split[0]

    def _pread(self, offset: int, size: int) -> bytes:
        data = pread_all(self._fd, offset, size)
        if len(data) < size:
            raise ShardError(self.shard, "ended while it was read; it was cut short since it was indexed", byte=offset)
        return data
