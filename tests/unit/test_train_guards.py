"""What guards a run, each by itself: spikes, watchdog, stragglers, recomputation, planted faults, requests by file."""

import errno
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.golden.make import DEBUG_RECIPE
from tests.model_support import mixed_batch, tiny_model
from vilg.config import load_recipe
from vilg.config.check import check_recipe
from vilg.config.schema import GuardsConfig
from vilg.errors import TRY_AGAIN, UserError
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks, SharedError
from vilg.train.events import append_event, read_events
from vilg.train.faults import FaultPlan, read_faults
from vilg.train.heartbeat import Heartbeat, read_heartbeat
from vilg.train.recompute import check_recomputation
from vilg.train.requests import Requests, refuse_stopped
from vilg.train.spikes import SpikeGuard, spike_limit
from vilg.train.step import plan_step
from vilg.train.stragglers import ForwardClock, RankTimes, StragglerReport, find_stragglers
from vilg.train.watchdog import Watchdog, silent_ranks, stacks_path


def recipe(*overrides: str):
    return load_recipe(DEBUG_RECIPE, overrides, cross_checks=False)


def test_the_spike_limit_is_median_plus_robust_deviations_worked_out_by_hand():
    # median 3, absolute deviations 2 1 0 1 97 -> their median 1: one outlier moves neither.
    assert spike_limit([1.0, 2.0, 3.0, 4.0, 100.0], 10.0) == pytest.approx(3 + 10 * 1.4826)
    # A loss that stands still still has one percent of room per deviation.
    assert spike_limit([5.0] * 8, 10.0) == pytest.approx(5.5)


def test_spikes_are_judged_once_the_window_is_half_full_and_off_never_judges():
    config, guard = GuardsConfig(spike_window=8), SpikeGuard()
    for loss in (5.0, 5.1, 4.9):
        guard.add(loss, config)
    assert guard.limit(config) == math.inf
    guard.add(5.0, config)
    assert 5 < guard.limit(config) < 7 and guard.limit(GuardsConfig(spike_action="off")) == math.inf
    for loss in (1.0,) * 8:
        guard.add(loss, config)
    assert guard.limit(config) == pytest.approx(1.1)  # the first four are forgotten
    assert SpikeGuard.from_dict(guard.to_dict()) == guard


def test_more_spikes_in_a_row_than_allowed_end_the_run():
    config, guard = GuardsConfig(spike_action="skip", max_spikes=2), SpikeGuard()
    guard.count(7, 9.0, config), guard.count(8, 9.0, config)
    with pytest.raises(SharedError, match="step 9: loss 9.000.*guards.max_spikes=2"):
        guard.count(9, 9.0, config)


@pytest.mark.parametrize("action, refused", [("log", False), ("skip", True), ("rollback", False)])
def test_skipping_spikes_is_refused_where_it_would_upset_the_loss_scaling(action, refused):
    problems = check_recipe(recipe(f"guards.spike_action={action}", "precision=fp16"))
    assert [p.startswith("guards.spike_action=skip") for p in problems] == [True] * refused


def test_a_hang_leaves_stacks_and_the_flight_recorder_names_silent_ranks_and_ends_with_its_code(tmp_path):
    stacks_path(tmp_path, 2).write_text("stacks of an earlier hang")
    os.utime(stacks_path(tmp_path, 2), (0, 0))
    codes, said = [], []
    dog = Watchdog(
        tmp_path, rank=0, world_size=3, timeout=0.2, grace=0.0, say=said.append, exit=codes.append
    )
    with dog:
        dog.beat(41)
        waits_for_ever(codes)
    assert codes == [TRY_AGAIN]
    assert "waits_for_ever" in stacks_path(tmp_path, 0).read_text() and "after step 41" in said[0]
    event = read_events(tmp_path)[-1]
    assert event["event"] == "hang" and event["step"] == 41 and event["silent"] == [1, 2]
    assert "look there first: rank 1, 2" in event["text"]


def test_a_save_that_never_ends_is_a_hang_after_its_own_longer_limit(tmp_path):
    codes, said = [], []
    dog = Watchdog(
        tmp_path, rank=0, world_size=1, timeout=0.1, pause_timeout=2.0, grace=0.0, say=said.append, exit=codes.append
    )
    with dog:
        dog.beat(41)
        with dog.aside("saving"):
            time.sleep(0.4)
            assert codes == []
            waits_for_ever(codes)
    assert codes == [TRY_AGAIN] and "saving does not end for 2 s after step 41 (guards.pause_timeout)" in said[0]
    assert "waits_for_ever" in stacks_path(tmp_path, 0).read_text()
    assert read_events(tmp_path)[-1]["text"].startswith("saving does not end")


