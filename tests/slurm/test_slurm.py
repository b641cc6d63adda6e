"""Jobs on a real SLURM with two virtual nodes of two processes each: what ends a run early, and how it goes on."""

import json
import re
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from tests.golden.make import DEBUG_RECIPE, ROOT, read_losses
from tests.slurm.cluster import wait_for
from tests.slurm.conftest import SHORT, STEPS, job_environment
from tests.slurm.processes import environments, kill_all
from tests.unit.data_support import make_raw
from vilg.config import dump_recipe, load_recipe
from vilg.data.tokenize import main as tokenize_main
from vilg.train.events import read_events
from vilg.train.rundir import LOGS

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


def events(job, kind: str) -> list[dict]:
    """The run's events of one kind."""
    return [row for row in read_events(job.run_dir / LOGS) if row["event"] == kind]


def finished(job, *, restarts: int) -> None:
    """Wait for the end, which must be a finished run after so many requeues: one more is a fault nobody planted."""

    def over(facts: dict[str, str]) -> bool:
        assert int(facts.get("Restarts", 0)) <= restarts, f"started more than {1 + restarts} times:\n{job.text()}"
        return facts.get("JobState") == "COMPLETED"

    job.cluster.watch(job.number, over, "not completed", log=job.log)
    assert (job.run_dir / "DONE").exists() and int(job.cluster.job(job.number)["Restarts"]) == restarts


# Brings a cluster up, says so, and waits to be killed.
OWNER = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import Cluster
with Cluster(Path(sys.argv[1]), nodes=1) as cluster:
    print(cluster.mark, flush=True)
    time.sleep(600)
"""


def test_a_killed_owner_leaves_no_daemon(cluster, tmp_path):
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as owner:
        mark = owner.stdout.readline().strip()
        owner.kill()

    def left() -> list[int]:
        return [pid for pid, environment in environments() if mark in environment]

    assert mark == f"SLURM_CONF={tmp_path}/slurm.conf"
    wait_for(lambda: not left(), lambda: f"still there: {left()}")


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
    status = {row["check"]: row["status"] for row in report["rows"]}
    assert {status[f"{way} in a node"] for way in ("all-reduce", "reduce-scatter", "p2p")} <= {"ok", "slow"}


@pytest.mark.slow
def test_the_demos_recipe_trains_to_the_end_on_two_nodes_and_draws_its_sheets(submit, tmp_path):
    """As the demo has it, but for the data's codes and the sizes that four processes can share."""
    recipe = ROOT / "launch" / "recipes" / "demo-fast" / "train.yaml"
    codes = {"tokens__image_vocab_size": 512, "tokens__text_slots": 32, "batch__global_size": 64}
    job = submit(tmp_path / "run", "--no-preflight", recipe=recipe, schedule__steps=40, checkpoint__every_steps=20, **codes)
    finished(job, restarts=0)
    losses = read_losses(job.run_dir)
    assert len(losses) == 40 and losses[-1] < losses[0]
    assert (job.run_dir / "samples" / "step_00000040.png").exists()


def test_a_mistake_that_only_the_ranks_can_see_is_not_tried_again_by_job_or_chain(submit, tmp_path):
    prompts = {"samples__every_steps": 10, "samples__prompts": f"[{'a red horse ' * 30}]"}
    job = submit(tmp_path / "run", "--no-preflight", "--chain", "2", **prompts)
    first = replace(job, numbers=job.numbers[:1])
    facts = first.wait()
    assert facts["JobState"] == "FAILED" and facts["Restarts"] == "0", first.text()
    assert "samples.prompts" in first.text() and "requeued" not in first.text()
    assert job.wait()["JobState"] == "FAILED" and "found a mistake in recipe or data; not started" in job.text()


