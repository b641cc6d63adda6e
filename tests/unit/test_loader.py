"""The loader: the same global batches under every layout, exact resume, bounded and layout-free replacement."""

import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.data_support import CODES, GRID, SPEC, TEXT_SLOTS, Bytes, data_config, make_shards
from vilg.data.fields import encode_codes
from vilg.data.loader import ENOUGH_SEEN, Loader, LoaderState, TokenDataset, bad_sample_path
from vilg.errors import UserError
from vilg.tokens.sequence import SequenceBatch, SequenceSpec

GLOBAL = 12
LAYOUTS = [(1, 0, 12), (1, 2, 3), (2, 1, 6), (3, 2, 2), (4, 1, 1), (6, 0, 2)]  # (ranks, workers, micro size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("tokens"), [300, 1, 212])


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every seventh sample is bad, each in another way; three in a row at the end of a shard."""
    kinds = [
        lambda f: f | {"img.npy": b"no npy at all"},
        lambda f: f | {"img.npy": encode_codes(np.full(6, CODES))},
        lambda f: f | {"img.npy": encode_codes(np.zeros(5, np.int64))},
        lambda f: f | {"txt": "白色背景上的马".encode("gbk")},
        lambda f: f | {"txt": b"far too long for the segment"},
        lambda f: f | {"txt": b"x" * 1_000_000},
        lambda f: f | {"txt": b" \n"},
        lambda f: {"txt": f["txt"]},
        lambda f: {"img.npy": f["img.npy"]},
        lambda f: f | {"json": b"{"},
        lambda f: f | {"json": b"[1]"},
        lambda f: f | {"img.npy": _object_array()},
    ]

    def edit(number: int, fields: dict[str, bytes]) -> dict[str, bytes]:
        bad = number % 7 == 0 or 97 <= number < 100
        return kinds[number % len(kinds)](fields) if bad else fields

    return make_shards(tmp_path_factory.mktemp("spoilt"), [100, 50], edit)


def _object_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"pickled": 1}] * 6, object), allow_pickle=True)
    return file.getvalue()


def loader(folder: Path, *, ranks: int = 1, rank: int = 0, workers: int = 0, micro: int = GLOBAL, **options) -> Loader:
    config = {"workers": workers, "max_bad_fraction": 1.0, "caption_dropout": 0.3, **options.pop("config", {})}
    return Loader(
        TokenDataset.open(folder),
        Bytes(),
        options.pop("spec", SPEC),
        data_config(folder, **config),
        seed=options.pop("seed", 11),
        global_size=GLOBAL,
        micro_size=micro,
        data_rank=rank,
        data_size=ranks,
        **options,
    )


def global_steps(
    folder: Path, steps: int, *, ranks: int = 1, workers: int = 0, micro: int = GLOBAL, **options
) -> tuple[list[dict[str, np.ndarray]], list[Loader]]:
    """Every step's global batch, put together from all ranks as the contract says; and the ranks' loaders."""
    loaders = [loader(folder, ranks=ranks, rank=r, workers=workers, micro=micro, **options) for r in range(ranks)]
    iterators = [iter(one) for one in loaders]
    result = []
    for _ in range(steps):
        parts = [next(iterator) for iterator in iterators]
        in_order = [parts[r][j] for j in range(GLOBAL // micro // ranks) for r in range(ranks)]
        result.append({name: np.concatenate([getattr(b, name) for b in in_order]) for name in in_order[0].tensors()})
    return result, loaders


def assert_same(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    assert len(ours) == len(theirs)
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=f"step {step}: {name}")


@pytest.mark.parametrize("ranks, workers, micro", LAYOUTS)
def test_global_batches_are_the_same_for_any_ranks_workers_and_micro_size(folder, ranks, workers, micro):
    config = {"directions": "both" if workers == 0 else "alternate"}
    expected, _ = global_steps(folder, 50, config=config)  # 600 of 513 samples: an epoch ends inside a step
    found, _ = global_steps(folder, 50, ranks=ranks, workers=workers, micro=micro, config=config)
    assert_same(found, expected)


def test_workers_do_not_change_batches_nor_torchs_random_state(spoilt, tmp_path):
    expected, [plain] = global_steps(spoilt, 10, quarantine=tmp_path / "plain.jsonl")
    before = torch.get_rng_state()
    found, [served] = global_steps(spoilt, 10, workers=2, micro=4, quarantine=tmp_path / "served.jsonl")
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(found, expected)
    assert served.state == plain.state and served.bad_samples == plain.bad_samples
    assert (tmp_path / "served.jsonl").read_text() == (tmp_path / "plain.jsonl").read_text()


def test_workers_outlive_the_signals_that_ask_the_trainer_to_stop(folder):
    expected, _ = global_steps(folder, 12)
    steps = iter(loader(folder, workers=1))
    found = [next(steps)[0]]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    found += [next(steps)[0] for _ in range(11)]
    assert_same([{k: v.numpy() for k, v in batch.tensors().items()} for batch in found], expected)
    workers = multiprocessing.active_children()
    assert workers
    steps.close()
    for worker in workers:
        worker.join(timeout=30)
        assert not worker.is_alive()


KILLED_TRAINER = """
import multiprocessing, sys, time
from pathlib import Path
from tests.unit.test_loader import loader

