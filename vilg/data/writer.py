"""Writing shards: plain POSIX tars whose bytes depend on their content only."""

import hashlib
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

from vilg.data.tar import BLOCK, padded
from vilg.errors import UserError


class ShardWriter:
    """Writes one shard to a temporary name; `close` flushes it to disk and renames it to `path`.

    Owner, mode and time are fixed, so equal samples give equal bytes. As a context manager it closes on success and
    removes the temporary file on an exception.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without the process id: a job killed here is started again and overwrites its own leftover.
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._file = open(self._temporary, "wb")
        self._digest = hashlib.sha256()
        self._keys: set[str] = set()
        self.bytes = 0
        self.sha256 = ""

    @property
    def samples(self) -> int:
        return len(self._keys)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_exc: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def discard(self) -> None:
        """Give the shard up and remove the temporary file."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, key: str, fields: Mapping[str, bytes]) -> None:
        """Append a sample: one member `key.field` for each field, in the given order."""
        if not key or "." in key.rpartition("/")[2] or key in self._keys:
            raise UserError(f"{self.path}: key {key!r} is empty, holds a dot or comes twice")
        self._keys.add(key)
        for field, data in fields.items():
            info = tarfile.TarInfo(f"{key}.{field}")
            info.size, info.mode, info.mtime = len(data), 0o644, 0
            self._append(info.tobuf(tarfile.PAX_FORMAT))
            self._append(data.ljust(padded(len(data)), b"\0"))

    def close(self) -> None:
        """Finish the archive and give it its name; afterwards `bytes` and `sha256` describe the file."""
        total = self.bytes + 2 * BLOCK
        self._append(bytes(2 * BLOCK + -total % tarfile.RECORDSIZE))
        self.sha256 = self._digest.hexdigest()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)