def test_batch_jobs_that_wait_for_each_other_export_a_run_draw_write_and_serve(cluster, unbroken, tmp_path):
    def batch(script: str, *arguments: object, after: str = "") -> str:
        options = ["--parsable", f"--output={tmp_path}/%j.out", *([f"--dependency=afterok:{after}"] if after else [])]
        command = ["sbatch", *options, f"launch/{script}.sbatch", *map(str, arguments)]
        return cluster.call(*command, env=job_environment(), cwd=ROOT).strip()

    model, drawn = ["--model", tmp_path / "export"], tmp_path / "drawn"
    (tmp_path / "prompts").write_text("a red horse\n白色的船\n")
    jobs = [batch("export", unbroken.run_dir, "--out", tmp_path / "export")]
    jobs.append(
        batch("eval", "generate", *model, "--prompts", tmp_path / "prompts", "--out", drawn, "--num", 1, after=jobs[-1])
    )
    jobs.append(batch("eval", "caption", *model, drawn / "0000_00.png", after=jobs[-1]))
    jobs.append(batch("eval", "answer", *model, drawn / "0000_00.png", "--question", "a horse?", after=jobs[-1]))
    for job in jobs:
        log = tmp_path / f"{job}.out"
        assert cluster.wait(job, log=log)["JobState"] == "COMPLETED", log.read_text()
    assert len(list(drawn.glob("*_00.png"))) == 2 and '"caption"' in (tmp_path / f"{jobs[-2]}.out").read_text()
    assert '"answer"' in (tmp_path / f"{jobs[-1]}.out").read_text()

    served = batch("eval", "serve", *model, "--port", 0)
    log = tmp_path / f"{served}.out"
    address = cluster.watch(served, lambda _: log.exists() and ADDRESS.search(log.read_text()), "does not serve", log=log)
    with urllib.request.urlopen(f"{address[0]}/health", timeout=60) as health:
        assert json.load(health)["status"] == "ok"
    cluster.call("scancel", served)
    assert cluster.wait(served, log=log)["JobState"] == "CANCELLED"


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
    wait_for(lambda: not cluster.processes(), lambda: f"still there: {cluster.processes()}")
    assert "requeued" not in job.text()
    stop = events(job, "stop")[-1]["step"]  # it had the time to save
    assert stop > 0 and (job.run_dir / "LATEST").read_text().strip() == f"step_{stop:08d}"


@pytest.mark.parametrize("node", ["node2", "node1"])
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