if __name__ == "__main__":
    steps = iter(loader(Path(sys.argv[1]), workers=1))
    next(steps)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_killed_trainer(folder, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(KILLED_TRAINER)
    command, environment = [sys.executable, script, folder], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        trainer.kill()
    assert workers
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its trainer"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_resume_gives_same_batches_on_any_other_layout(folder, number):
    """From each layout the state is the same, and to each the batches are: so it holds for every pair of them."""
    draw = random.Random(number)
    before, after, stop = LAYOUTS[number], LAYOUTS[(number + draw.randint(1, 5)) % 6], draw.randint(1, 49)
    expected, _ = global_steps(folder, 50)
    first, loaders = global_steps(folder, stop, **as_options(before))
    states = [one.state for one in loaders]
    assert all(state == states[0] for state in states)
    state = LoaderState.from_dict(json.loads(json.dumps(states[0].to_dict())))
    assert (state.samples_consumed, state.epoch) == (stop * GLOBAL, stop * GLOBAL // 513)
    rest, _ = global_steps(folder, 50 - stop, state=state, **as_options(after))
    assert_same(first + rest, expected)


@pytest.mark.parametrize("stop", [1, 42, 43])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resume_beside_an_epochs_end_goes_on_in_the_right_epoch(folder, layout, stop):
    expected, _ = global_steps(folder, 45)
    _, [one] = global_steps(folder, stop)
    options = as_options(layout) | {"workers": 0}
    rest, _ = global_steps(folder, 45 - stop, state=one.state, **options)
    assert_same(rest, expected[stop:])


def as_options(layout: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("ranks", "workers", "micro"), layout, strict=True))


def test_iterating_again_continues(folder):
    expected, _ = global_steps(folder, 6)
    one = loader(folder)
    found = [next(iter(one))[0].tensors() for _ in range(6)]
    assert_same([{k: v.numpy() for k, v in batch.items()} for batch in found], expected)


def test_state_before_the_first_step_is_the_start(folder):
    state = loader(folder).state
    assert (state.epoch, state.samples_consumed, state.seed) == (0, 0, 11)


def test_each_epoch_visits_each_pair_once_and_epochs_differ(tmp_path):
    folder = make_shards(tmp_path, [17, 31])  # 48 = 4 steps
    steps, _ = global_steps(folder, 8, config={"text_to_image_fraction": 0.0})
    captions = [_caption(row) for step in steps for row in step["text_target"]]
    everything = sorted(str(n) for n in range(48))
    assert sorted(captions[:48]) == everything and sorted(captions[48:]) == everything
    assert captions[:48] != captions[48:]


def _caption(target: np.ndarray) -> str:
    return bytes(int(i) - 4 for i in target if i >= 4).decode()


def test_samples_keep_codes_and_caption_together(folder):
    [step], _ = global_steps(folder, 1, config={"text_to_image_fraction": 0.0})
    for target, codes in zip(step["text_target"], step["image_input"], strict=True):
        np.testing.assert_array_equal(codes, (np.arange(6) * 7 + int(_caption(target))) % CODES)


def test_both_directions_of_a_pair_follow_each_other(folder):
    [step], _ = global_steps(folder, 1, config={"directions": "both", "caption_dropout": 0.0})
    assert step["image_is_target"].tolist() == [1, 0] * GLOBAL
    np.testing.assert_array_equal(step["image_target"][::2], step["image_input"][1::2])


def test_shares_of_directions_and_of_dropped_captions_are_as_asked(folder):
    steps, _ = global_steps(folder, 150, config={"text_to_image_fraction": 0.75, "caption_dropout": 0.2})
    is_target = np.concatenate([s["image_is_target"] for s in steps])
    lengths = np.concatenate([s["text_len"] for s in steps])
    assert abs(is_target.mean() - 0.75) < 0.04
    assert abs((lengths[is_target == 1] == 0).mean() - 0.2) < 0.04
    assert (lengths[is_target == 0] > 1).all()


def test_one_of_several_captions_is_drawn_per_visit(tmp_path):
    captions = ["aa", "bb", "not fitting at all", "  "]
    folder = make_shards(tmp_path, [24], lambda _, f: f | {"json": json.dumps({"captions": captions}).encode()})
    steps, [one] = global_steps(folder, 20, config={"text_to_image_fraction": 0.0})
    drawn = [_caption(row) for step in steps for row in step["text_target"]]
    assert set(drawn) == {"aa", "bb"} and not one.bad_samples
    assert drawn[:24] != drawn[24:48]


def test_bad_samples_are_replaced_identically_on_every_layout_and_logged_once(spoilt, tmp_path):
    expected, [one] = global_steps(spoilt, 25, quarantine=tmp_path / "one.jsonl")
    assert sum(one.bad_samples.values()) == 2 * 24 and one.samples_seen == 300  # 22 of 150 by 7, 97, 99; 2 epochs
    for ranks, micro in [(2, 3), (3, 1), (6, 2)]:
        found, loaders = global_steps(spoilt, 25, ranks=ranks, micro=micro, quarantine=tmp_path / f"{ranks}.jsonl")
        assert_same(found, expected)
        assert sum((each.bad_samples for each in loaders), start=type(one.bad_samples)()) == one.bad_samples
        assert _log(tmp_path / f"{ranks}.jsonl") == _log(tmp_path / "one.jsonl")


def _log(path: Path) -> list[dict]:
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda line: line["global_index"])