def waits_for_ever(until: list) -> None:
    deadline = time.monotonic() + 20
    while not until and time.monotonic() < deadline:
        time.sleep(0.02)


def test_steps_and_pauses_keep_the_watchdog_quiet_and_nothing_is_left_behind(tmp_path):
    codes = []
    with Watchdog(tmp_path, rank=0, world_size=1, timeout=0.4, grace=0.0, exit=codes.append) as dog:
        for step in range(6):
            time.sleep(0.1)
            dog.beat(step)
        with dog.aside("saving"):
            time.sleep(0.8)
        time.sleep(0.1)
    assert codes == [] and list(tmp_path.iterdir()) == []
    with Watchdog(tmp_path, rank=0, world_size=1, timeout=0.0, exit=codes.append):
        time.sleep(0.1)
    assert codes == []


def test_ranks_without_fresh_stacks_are_silent(tmp_path):
    stacks_path(tmp_path, 0).write_text("x")
    stacks_path(tmp_path, 1).write_text("")
    assert silent_ranks(tmp_path, 3, since=time.time() - 60) == [1, 2]
    assert silent_ranks(tmp_path, 3, since=time.time() + 60) == [0, 1, 2]


def times(*pairs: tuple[float, float]) -> list[RankTimes]:
    return [RankTimes(step=1.0, forward=forward, data_wait=wait) for forward, wait in pairs]


