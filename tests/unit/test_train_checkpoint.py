"""Checkpoints on the disk: crashes at every point, full disks, damaged and hostile files, export's own checks."""

import errno
import json
import os
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vilg.checkpoint import folders
from vilg.checkpoint.folders import REPLACED, hidden
from vilg.checkpoint.load import all_checkpoints, find_checkpoint, latest_checkpoint, layout_note
from vilg.checkpoint.probes import (
    PROBE_FILE,
    compute_probes,
    largest_difference,
    load_probes,
    probe_batch,
    save_probes,
)
from vilg.checkpoint.save import Saver, step_name, sweep, write_latest
from vilg.checkpoint.state import STATE_FILE, RunState, read_state
from vilg.checkpoint.tensors import checksum, host_copy, load_tensors, save_tensors
from vilg.checkpoint.verify import verify_files
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


def write(path: Path, content: bytes = b"w" * 100) -> str:
    path.write_bytes(content)
    return checksum(path)


def save(run: Path, step: int, writer=write, keep_last: int = 2, keep_every: int = 0) -> Path:
    saver = Saver(run, ranks=Ranks(), keep_last=keep_last, keep_every=keep_every)
    saver.begin(state(step), {"weights.bin": writer})
    return saver.wait().path


class Crash(BaseException):
    """What kill -9 does, as far as the code that runs is concerned: nothing after it happens."""


