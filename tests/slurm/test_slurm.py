"""Jobs on a real SLURM with two virtual nodes of two processes each: what ends a run early, and how it goes on."""

import json

import pytest

from tests.golden.make import read_losses
from tests.slurm.cluster import wait_for
from tests.slurm.conftest import STEPS
from vilg.train.events import read_events
from vilg.train.rundir import LOGS


def events(job, kind: str) -> list[dict]:
    """The run's events of one kind."""
    return [row for row in read_events(job.run_dir / LOGS) if row["event"] == kind]


def finished(job, *, restarts: int, seconds: float = 200) -> None:
    """Wait for the end, which must be a finished run after so many requeues."""
    facts = job.wait(seconds=seconds)
    assert facts["JobState"] == "COMPLETED", job.text()
    assert (job.run_dir / "DONE").exists() and int(facts["Restarts"]) == restarts, job.text()


@pytest.fixture(scope="module")
def unbroken(submit, tmp_path_factory):
    """A run that nothing happened to."""
    job = submit(tmp_path_factory.mktemp("unbroken") / "run")
    finished(job, restarts=0)
    return job


def test_a_submitted_recipe_trains_to_the_end_on_two_nodes(unbroken):
    assert len(read_losses(unbroken.run_dir)) == STEPS
    assert f"0: step {STEPS}/{STEPS}" in unbroken.text() and "vilg: the run is finished" in unbroken.text()
    assert f"step {STEPS}/{STEPS}" in (unbroken.run_dir / LOGS / "rank_0.out").read_text()
    report = json.loads((unbroken.run_dir / LOGS / "preflight.json").read_text())
    assert report["bad_nodes"] == [] and all(row["status"] != "bad" for row in report["rows"])


def test_a_warned_run_saves_requeues_itself_and_ends_with_the_same_losses(submit, cluster, unbroken, tmp_path):
    job = submit(tmp_path / "run", "--no-preflight")
    job.wait_for_text("step 2/")
    cluster.call("scancel", "--signal=USR1", "--batch", job.number)  # what SLURM does before the time limit
    job.wait_for_text("requeued")
    stop = events(job, "stop")[-1]["step"]
    assert 0 < stop < STEPS and (job.run_dir / "checkpoints" / f"step_{stop:08d}").is_dir()
    finished(job, restarts=1)
    assert read_losses(job.run_dir) == read_losses(unbroken.run_dir)


def test_a_nan_is_one_skipped_step_and_a_killed_rank_ends_the_job_at_once(submit, tmp_path):
    job = submit(tmp_path / "run", "--no-preflight", env={"VILG_FAULT": "nan@step3:rank1,kill@step13:rank3"})
    job.wait_for_text("task 3: Killed")
    job.wait_for_text("requeued")
    assert "kill@step13:rank3 happens now" in (job.run_dir / LOGS / "rank_3.log").read_text()
    finished(job, restarts=1)
    assert [row["step"] for row in events(job, "nonfinite")] == [3]
    rows = [json.loads(line) for line in (job.run_dir / LOGS / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["skipped"]] == [3]


def test_a_stopped_rank_is_found_by_the_watchdog_and_the_job_starts_again(submit, tmp_path):
    job = submit(tmp_path / "run", "--no-preflight", env={"VILG_FAULT": "stop@step13:rank2"}, guards__hang_timeout=6)
    job.wait_for_text("SILENT, look there first: rank 2")
    finished(job, restarts=1)
    logs = job.run_dir / LOGS
    assert "Thread" in (logs / "stacks_rank0.txt").read_text() and "Thread" in (logs / "stacks_rank3.txt").read_text()


def test_scancel_leaves_no_process(submit, cluster, tmp_path):
    job = submit(tmp_path / "run", "--no-preflight", schedule__steps=5000)
    job.wait_for_text("step 2/")
    assert cluster.processes()
    cluster.call("scancel", job.number)
    assert job.wait()["JobState"] == "CANCELLED"
    wait_for(lambda: not cluster.processes(), 30, lambda: f"still there: {cluster.processes()}")
    assert "requeued" not in job.text() and events(job, "stop")  # it had the time to save


@pytest.mark.parametrize("node", ["node2", pytest.param("node1", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_nodes_that_are_left(submit, cluster, unbroken, tmp_path, node):
    """node1 holds the batch script: there SLURM itself requeues."""
    job = submit(tmp_path / "run", "--no-preflight", nodes="1-2")
    job.wait_for_text("step 12/")
    cluster.kill_node(node)
    try:
        finished(job, restarts=1)
        other = {"node1": "node2", "node2": "node1"}[node]
        assert job.wait()["NodeList"] == other and "2 process(es) = 2 data" in job.text()
        assert read_losses(job.run_dir) == pytest.approx(read_losses(unbroken.run_dir), rel=1e-3)
    finally:
        cluster.start_node(node)
        cluster.wait_idle()


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (["--partition", "nightly"], {}, "--partition nightly: there is no such partition; this cluster has batch"),
        ([], {"run_dir": "/proc/vilg/run"}, "run_dir=/proc/vilg/run cannot be written to"),
        ([], {"seed": 7}, "seed: 0 there, 7 here"),
        ([], {"batch__micro_size": 8}, "batch.global_size=16 is not divisible by batch.micro_size=8 x 4"),
        (["--time", "soon"], {}, "Invalid --time specification"),
        (["--", "--nodelist=node9"], {}, "node9"),
    ],
)
def test_a_mistake_is_found_at_submission(submit, cluster, unbroken, options, changes, message):
    done = submit.attempt(unbroken.run_dir if "seed" in changes else None, *options, **changes)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "submitted" not in done.stdout


def test_a_finished_run_is_not_submitted_again(submit, unbroken):
    done = submit.attempt(unbroken.run_dir)
    assert done.returncode == 0 and "is finished: nothing to submit" in done.stdout
