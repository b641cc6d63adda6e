"""Whether a checkpoint's files hold the bytes that were written: their checksums against those in `run_state.json`."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from vilg.checkpoint.save import LATEST
from vilg.checkpoint.state import RunState
from vilg.checkpoint.tensors import checksum
from vilg.errors import UserError

_MOST_THREADS = 4  # zlib's CRC-32 takes 1 to 2 GB/s of a core: more of them than a disk feeds


def verify_files(checkpoint: Path, state: RunState, *, rank: int, world_size: int) -> None:
    """Read this rank's share of the files, the ranks' shares together being all, and compare their checksums.

    Done before anybody loads: a damaged file would otherwise end one rank inside DeepSpeed and leave the others waiting
    there. Every byte is read once over the whole job. Raises UserError naming the file.
    """
    largest_first = sorted(state.checksums, key=lambda name: (-state.files[name], name))
    for name in largest_first[rank::world_size]:
        verify_file(checkpoint, state, name)


def verify_file(checkpoint: Path, state: RunState, name: str) -> None:
    """Read one file and compare its checksum. Raises UserError naming it."""
    path = checkpoint / name
    try:
        found = checksum(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); use an earlier checkpoint") from None
    if found != state.checksums[name]:
        raise UserError(
            f"{path}: its bytes changed since it was written (CRC-32 {found} instead of {state.checksums[name]}); "
            f"the disk or a copy damaged it. Use an earlier checkpoint: write its name into {LATEST}"
        )


class ReadFiles:
    """Verifies the files that somebody reads meanwhile, each once, in threads beside the reading, so that bytes come
    from the disk once where memory holds them.

        with ReadFiles() as files:
            weights = open_weights(checkpoint, on_open=files.add)

    On leaving it waits for all, and raises UserError naming the first that was damaged, also in place of an error that
    the damage may have led to.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="checksum")
        self._found: dict[str, Future] = {}

    def add(self, checkpoint: Path, state: RunState, name: str) -> None:
        """Have a file of the checkpoint verified, unless that was asked for before."""
        if name not in self._found:
            self._found[name] = self._threads.submit(verify_file, checkpoint, state, name)

    def __enter__(self) -> "ReadFiles":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not isinstance(error, UserError):
            self._threads.shutdown(cancel_futures=True)
            return
        self._threads.shutdown()
        for found in self._found.values():
            found.result()
