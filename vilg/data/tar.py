"""A strict tar reader: every member of a shard, or an error naming shard and byte. Nothing is skipped silently.

Understands ustar (with prefix), GNU long names and PAX path / size records. Reads headers only, by `pread`.
Format: POSIX.1-2017 `pax`, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from vilg.errors import UserError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_CHUNK = 64 * 1024  # bytes per pread: many headers of small members at once
_MAX_EXTENSION = 1 << 20  # bytes of a PAX or long-name record; longer ones are damage, not names

_REGULAR, _DIRECTORY, _LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"0", b"5", b"L", b"K", b"x", b"g"
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}


class ShardError(UserError):
    """A shard that cannot be trusted; names the shard and, where known, the byte or the key."""

    def __init__(self, shard: Path | str, message: str, *, byte: int | None = None, key: str | None = None,
                 exit_code: int | None = None):  # fmt: skip
        where = f" byte {byte}" if byte is not None else ""
        where += f" key {key!r}" if key is not None else ""
        super().__init__(f"{shard}:{where} {message}" if where else f"{shard}: {message}", exit_code)
        self.shard, self.byte, self.key, self.reason = shard, byte, key, message

    def __reduce__(self):  # the default would call ShardError(full message), which loses the parts
        return partial(ShardError, byte=self.byte, key=self.key, exit_code=self.exit_code), (self.shard, self.reason)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar. `start`: byte of its first header block, extension headers included; `offset` and
    `size`: byte range of its data."""

    name: str
    start: int
    offset: int
    size: int