def test_a_bad_node_is_found_before_training_and_left_out(submit, tmp_path):
    """node2 has another version of a package than node1."""
    package = tmp_path / "other" / "safetensors-0.0.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.0.1\n")
    python = tmp_path / "python"
    found = f'[ "${{SLURMD_NODENAME:-}}" != node2 ] || export PYTHONPATH={package.parent}:$PYTHONPATH'
    python.write_text(f'#!/bin/sh\n{found}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = ["--exclude-bad"]
    job = submit(tmp_path / "run", *options, nodes="1-2", env={"PYTHON": str(python)}, schedule__steps=3)
    job.wait_for_text("preflight found node2 bad; requeued")
    assert "node2: safetensors 0.0.1 instead of" in job.text()
    finished(job, restarts=1)
    assert job.wait()["NodeList"] == "node1" and job.wait()["ExcNodeList"] == "node2"


def test_an_array_of_tokenising_jobs_is_completed_after_one_was_killed(cluster, data, tmp_path):
    raw = make_raw(tmp_path / "raw", [40] * 8)
    arguments = [str(raw), "--image-model", data["tokens.image_model"], "--out", str(tmp_path / "out")]

    def array() -> str:
        command = ["sbatch", "--parsable", "--array=0-1", f"--output={tmp_path}/%a.out", "launch/tokenize.sbatch"]
        return cluster.call(*command, *arguments, env=job_environment(), cwd=ROOT).strip()

    def ends(job: str) -> list[str]:
        return [cluster.wait(f"{job}_{part}", log=tmp_path / f"{part}.out")["JobState"] for part in (0, 1)]

    first = array()
    record = tmp_path / "out" / "records" / "00001.tar.json"  # the second element's first shard of four
    wait_for(record.exists, lambda: (tmp_path / "1.out").read_text(), every=0.01)
    kill_all(lambda environment: {cluster.mark, "SLURM_ARRAY_TASK_ID=1", "SLURM_PROCID=0"} <= environment)
    assert ends(first) == ["COMPLETED", "FAILED"], (tmp_path / "1.out").read_text()
    assert record.exists() and not (tmp_path / "out" / "manifest.json").exists()
    assert ends(array()) == ["COMPLETED"] * 2
    tokenize_main([str(raw), "--image-model", data["tokens.image_model"], "--out", str(tmp_path / "whole")])
    for name in ("manifest.json", *(path.name for path in raw.glob("*.tar"))):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


LONG = {"batch__global_size": 256, "schedule__steps": 90}


@pytest.fixture(scope="module")
def long(submit, tmp_path_factory):
    """A run of a minute or more that nothing happened to."""
    job = submit(tmp_path_factory.mktemp("long") / "run", "--no-preflight", **LONG)
    finished(job, restarts=0)
    return job


@pytest.mark.slow
def test_the_real_time_limit_is_survived(submit, long, tmp_path):
    """Two minutes. SLURM looks at the clock twice a minute and warns early rather than late: here after 40 to 70 s."""
    job = submit(tmp_path / "run", "--time", "2", "--warn-seconds", "50", "--no-preflight", **LONG)
    facts = job.wait()
    assert facts["JobState"] == "COMPLETED" and int(facts["Restarts"]) == len(events(job, "stop")) > 0, job.text()
    assert "SLURM warns of the end" in job.text() and read_losses(job.run_dir) == read_losses(long.run_dir)


@pytest.mark.slow
def test_a_chain_of_three_short_jobs_equals_one_long_one(submit, cluster, long, tmp_path):
    job = submit(tmp_path / "run", "--chain", "3", "--no-preflight", **LONG)
    for number in job.numbers[:2]:
        place = replace(job, numbers=[number])
        place.wait_for_text("  loss ")
        cluster.call("scancel", "--signal=USR1", "--batch", number)
        place.wait_for_text("the next job of the chain continues")
    assert job.wait()["JobState"] == "COMPLETED", job.text()
    assert len(events(job, "stop")) == 2 and read_losses(job.run_dir) == read_losses(long.run_dir)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (["--partition", "nightly"], {}, "--partition nightly: there is no such partition; this cluster has batch"),
        ([], {"at": "/proc/vilg/run"}, "run_dir=/proc/vilg/run cannot be written to"),
        ([], {"seed": 7}, "seed: 0 there, 7 here"),
        ([], {"batch__micro_size": 8}, "batch.global_size=16 is not divisible by batch.micro_size=8 x 4"),
        (["--time", "soon"], {}, "Invalid --time specification"),
        (["--", "--nodelist=node9"], {}, "Invalid node name specified"),
    ],
)
def test_a_mistake_is_found_at_submission(submit, data, tmp_path, options, changes, message):
    changes = dict(changes)
    run_dir = Path(changes.pop("at", tmp_path / "run"))
    if "seed" in changes:  # the folder of a run with another seed, before its first checkpoint
        run_dir.mkdir()
        overrides = {**data, **SHORT, "run_dir": run_dir}
        recipe = load_recipe(DEBUG_RECIPE, [f"{key}={value}" for key, value in overrides.items()])
        (run_dir / "config.yaml").write_text(dump_recipe(recipe))
    done = submit.attempt(run_dir, *options, **changes)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "submitted" not in done.stdout


def test_a_finished_run_is_not_submitted_again(submit, tmp_path):
    (tmp_path / "DONE").touch()
    done = submit.attempt(tmp_path)
    assert done.returncode == 0 and "is finished: nothing to submit" in done.stdout
