"""A read that does not answer is reported with its shard, tried again, and ends as an error instead of a hang."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.data_support import SPEC, Bytes, data_config, make_shards
from vilg.data.loader import Loader, TokenDataset
from vilg.data.shards import ShardReader
from vilg.errors import TRY_AGAIN, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("tokens"), [20, 20])


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
    with pytest.raises(UserError, match=r"could not be read: 4 attempts in 1.5 s without an answer") as error:
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
