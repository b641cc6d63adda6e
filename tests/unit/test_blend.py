"""Blended data sets: shares by weight, every data set in its own epochs, the same batches under every layout and resume."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data_support import SPEC, Bytes, data_config, make_shards
from vilg.config.schema import BlendPart
from vilg.data.blend import STRETCH, BlendOrder, open_data, stretch_counts
from vilg.data.loader import Loader, LoaderState
from vilg.errors import UserError

SIZES, GLOBAL = (300, 70, 1100), 12
WEIGHTS = (1.0, 0.25, 3.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three data sets whose captions say which they are."""

    def named(which: int):
        return lambda number, fields: fields | {"txt": f"{which}.{number}".encode()}

    return [make_shards(tmp_path_factory.mktemp(f"set{i}"), [size], named(i)) for i, size in enumerate(SIZES)]


def blend_config(folders: list[Path], **changes):
    parts = tuple(BlendPart(path=path, weight=weight) for path, weight in zip(folders[1:], WEIGHTS[1:]))
    return data_config(folders[0], blend=parts, caption_dropout=0.0, **changes)


def global_captions(
    folders: list[Path], steps: int, *, ranks: int = 1, workers: int = 0, micro: int = GLOBAL, state: LoaderState | None = None
) -> tuple[list[list[bytes]], LoaderState]:
    """Captions of every step's global batch, in its order, and the state at the end."""
    config = blend_config(folders, workers=workers, text_to_image_fraction=1.0)
    loaders = [
        Loader(open_data(config), Bytes(), SPEC, config, seed=5, global_size=GLOBAL, micro_size=micro,
               data_rank=rank, data_size=ranks, state=state)
        for rank in range(ranks)
    ]  # fmt: skip
    iterators, found = [iter(loader) for loader in loaders], []
    for _ in range(steps):
        parts = [next(iterator) for iterator in iterators]
        step = []
        for micro_batch in range(GLOBAL // micro // ranks):
            for rank in range(ranks):
                batch = parts[rank][micro_batch]
                for ids, length in zip(batch.text_input.tolist(), batch.text_len.tolist()):
                    step.append(bytes(i - 4 for i in ids[:length]))
        found.append(step)
    return found, loaders[0].state


def test_shares_hold_within_one_percent_in_every_long_stretch():
    order = BlendOrder(SIZES, stretch_counts(WEIGHTS), seed=1)
    parts, _ = order.places(np.arange(3 * STRETCH))
    wanted = np.array(WEIGHTS) / sum(WEIGHTS)
    np.testing.assert_allclose(np.bincount(parts) / len(parts), wanted, rtol=0.01)
    for first in (1000, 5000, 9000):  # across the borders of stretches too
        shares = np.bincount(parts[first : first + STRETCH], minlength=3) / STRETCH
        np.testing.assert_allclose(shares, wanted, atol=0.01)
    assert np.bincount(parts[:STRETCH]).tolist() == list(stretch_counts(WEIGHTS))
    assert sum(stretch_counts(WEIGHTS)) == STRETCH == sum(stretch_counts([1.0] * 7))


def test_every_data_set_goes_through_its_own_epochs_without_drop_or_repeat():
    order = BlendOrder(SIZES, stretch_counts(WEIGHTS), seed=1)
    numbers = order(np.arange(3 * STRETCH))
    firsts = np.cumsum([0, *SIZES])
    for part, size in enumerate(SIZES):
        visited = numbers[(numbers >= firsts[part]) & (numbers < firsts[part + 1])] - firsts[part]
        epochs = [visited[at : at + size] for at in range(0, len(visited) - size + 1, size)]
        assert len(epochs) >= 2
        for epoch in epochs:
            assert sorted(epoch.tolist()) == list(range(size))
        assert epochs[0].tolist() != epochs[1].tolist()


def test_any_index_alone_says_what_the_whole_run_says():
    order = pickle.loads(pickle.dumps(BlendOrder(SIZES, stretch_counts(WEIGHTS), seed=1)))
    whole = BlendOrder(SIZES, stretch_counts(WEIGHTS), seed=1)(np.arange(2 * STRETCH))
    for index in (0, 7, STRETCH - 1, STRETCH, 2 * STRETCH - 1):
        assert order(np.array([index]))[0] == whole[index]
    assert (BlendOrder(SIZES, stretch_counts(WEIGHTS), seed=2)(np.arange(100)) != whole[:100]).any()


@pytest.mark.parametrize("ranks, workers, micro", [(2, 1, 3), (3, 0, 2), (6, 0, 2)])
def test_blended_batches_are_the_same_under_every_layout_and_after_a_resume(folders, ranks, workers, micro):
    expected, _ = global_captions(folders, 40)
    before, state = global_captions(folders, 17, ranks=ranks, workers=workers, micro=micro)
    after, _ = global_captions(folders, 23, ranks=ranks, micro=GLOBAL // ranks, state=state)
    assert before + after == expected
    sets = Counter(caption.split(b".")[0] for step in expected for caption in step)
    assert sets.keys() == {b"0", b"1", b"2"}


def test_a_bad_sample_is_replaced_from_its_own_data_set(tmp_path):
    def spoil(number: int, fields: dict[str, bytes]) -> dict[str, bytes]:
        return fields | {"txt": b"" if number % 2 else f"1.{number}".encode()}

    good = make_shards(tmp_path / "good", [50], lambda number, fields: fields | {"txt": f"0.{number}".encode()})
    half_bad = make_shards(tmp_path / "half_bad", [50], spoil)
    config = data_config(
        good, blend=(BlendPart(path=half_bad, weight=1.0),), max_bad_fraction=1.0, caption_dropout=0.0,
        text_to_image_fraction=1.0,
    )  # fmt: skip
    data = open_data(config)
    loader = Loader(
        data, Bytes(), SPEC, config, seed=0, global_size=100, micro_size=100, data_rank=0, data_size=1,
        quarantine=tmp_path / "bad.jsonl",
    )  # fmt: skip
    (batch,) = next(iter(loader))
    captions = [bytes(i - 4 for i in ids[:n]) for ids, n in zip(batch.text_input.tolist(), batch.text_len.tolist())]
    parts, _ = data.order(0).places(np.arange(100))
    assert [int(caption.split(b".")[0]) for caption in captions] == parts.tolist()
    assert loader.bad_samples["empty caption"] > 10 and "half_bad" not in (tmp_path / "bad.jsonl").read_text()


def test_state_of_another_blend_and_hopeless_weights_are_refused(folders):
    _, state = global_captions(folders, 1)
    alone = data_config(folders[0])
    with pytest.raises(UserError, match="manifest"):
        Loader(open_data(alone), Bytes(), SPEC, alone, seed=5, global_size=GLOBAL, micro_size=GLOBAL, data_rank=0, data_size=1,
               state=state)  # fmt: skip
    tiny = data_config(folders[0], blend=(BlendPart(path=folders[1], weight=1e-6),))
    with pytest.raises(UserError, match=f"data.blend: {folders[1]} would get less than one sample of {STRETCH}"):
        open_data(tiny)