class ByteSource:
    """Read-only file accessed by `pread` through one buffer; safe to use from a forked process."""

    def __init__(self, shard: Path):
        self.shard = shard
        try:
            self._fd = os.open(shard, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise ShardError(shard, f"cannot be opened: {error.strerror}") from error
        self.size = os.fstat(self._fd).st_size
        self._buffer, self._buffer_start = b"", 0

    def __enter__(self) -> "ByteSource":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def read(self, position: int, length: int) -> bytes:
        """`length` bytes at `position`, fewer at the end of the file."""
        begin = position - self._buffer_start
        if begin < 0 or begin + length > len(self._buffer):
            self._buffer = pread_all(self._fd, position, max(length, _CHUNK))
            self._buffer_start, begin = position, 0
        return self._buffer[begin : begin + length]


def pread_all(fd: int, position: int, length: int) -> bytes:
    """`length` bytes at `position`, fewer only at the end of the file (one `pread` may return less)."""
    data = os.pread(fd, length, position)
    while len(data) < length:
        more = os.pread(fd, length - len(data), position + len(data))
        if not more:
            break
        data += more
    return data


def members(source: ByteSource, start: int = 0) -> Iterator[Member]:
    """Every regular member in file order, beginning with the header at byte `start`.

    Raises ShardError for anything that is not a well-formed archive from the first byte to its end-of-archive blocks:
    bad checksum, a member beyond the end of the file, a missing end, data behind the end, links, devices, absolute
    names and names with `..`. Directories are passed over.
    """
    shard, position = source.shard, start
    first: int | None = None  # of the extension headers that belong to the next member
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = source.read(position, BLOCK)
        if len(header) < BLOCK:
            what = "inside a header" if header else "without an end-of-archive block"
            raise ShardError(shard, f"the file ends {what}; it was cut short", byte=position)
        if header == _ZEROS:
            if first is not None:
                raise ShardError(shard, "the archive ends after an extension header without its member", byte=first)
            _check_end(source, position)
            return
        _check_checksum(shard, header, position)
        kind = header[156:157]
        size = _number(shard, header[124:136], position, "size")
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            if size > _MAX_EXTENSION:
                raise ShardError(shard, f"an extension header claims {size} bytes", byte=position)
            payload = _payload(source, position, size)
            first = position if first is None else first
            if kind == _LONG_NAME:
                long_name = _text(shard, payload.rstrip(b"\0"), position)
            elif kind == _PAX:
                pax = _pax_records(shard, payload, position)
            elif kind == _PAX_GLOBAL:
                _refuse_global_names(shard, _pax_records(shard, payload, position), position)
                first = None if long_name is None and not pax else first
            position += BLOCK + padded(size)
            continue
        if "size" in pax:
            if not pax["size"].isascii() or not pax["size"].isdigit():
                raise ShardError(shard, f"PAX size {pax['size']!r} is no number", byte=position)
            size = int(pax["size"])
        if any(name.startswith("GNU.sparse") for name in pax):
            raise ShardError(shard, "holds a sparse file; only regular files are read", byte=position)
        name = pax.get("path") or long_name or _short_name(shard, header, position)
        begin = position if first is None else first
        first, long_name, pax = None, None, {}
        if kind == _DIRECTORY:
            position += BLOCK
            continue
        if kind not in (_REGULAR, b"\0"):
            what = _REFUSED.get(kind, f"a member of type {kind!r}")
            raise ShardError(shard, f"member {name!r} is {what}; only regular files are read", byte=position)
        data_end = position + BLOCK + padded(size)
        if data_end > source.size:
            what = f"member {name!r} of {size} bytes reaches {data_end}, beyond the file's {source.size}"
            raise ShardError(shard, what, byte=position)
        yield Member(_safe_name(shard, name, position), begin, position + BLOCK, size)
        position = data_end


def padded(size: int) -> int:
    """Bytes that `size` bytes of data occupy in a tar."""
    return -(-size // BLOCK) * BLOCK


def _check_checksum(shard: Path, header: bytes, position: int) -> None:
    stored = _number(shard, header[148:156], position, "checksum")
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    # Some old writers summed signed bytes; the two differ only where a byte exceeds 127.
    if stored != unsigned and stored != unsigned - 256 * sum(b > 127 for b in header[:148] + header[156:]):
        what = f"header checksum is {stored}, the block's bytes give {unsigned}: damaged"
        raise ShardError(shard, what, byte=position)


def _number(shard: Path, field: bytes, position: int, what: str) -> int:
    if field[0] & 0x80:  # GNU base-256 for numbers beyond octal's reach
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    else:
        digits = field.strip(b" \0")
        try:
            value = int(digits or b"0", 8)
        except ValueError:
            raise ShardError(shard, f"header {what} {field!r} is no octal number: damaged", byte=position) from None
    if value < 0:
        raise ShardError(shard, f"header {what} is negative: damaged", byte=position)
    return value


def _short_name(shard: Path, header: bytes, position: int) -> str:
    name = header[:100].split(b"\0", 1)[0]
    # GNU's magic ("ustar  ") keeps times where POSIX keeps the prefix.
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _text(shard, name, position)


def _text(shard: Path, raw: bytes, position: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ShardError(shard, f"member name {raw!r} is not UTF-8", byte=position) from None


def _payload(source: ByteSource, position: int, size: int) -> bytes:
    payload = source.read(position + BLOCK, size)
    if len(payload) < size:
        raise ShardError(source.shard, "the file ends inside an extension header; it was cut short", byte=position)
    return payload


def _pax_records(shard: Path, payload: bytes, position: int) -> dict[str, str]:
    """`length key=value\\n` records; length counts itself."""

    def damaged() -> NoReturn:
        raise ShardError(shard, "the PAX header is malformed: damaged", byte=position)

    records, rest = {}, payload
    while rest.strip(b"\0"):
        digits, separator, _ = rest.partition(b" ")
        if not separator or not digits.isdigit() or len(digits) > 8:
            damaged()
        record, rest = rest[len(digits) + 1 : int(digits)], rest[int(digits) :]
        key, separator, value = record.partition(b"=")
        if not separator or not value.endswith(b"\n"):
            damaged()
        name = key.decode("utf-8", "replace")
        records[name] = _text(shard, value[:-1], position) if name in ("path", "size") else ""
    return records


def _refuse_global_names(shard: Path, records: dict[str, str], position: int) -> None:
    if "path" in records or "size" in records:
        raise ShardError(shard, "a global PAX header sets path or size for all members", byte=position)


def _safe_name(shard: Path, name: str, position: int) -> str:
    while name.startswith("./"):
        name = name[2:]
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ShardError(shard, f"member name {name!r} leads outside the archive", byte=position)
    return name


def _check_end(source: ByteSource, position: int) -> None:
    """Two zero blocks, then only zeros: a second archive behind the first would be lost silently."""
    if position + 2 * BLOCK > source.size:
        raise ShardError(source.shard, "only one end-of-archive block; the file was cut short", byte=position)
    while position < source.size:
        chunk = source.read(position, min(_CHUNK, source.size - position))
        if not chunk:
            raise ShardError(source.shard, "the file shrank while it was read", byte=position)
        if chunk.count(0) != len(chunk):
            offset = position + len(chunk) - len(chunk.lstrip(b"\0"))
            raise ShardError(source.shard, "data behind the end-of-archive block would never be read", byte=offset)
        position += len(chunk)