def test_a_bad_sample_is_named_by_shard_key_and_reason(spoilt, tmp_path):
    global_steps(spoilt, 13, quarantine=bad_sample_path(tmp_path, 0))
    log = {line["sample"]: line for line in _log(bad_sample_path(tmp_path, 0))}
    assert (log[0]["shard"], log[0]["key"], log[0]["reason"]) == ("00000.tar", "000000000", "undecodable codes")
    assert (log[105]["shard"], log[105]["key"]) == ("00001.tar", "000010005")
    assert {line["reason"] for line in log.values()} >= {
        "code out of range", "caption too long", "caption not UTF-8", "codes of wrong shape or type", "no caption",
    }
    assert "object" in next(line["detail"] for line in log.values() if line["sample"] % 12 == 11)


def test_too_many_bad_samples_stop_the_run(spoilt):
    with pytest.raises(UserError, match=r"data\.max_bad_fraction=0\.0 allows.*0000\d\.tar key '0000"):
        global_steps(spoilt, 10, config={"max_bad_fraction": 0.0})
    allowed = 20 / ENOUGH_SEEN
    with pytest.raises(UserError, match="^2[1-9] of "):
        global_steps(spoilt, 25, config={"max_bad_fraction": allowed})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_hundred_bad_samples_in_a_row_stop_the_run_with_one_clear_error(tmp_path, workers):
    folder = make_shards(tmp_path, [150], lambda _, f: f | {"txt": b""})
    with pytest.raises(UserError, match="^100 samples in a row are bad, the last one 00000.tar: key '0000"):
        global_steps(folder, 1, workers=workers)


def test_data_that_do_not_fit_the_recipe_are_refused(folder):
    def spec(**changes):
        return SequenceSpec(**{**vars(SPEC), **changes})

    with pytest.raises(UserError, match=r"tokens\.grid=\[3, 2\], but .*manifest\.json has grid \[2, 3\]"):
        loader(folder, spec=spec(grid=(3, 2)))
    with pytest.raises(UserError, match=r"tokens\.image_vocab_size=64, .* 50 codes"):
        loader(folder, spec=spec(image_vocab_size=64))
    with pytest.raises(UserError, match=r"tokens\.text_vocab_size=100, .* 260 pieces"):
        loader(folder, spec=spec(text_vocab_size=100))
    with pytest.raises(UserError, match="made with image tokenizer tokenizer-ha.*another"):
        loader(folder, image_tokenizer_hash="another")
    with pytest.raises(UserError, match=r"batch\.global_size=12 is not a multiple of batch\.micro_size=5"):
        loader(folder, micro=5)


