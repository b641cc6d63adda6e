"""Writing files so that a reader sees the old content or the new, never half of one."""

import contextlib
import os
from pathlib import Path

from vilg.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename. Raises UserError if the folder cannot be written to (rights, space)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # where nothing could be made, there is nothing to remove either
            temporary.unlink(missing_ok=True)