def test_stragglers_are_found_in_work_and_in_waiting_for_data():
    even = times((0.5, 0.0), (0.52, 0.01), (0.5, 0.0), (0.55, 0.0))
    assert find_stragglers(even, percent=30) == []
    uneven = times((0.5, 0.0), (0.8, 0.0), (0.5, 0.0), (0.5, 0.4))
    found = [(rank, what) for rank, what, *_ in find_stragglers(uneven, percent=30)]
    assert found == [(1, "forward"), (3, "data wait")]
    stages = [replace(t, stage=rank // 2) for rank, t in enumerate(times((1.0, 0), (1.0, 0), (3.0, 0), (3.1, 0)))]
    assert find_stragglers(stages, percent=30) == []  # the later stage simply has more to do
    stages[3] = replace(stages[3], forward=9.0)
    assert [(rank, what) for rank, what, *_ in find_stragglers(stages, percent=30)] == [(3, "forward")]
    assert find_stragglers(uneven, percent=0) == [] and find_stragglers(uneven[:1], percent=30) == []


def test_a_straggler_is_named_with_its_host_the_second_time_running():
    report = StragglerReport(["node1", "node2", "node3"], percent=30)
    slow, even = times((0.5, 0), (0.5, 0), (0.9, 0)), times((0.5, 0), (0.5, 0), (0.5, 0))
    assert report.check(slow) == [] and report.check(even) == [] and report.check(slow) == []
    assert report.check(slow) == ["rank 2 on node3 is a straggler: forward 900 ms a step, median 500 ms"]


def test_the_forward_clock_counts_training_passes_only():
    model = torch.nn.Linear(2, 2)
    clock = ForwardClock(model, torch.device("cpu"))
    model(torch.ones(1, 2))
    assert clock.take() > 0 and clock.take() == 0
    model.eval()(torch.ones(1, 2))
    assert clock.take() == 0


class Unsteady(torch.nn.Module):
    """A model whose second computation differs in the last bit."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, *inputs, **options):
        self.calls += 1
        text, image = self.model(*inputs, **options)
        return (torch.nextafter(text, text + 1), image) if self.calls == 2 else (text, image)


def test_recomputation_passes_the_same_bits_and_names_rank_and_host_of_others():
    made, batch = recipe("guards.recompute_every=5"), mixed_batch()
    plan = plan_step(made, 5, text_targets=10, image_targets=40)
    place = dict(recipe=made, grid=Grid.single(), ranks=Ranks())
    check_recomputation(tiny_model(), batch, plan, **place)
    with pytest.raises(SharedError, match="step 5: .*two results on rank 0 on .*recompute_every=5"):
        check_recomputation(Unsteady(tiny_model()), batch, plan, **place)


def test_faults_are_read_and_refused_and_spare_a_requeued_job():
    found = read_faults({"VILG_FAULT": "nan@step3:rank1, kill@step12:rank0"}, world_size=2)
    assert [str(fault) for fault in found] == ["nan@step3:rank1", "kill@step12:rank0"]
    assert read_faults({}, world_size=2) == []
    assert read_faults({"VILG_FAULT": "nan@step3:rank1", "SLURM_RESTART_COUNT": "1"}, world_size=2) == []
    with pytest.raises(UserError, match="'explode@step3:rank1' is no fault"):
        read_faults({"VILG_FAULT": "explode@step3:rank1"}, world_size=2)
    with pytest.raises(UserError, match="ranks are 0 to 1"):
        read_faults({"VILG_FAULT": "nan@step3:rank2"}, world_size=2)


@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_a_planted_fault_spoils_its_step_alone(kind):
    model = torch.nn.Linear(2, 2)
    plan = FaultPlan(read_faults({"VILG_FAULT": f"{kind}@step2:rank0"}, world_size=1), model, rank=0)

    def step(number: int) -> tuple[float, float]:
        list(plan.before_step(number))
        model.zero_grad()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss.item(), model.weight.grad.sum().item()

    before, during, after, again = step(1), step(2), step(3), step(2)
    assert before == after == again
    assert during[0] == before[0] and math.isnan(during[1]) if kind == "nan" else during[0] > 100 * before[0]


def test_a_stop_file_stays_and_a_save_file_goes_with_its_checkpoint(tmp_path):
    requests = Requests(tmp_path, is_main=True, warn=pytest.fail)
    assert not requests.stop() and not requests.save()
    (tmp_path / "STOP").touch(), (tmp_path / "SAVE").touch()
    assert requests.stop() and requests.save() and not requests.save()
    assert not Requests(tmp_path, is_main=False, warn=pytest.fail).stop()
    requests.saved()
    assert not (tmp_path / "SAVE").exists() and (tmp_path / "STOP").exists()
    with pytest.raises(UserError, match="Remove it to continue"):
        refuse_stopped(tmp_path)


def test_requests_that_cannot_be_looked_at_are_not_asked_with_one_warning(tmp_path, monkeypatch):
    warnings = []
    requests = Requests(tmp_path, is_main=True, warn=warnings.append)
    (tmp_path / "STOP").touch(), (tmp_path / "SAVE").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", stale)
        assert not any([requests.stop(), requests.stop(), requests.save(), requests.save()])
        assert len(warnings) == 2 and "STOP cannot be looked at" in warnings[0] and "Stale" in warnings[0]
    assert requests.stop() and requests.save()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stale)
        requests.saved()
    assert not requests.save()  # it is answered, although the file is still there
    requests.saved()
    assert not (tmp_path / "SAVE").exists()
    assert [text.split("SAVE ")[1] for text in warnings if "SAVE" in text][1:] == [
        "can be looked at again",
        "was answered but stays: Stale file handle",
    ]


def stale(*_, **__):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_a_heartbeat_that_cannot_be_written_is_tried_again(tmp_path):
    folder = tmp_path / "logs"
    folder.touch()  # a file where the folder should be
    heart = Heartbeat(folder, every=3600.0, steps=50, world_size=1)
    with pytest.raises(UserError, match="heartbeat.json"):
        heart.beat("training", 1, 5.0)
    assert not heart.beat("training", 2, 5.0)  # not before it is due, and nobody may take that for a success
    folder.unlink()
    assert heart.beat("saving", 3)
    assert read_heartbeat(folder)["step"] == 3


def test_the_heartbeat_is_written_when_due_and_whenever_the_state_changes(tmp_path):
    heart = Heartbeat(tmp_path, every=3600.0, steps=50, world_size=2)
    heart.beat("training", 1, 5.0)
    heart.beat("training", 2, 4.0)
    assert read_heartbeat(tmp_path)["step"] == 1
    heart.beat("saving", 3)
    found = read_heartbeat(tmp_path)
    assert (found["state"], found["step"], found["loss"], found["pid"]) == ("saving", 3, 4.0, os.getpid())
    never = Heartbeat(tmp_path / "none", every=0.0, steps=50, world_size=2)
    never.beat("training", 1, 5.0)
    assert not (tmp_path / "none").exists()


def test_events_survive_a_cut_line(tmp_path):
    append_event(tmp_path, "save", 10, "saved", seconds=1.5)
    with open(tmp_path / "events.jsonl", "a") as stream:
        stream.write('{"time": 1, "ev')
    assert [(e["event"], e["step"], e["seconds"]) for e in read_events(tmp_path)] == [("save", 10, 1.5)]
