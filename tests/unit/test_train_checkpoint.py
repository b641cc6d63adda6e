"""Checkpoints on the disk: crashes at every point, full disks, damaged and hostile files, export's own checks."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from vilg.checkpoint import save as saving
from vilg.checkpoint.load import check_layout, find_checkpoint, latest_checkpoint
from vilg.checkpoint.probes import compute_probes, largest_difference, load_probes, probe_batch, save_probes
from vilg.checkpoint.save import save_checkpoint, step_name, sweep, write_latest
from vilg.checkpoint.state import STATE_FILE, RunState, read_state
from vilg.checkpoint.tensors import load_tensors, save_tensors
from vilg.config.schema import ModelConfig
from vilg.errors import UserError
from vilg.model.vilg import Vilg
from vilg.parallel.ranks import Ranks
from vilg.tokens.sequence import SequenceSpec

LAYOUT = dict(engine="torch", precision="fp32", zero_stage=0, data=1, tensor=1, pipeline=1)


def state(step: int) -> RunState:
    return RunState(
        step, 2 * step, 3 * step, {}, {"in_a_row": 0, "total": 0}, LAYOUT, {"name": "x"}, {"text": "a", "image": "b"}
    )


def write(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"w" * 100)


def save(run: Path, step: int, writer=write, keep_last: int = 2) -> Path:
    return save_checkpoint(run, state(step), [writer], ranks=Ranks(), keep_last=keep_last)


class Crash(BaseException):
    """What kill -9 does, as far as the code that runs is concerned: nothing after it happens."""


def crash_at(monkeypatch, number: int) -> None:
    """Make the `number`-th call that touches folders or flushes end the process."""
    calls = 0

    def counted(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                raise Crash
            return original(*args, **kwargs)

        return call

    for name in ("rename", "replace", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(saving.shutil, "rmtree", counted(saving.shutil.rmtree))


def test_a_crash_at_any_point_of_a_save_leaves_a_whole_latest_checkpoint(tmp_path):
    for number in range(1, 100):
        run = tmp_path / str(number)
        run.mkdir()
        save(run, 1, keep_last=1)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, number)
            try:
                save(run, 2, keep_last=1)
                crashed = False
            except Crash:
                crashed = True
        found = latest_checkpoint(run)
        assert found is not None and read_state(found).step in (1, 2), f"crash at call {number}"
        sweep(run)
        assert not list((run / "checkpoints").glob(".*"))
        save(run, 2, keep_last=1)
        assert read_state(latest_checkpoint(run)).step == 2
        if not crashed:
            break
    assert number > 8, "the crash points were not reached"


def test_a_failed_write_names_the_cause_and_leaves_the_previous_checkpoint(tmp_path):
    save(tmp_path, 1)

    def full(folder):
        write(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left on device.*step_00000001, is intact"):
        save(tmp_path, 2, full)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert read_state(latest_checkpoint(tmp_path)).step == 1


def test_only_the_newest_of_this_runs_past_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [step_name(2), step_name(3)]
    # Going back by hand: saving step 2 anew must not delete it as the oldest, and replaces what was there.
    write_latest(tmp_path, step_name(2))
    save(tmp_path, 2, lambda folder: (folder / "weights.bin").write_bytes(b"new"), keep_last=1)
    assert (latest_checkpoint(tmp_path) / "weights.bin").read_bytes() == b"new"


def test_missing_cut_and_newer_files_are_named(tmp_path):
    path = save(tmp_path, 1)
    (path / "weights.bin").write_bytes(b"w" * 99)
    with pytest.raises(UserError, match=r"weights.bin: has 99 bytes instead of 100"):
        read_state(path)
    (path / "weights.bin").unlink()
    with pytest.raises(UserError, match=r"weights.bin: is missing"):
        read_state(path)
    data = json.loads((path / STATE_FILE).read_text())
    (path / STATE_FILE).write_text(json.dumps({**data, "format_version": 99}))
    with pytest.raises(UserError, match="format_version 99"):
        read_state(path)
    (path / STATE_FILE).write_text(json.dumps({**data, "recipe": {"name": "y"}}))
    with pytest.raises(UserError, match="changed by hand"):
        read_state(path)


def test_find_checkpoint_takes_a_run_or_a_checkpoint_and_says_what_is_missing(tmp_path):
    path = save(tmp_path, 1)
    assert find_checkpoint(tmp_path) == find_checkpoint(path) == path
    (tmp_path / "LATEST").write_text("step_00000009")
    with pytest.raises(UserError, match="step_00000001"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run"):
        find_checkpoint(tmp_path / "empty")


def test_another_layout_is_refused_naming_what_differs():
    with pytest.raises(UserError, match="saved with data=1; this run has data=2"):
        check_layout(state(1), Path("step_00000001"), {**LAYOUT, "data": 2})


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/vilg-was-here",)


def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": torch.zeros(1), "extra": Hostile()}, path)
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt: holds an object of (posix|os).system"):
        load_tensors(path)
    path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(UserError, match="system"):
        load_tensors(path)
    assert not Path("/tmp/vilg-was-here").exists()


def test_objects_that_could_not_be_read_back_are_refused_when_saving(tmp_path):
    with pytest.raises(TypeError, match="scheduler/0 of type .*Hostile"):
        save_tensors({"scheduler": [Hostile()]}, tmp_path / "x.pt")
    value = {"a": [torch.ones(2), (1, "b")], 3: None, "s": torch.Size([2]), "d": torch.bfloat16}
    save_tensors(value, tmp_path / "x.pt")
    found = load_tensors(tmp_path / "x.pt")
    assert torch.equal(found.pop("a")[0], torch.ones(2)) and found == {
        3: None,
        "s": torch.Size([2]),
        "d": torch.bfloat16,
    }


def test_damaged_tensor_files_are_named(tmp_path):
    save_tensors({"a": torch.ones(1000)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="x.pt: (cannot be read|holds)"):
        load_tensors(tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt: missing"):
        load_tensors(tmp_path / "folder" / "x.pt")


def test_probes_survive_the_file_and_show_a_changed_weight(tmp_path):
    spec = SequenceSpec(6, (2, 3), 11, 7)
    model = Vilg(ModelConfig(num_layers=2, hidden_size=16, num_heads=2, conv_size=3), spec)
    model.reset_parameters(0)
    save_probes(compute_probes(model), tmp_path)
    stored = load_probes(tmp_path)
    assert stored.dtype == "float32" and torch.equal(stored.inputs.text_input, probe_batch(spec).text_input)
    assert largest_difference(stored, compute_probes(model, stored.inputs)) == 0.0
    with torch.no_grad():
        model.layers[1].attention.qkv.weight.copy_(model.layers[1].attention.qkv.weight.roll(1, 0))
    assert largest_difference(stored, compute_probes(model, stored.inputs)) > 0.0
    assert model.training