def test_a_state_of_other_data_seed_or_version_is_refused(folder, spoilt):
    state = loader(folder).state
    with pytest.raises(UserError, match=r"data\.train"):
        loader(spoilt, state=state)
    with pytest.raises(UserError, match="seed=11, the recipe has seed=12"):
        loader(folder, seed=12, state=state)
    with pytest.raises(UserError, match="format_version 2"):
        LoaderState.from_dict(state.to_dict() | {"format_version": 2})
    with pytest.raises(UserError, match="extra"):
        LoaderState.from_dict(state.to_dict() | {"extra": 1})


def test_batches_have_the_canonical_shapes(folder):
    [batch] = next(iter(loader(folder)))
    assert isinstance(batch, SequenceBatch) and len(batch) == GLOBAL
    assert batch.text_input.shape == (GLOBAL, TEXT_SLOTS) and batch.image_input.shape == (GLOBAL, GRID[0] * GRID[1])
    assert batch.text_input.dtype == torch.int64 and batch.text_len.dtype == torch.int32


def test_read_gives_codes_caption_and_meta(folder):
    dataset = TokenDataset.open(folder)
    assert dataset.num_samples == 513
    for number in (0, 299, 300, 301, 512):
        codes, caption, meta = pickle.loads(pickle.dumps(dataset)).read(number)
        assert codes.dtype == np.uint16 and caption == str(number) and meta == {"n": number}
        np.testing.assert_array_equal(codes, (np.arange(6) * 7 + number) % CODES)
    with pytest.raises(IndexError):
        dataset.read(513)


def questions_of(pairs) -> bytes:
    return json.dumps({"questions": [{"question": q, "answer": a} for q, a in pairs]}).encode()


def test_questions_are_source_and_answers_target_and_one_of_several_is_drawn_per_visit(tmp_path):
    pairs = [("ab", "c"), ("d", "ef"), ("far too long", "for it")]
    folder = make_shards(tmp_path, [24], lambda _, f: f | {"json": questions_of(pairs)})
    steps, [one] = global_steps(folder, 20, config={"directions": "answer"})
    asked = set()
    for step in steps:
        assert not step["image_is_target"].any()
        for prefix, text, target in zip(step["text_prefix"], step["text_input"], step["text_target"], strict=True):
            question = bytes(int(i) - 4 for i in text[:prefix]).decode()
            asked.add((question, _caption(target)))
            assert text[prefix] == 1 and (target[:prefix] == -100).all()
    assert asked == set(pairs[:2]) and not one.bad_samples


def test_samples_without_a_question_that_fits_are_replaced_and_counted(tmp_path):
    kinds = [None, [("far too long", "for it")], [("ok", "yes")], "no list", [("", "x")]]

    def edit(number: int, fields: dict[str, bytes]) -> dict[str, bytes]:
        pairs = kinds[number % len(kinds)]
        if pairs is None:
            return fields
        broken = json.dumps({"questions": pairs}).encode()
        return fields | {"json": questions_of(pairs) if isinstance(pairs, list) else broken}

    folder = make_shards(tmp_path, [60], edit)
    steps, [one] = global_steps(folder, 5, config={"directions": "answer"})
    assert {_caption(row) for step in steps for row in step["text_target"]} == {"yes"}
    assert one.bad_samples == {"no question": 12, "question too long": 12, "bad json": 24}


def test_bad_samples_that_cannot_be_listed_are_left_out_all_the_same(spoilt, tmp_path, capfd):
    expected, _ = global_steps(spoilt, 13, quarantine=tmp_path / "listed.jsonl")
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    found, _ = global_steps(spoilt, 13, quarantine=tmp_path / "full.jsonl")
    assert_same(found, expected)
    assert capfd.readouterr().err.count("full.jsonl: bad samples are missing there: No space left on device") == 1
