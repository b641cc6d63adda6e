"""A read that stalls or fails is reported with its shard, tried again, and ends as an error instead of a hang."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.data_support import SPEC, Bytes, data_config, make_shards
from vilg.data import patience
from vilg.data.loader import Loader, TokenDataset
from vilg.data.shards import ShardReader
from vilg.data.tar import ShardError
from vilg.errors import TRY_AGAIN, USER_MISTAKE, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("tokens"), [20, 20])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(patience, "PAUSES", (0.01, 0.02, 0.03))


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """Set at the end of the test, so that threads that were given up end, and read nothing during the next test."""
    event = threading.Event()
    yield event
    event.set()
    for thread in threading.enumerate():
        if thread.name.startswith("step at "):
            thread.join(60)


def loader(folder: Path, timeout: float) -> Loader:
    config = data_config(folder, read_timeout=timeout)
    return Loader(
        TokenDataset.open(folder), Bytes(), SPEC, config, seed=0, global_size=8, micro_size=8, data_rank=0, data_size=1
    )


def stall(monkeypatch, never: threading.Event, *, times: int) -> list[Path]:
    """The first `times` reads block until `never`; the shards of all reads."""
    read, asked = ShardReader.read, []

    def slow(self: ShardReader, sample: int):
        asked.append(self.shard)
        if len(asked) <= times:
            never.wait(60)
        return read(self, sample)

    monkeypatch.setattr(ShardReader, "read", slow)
    return asked


def test_a_stalled_read_is_named_and_tried_again_and_the_batch_is_the_same(folder, monkeypatch, never, capsys):
    (expected,) = next(iter(loader(folder, 0)))
    asked = stall(monkeypatch, never, times=2)
    (batch,) = next(iter(loader(folder, 0.5)))
    assert all((getattr(batch, name) == value).all() for name, value in expected.tensors().items())
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2 and all(f"{asked[0]} has not answered" in note for note in notes)
    assert "(3 attempts left)" in notes[0] and "(2 attempts left)" in notes[1]


def test_a_read_that_never_answers_is_an_error_with_its_shard(folder, monkeypatch, never):
    next(iter(loader(folder, 0)))  # the index is there: what follows waits for nothing but the reads
    asked = stall(monkeypatch, never, times=1000)
    with pytest.raises(UserError, match=r"has not answered for 0\.8 s .*all 4 attempts failed") as error:
        next(iter(loader(folder, 0.1)))
    assert str(asked[0]) in str(error.value) and error.value.exit_code == TRY_AGAIN


def test_many_samples_may_take_longer_together_than_one_may(folder, monkeypatch):
    read = ShardReader.read

    def slow(self: ShardReader, sample: int):
        threading.Event().wait(0.05)
        return read(self, sample)

    monkeypatch.setattr(ShardReader, "read", slow)
    next(iter(loader(folder, 0.3)))  # eight samples of 0.05 s


def test_errors_of_the_reading_thread_arrive(folder, monkeypatch):
    def broken(self: ShardReader, sample: int):
        raise MemoryError("no room")

    monkeypatch.setattr(ShardReader, "read", broken)
    with pytest.raises(MemoryError, match="no room"):
        next(iter(loader(folder, 5.0)))


def fail(monkeypatch, error: Callable[[], Exception], *, times: int) -> list[tuple[Path, int]]:
    """The first `times` reads raise; shard and reader (its id) of all reads."""
    read, asked = ShardReader.read, []

    def failing(self: ShardReader, sample: int):
        asked.append((self.shard, id(self)))
        if len(asked) <= times:
            raise error()
        return read(self, sample)

    monkeypatch.setattr(ShardReader, "read", failing)
    return asked


def input_error() -> Exception:
    return OSError(errno.EIO, os.strerror(errno.EIO))


def away() -> Exception:
    return ShardError("00000.tar", "cannot be opened any more: Stale file handle", exit_code=TRY_AGAIN)


@pytest.mark.parametrize("timeout", [0.0, 30.0])
@pytest.mark.parametrize("error, told", [(input_error, "could not be read: Input/output error"), (away, "Stale file handle")])
def test_a_failed_read_is_named_and_tried_again_and_the_batch_is_the_same(folder, monkeypatch, capsys, timeout, error, told):
    (expected,) = next(iter(loader(folder, timeout)))
    asked = fail(monkeypatch, error, times=2)
    (batch,) = next(iter(loader(folder, timeout)))
    assert all((getattr(batch, name) == value).all() for name, value in expected.tensors().items())
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2 and all(told in note for note in notes)
    assert "(3 attempts left)" in notes[0] and "(2 attempts left)" in notes[1]


@pytest.mark.parametrize("timeout", [0.0, 30.0])
def test_reads_that_fail_for_good_end_as_an_error_with_the_shard_to_be_tried_again(folder, monkeypatch, timeout):
    asked = fail(monkeypatch, input_error, times=1000)
    with pytest.raises(UserError, match="could not be read: Input/output error; all 4 attempts failed") as error:
        next(iter(loader(folder, timeout)))
    assert str(asked[0][0]) in str(error.value) and error.value.exit_code == TRY_AGAIN
    assert len(asked) == 4


def test_a_damaged_shard_is_not_read_again(folder, monkeypatch, capsys):
    asked = fail(monkeypatch, lambda: ShardError("00000.tar", "was replaced or changed"), times=1000)
    with pytest.raises(UserError, match="replaced") as error:
        next(iter(loader(folder, 30.0)))
    assert error.value.exit_code == USER_MISTAKE and len(asked) == 1 and not capsys.readouterr().err


def test_reading_again_opens_files_anew_and_leaves_none_open(folder, monkeypatch):
    steps = iter(loader(folder, 30.0))
    next(steps)
    descriptors = []
    for _ in range(5):
        with monkeypatch.context() as patch:
            asked = fail(patch, input_error, times=3)
            next(steps)
        assert len({reader for _, reader in asked[:4]}) > 1
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert max(descriptors) <= descriptors[0] + 2  # one a shard