def crash_at(monkeypatch, number: int) -> None:
    """Make the `number`-th call that touches folders or flushes end the process."""
    calls = 0

    def counted(original, half=lambda *args, **kwargs: None):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                half(*args, **kwargs)
                raise Crash
            return original(*args, **kwargs)

        return call

    def begin_to_delete(path, **options) -> None:
        for file in list(Path(path).glob("*"))[:1]:
            file.unlink()

    for name in ("rename", "replace", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(folders, "exchange", counted(folders.exchange))
    monkeypatch.setattr(folders.shutil, "rmtree", counted(folders.shutil.rmtree, begin_to_delete))


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


def crashed_saves(tmp_path, steps, exchanges: bool):
    """For every crash point of saving the last of `steps` again: the run, and whether it was reached."""
    for number in range(1, 100):
        run = tmp_path / str(number)
        run.mkdir()
        for step in steps:
            save(run, step, lambda path: write(path, b"old"))
        with pytest.MonkeyPatch.context() as patch:
            if not exchanges:
                patch.setattr(folders, "exchange", lambda first, second: False)
            crash_at(patch, number)
            try:
                save(run, steps[-1], lambda path: write(path, b"new"))
                crashed = False
            except Crash:
                crashed = True
        yield run, crashed
        if not crashed:
            assert number > 8, "the crash points were not reached"
            return


@pytest.mark.parametrize("exchanges", [True, False], ids=["names exchanged", "names not exchanged"])
@pytest.mark.parametrize("steps", [[1], [1, 2]], ids=["the only one", "beside an older one"])
def test_a_crash_while_a_checkpoint_replaces_itself_leaves_the_old_or_the_new(tmp_path, steps, exchanges):
    for run, crashed in crashed_saves(tmp_path, steps, exchanges):
        found = latest_checkpoint(run)
        assert read_state(found).step == steps[-1]
        content = (found / "weights.bin").read_bytes()
        assert content in (b"old", b"new") if crashed else content == b"new"
        assert [read_state(path).step for path in all_checkpoints(run)] == steps
        sweep(run)
        assert not list((run / "checkpoints").glob(".*"))
        assert latest_checkpoint(run).name == step_name(steps[-1])
        assert (latest_checkpoint(run) / "weights.bin").read_bytes() == content
        save(run, steps[-1], lambda path: write(path, b"newer"))
        assert (latest_checkpoint(run) / "weights.bin").read_bytes() == b"newer"


def test_a_checkpoint_left_aside_is_found_without_latest_and_half_a_deletion_is_not(tmp_path):
    path = save(tmp_path, 1)
    os.rename(path, hidden(path, REPLACED))
    (tmp_path / "LATEST").unlink()
    assert read_state(latest_checkpoint(tmp_path)).step == 1
    (hidden(path, REPLACED) / "weights.bin").unlink()
    assert latest_checkpoint(tmp_path) is None
    assert sweep(tmp_path) == ["removed what an interrupted save left behind: .step_00000001.replaced"]


def test_a_replacement_that_fails_leaves_the_old_one_in_place(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    monkeypatch.setattr(folders, "exchange", lambda first, second: False)
    rename = os.rename

    def full(source, target):
        if Path(source).name.endswith(".partial"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UserError, match="Disk quota exceeded.*step_00000001, is intact"):
        save(tmp_path, 1, lambda path: write(path, b"new"))
    assert read_state(latest_checkpoint(tmp_path)).step == 1 and (path / "weights.bin").read_bytes() == b"w" * 100


def test_older_checkpoints_that_cannot_be_deleted_do_not_spoil_a_save(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    rename = os.rename

    def refused(source, target):
        if Path(target).name.endswith(".deleted"):
            raise OSError(errno.EACCES, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    saver = Saver(tmp_path, ranks=Ranks(), keep_last=1)
    saver.begin(state(3), {"weights.bin": write})
    saved = saver.wait()
    assert saved.path == latest_checkpoint(tmp_path)
    assert "step_00000001: Permission denied" in saved.trouble


def test_a_failed_write_names_the_cause_and_leaves_the_previous_checkpoint(tmp_path):
    save(tmp_path, 1)

    def full(path):
        write(path)
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
    save(tmp_path, 2, lambda path: write(path, b"new"), keep_last=1)
    assert (latest_checkpoint(tmp_path) / "weights.bin").read_bytes() == b"new"


def test_checkpoints_of_every_so_many_steps_stay(tmp_path):
    for step in range(0, 9, 2):
        save(tmp_path, step, keep_last=1, keep_every=4)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [step_name(4), step_name(8)]


def test_a_save_in_the_background_is_published_only_when_it_is_written(tmp_path):
    save(tmp_path, 1)
    saver, gate = Saver(tmp_path, ranks=Ranks(), keep_last=2), threading.Event()

    def slow(path: Path) -> str:
        assert gate.wait(60)
        return write(path)

    live = state(2)
    saver.begin(live, {"weights.bin": slow})
    assert saver.poll() is None and latest_checkpoint(tmp_path).name == step_name(1)
    live.skipped["total"] = 7  # of a later step
    gate.set()
    assert saver.wait().path == latest_checkpoint(tmp_path) and read_state(latest_checkpoint(tmp_path)).step == 2
    assert read_state(latest_checkpoint(tmp_path)).skipped["total"] == 0
    assert saver.wait() is saver.poll() is None  # nothing is under way


def test_a_background_save_that_fails_is_told_at_the_next_question(tmp_path):
    save(tmp_path, 1)
    saver = Saver(tmp_path, ranks=Ranks(), keep_last=2)

    def full(path: Path) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver.begin(state(2), {"weights.bin": full})
    saver._job.join()
    with pytest.raises(UserError, match="step_00000002 could not be saved.*No space left.*step_00000001, is intact"):
        saver.poll()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [step_name(1)]
    assert saver.poll() is None


def test_bytes_that_changed_without_changing_the_size_are_noticed(tmp_path):
    path = save(tmp_path, 1)
    whole = read_state(path)
    verify_files(path, whole, rank=0, world_size=1)
    (path / "weights.bin").write_bytes(b"w" * 99 + b"v")
    read_state(path)
    with pytest.raises(UserError, match="weights.bin: its bytes changed since it was written"):
        verify_files(path, whole, rank=0, world_size=1)
    verify_files(path, whole, rank=1, world_size=2)  # the other rank's share is empty here


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
    (path / STATE_FILE).write_text("[]")
    with pytest.raises(UserError, match=r"run_state.json: holds a list instead of an object"):
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
    (tmp_path / "LATEST").write_text("\n")
    with pytest.raises(UserError, match=r"LATEST is empty \(present: step_00000001\); write one of these into it"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run"):
        find_checkpoint(tmp_path / "empty")


def test_a_move_to_another_layout_names_what_differs():
    here = {"layers.1.bias": {"stage": 0}, "layers.2.bias": {"stage": 1}}
    before = replace(state(1), parameters=here)
    assert layout_note(before, LAYOUT, here) is None
    assert "saved with data=1; this run has data=2" in layout_note(before, {**LAYOUT, "data": 2}, here)
    note = layout_note(before, LAYOUT, {**here, "layers.2.bias": {"stage": 0}})
    assert "saved with layers.2.bias in stage 1; this run has layers.2.bias in stage 0" in note


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
    assert save_tensors(value, tmp_path / "x.pt") == checksum(tmp_path / "x.pt")
    found = load_tensors(tmp_path / "x.pt")
    assert torch.equal(found.pop("a")[0], torch.ones(2)) and found == {
        3: None,
        "s": torch.Size([2]),
        "d": torch.bfloat16,
    }


def test_a_copy_for_writing_later_keeps_values_and_shared_storage(tmp_path):
    flat = torch.arange(1000.0)
    live = {"flat": flat, "views": [flat[:10].view(2, 5), flat[990:]], "settings": ({"lr": 0.1}, None)}
    copy = host_copy(live)
    flat.zero_()
    assert torch.equal(copy["views"][0], torch.arange(10.0).view(2, 5)) and float(copy["views"][1][-1]) == 999.0
    assert copy["views"][1].untyped_storage().data_ptr() == copy["flat"].untyped_storage().data_ptr()
    assert copy["settings"] == live["settings"]
    save_tensors(copy, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 6000  # the numbers are written once


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
    save_probes(compute_probes(model), tmp_path / PROBE_FILE)
    stored = load_probes(tmp_path)
    assert stored.dtype == "float32" and torch.equal(stored.inputs.text_input, probe_batch(spec).text_input)
    assert largest_difference(stored, compute_probes(model, stored.inputs)) == 0.0
    with torch.no_grad():
        model.layers[1].attention.qkv.weight.copy_(model.layers[1].attention.qkv.weight.roll(1, 0))
    assert largest_difference(stored, compute_probes(model, stored.inputs)) > 0.0
    assert model.training
