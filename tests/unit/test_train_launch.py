"""What the batch script decides after a start, against stand-ins for SLURM's commands: cases that are slow to bring about
on the real SLURM of tests/slurm, which covers the rest.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.make import DEBUG_RECIPE, ROOT

# Stands for srun: notes how it was called, and does what the ranks would do to the run folder.
SRUN = """#!/usr/bin/env bash
echo "$@ port=$MASTER_PORT addr=$MASTER_ADDR" >> "$NOTES/srun"
case "$*" in *"vilg preflight"*)
    [ -z "${BAD:-}" ] || echo "$BAD" > "$RUN/logs/bad_nodes"
    [ -z "${PASSED:-}" ] || printf '{"passed": %s}' "$PASSED" > "$RUN/logs/preflight.json"
    exit "${PREFLIGHT:-0}";;
esac
[ -z "${LATEST:-}" ] || echo "$LATEST" > "$RUN/LATEST"
[ -z "${STOP:-}" ] || touch "$RUN/STOP"
[ -z "${HOST_LOST:-}" ] || kill -9 "$PPID"
[ -z "${SAID:-}" ] || echo "$SAID"
echo "3: the rank's words"
exit "${TRAIN:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
    "show hostnames"*) echo node1; echo node2;;
    *"show node"*) echo "NodeName=$4 Arch=x NodeAddr=10.0.0.1 NodeHostName=$4";;
    *"show job"*) echo "JobId=1 ReqNodeList=(null) ExcNodeList=node7 Nice=0";;
    *) echo "$@" >> "$NOTES/scontrol";;
esac
"""


@pytest.fixture
def submit(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(**settings: str) -> tuple[int, str, list[str]]:
        """Exit code, what was started, and calls of scontrol, after a batch with these outcomes."""
        for notes in ("srun", "scontrol"):
            (tmp_path / "notes").mkdir(exist_ok=True)
            (tmp_path / "notes" / notes).unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "NOTES": str(tmp_path / "notes"),
            "RUN": str(tmp_path / "run"),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS_PER_NODE": "4",
            **settings,
        }
        command = [ROOT / "launch" / "train.sbatch", DEBUG_RECIPE, f"--run_dir={tmp_path / 'run'}"]
        code = subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode
        started, requeued = (tmp_path / "notes" / "srun"), (tmp_path / "notes" / "scontrol")
        started = started.read_text() if started.exists() else ""
        return code, started, requeued.read_text().splitlines() if requeued.exists() else []

    return run


def test_ranks_get_address_and_port_and_their_words_a_file_each(submit, tmp_path):
    code, started, requeued = submit(LATEST="step_00000010")
    assert code == 0 and requeued == ["requeue 123456"]
    assert "port=23456 addr=10.0.0.1" in started and "--ntasks=8" in started
    assert (tmp_path / "run" / "logs" / "rank_3.out").read_text() == "the rank's words\n"


def test_a_port_that_somebody_listens_on_is_passed_over(submit):
    with socket.create_server(("127.0.0.1", 23456)):
        assert "port=23457" in submit(LATEST="step_00000010")[1]


def test_the_run_folder_that_was_checked_at_submission_needs_no_python_on_the_batch_host(submit, tmp_path):
    code, started, _ = submit(LATEST="step_00000010", VILG_RUN_DIR=str(tmp_path / "run"), PYTHON="/not/there/python")
    assert code == 0 and "/not/there/python -m vilg train" in started


FAILED = {"TRAIN": "1", "VILG_PREFLIGHT": "no"}
CRASHED = {"PREFLIGHT": "1"}
BAD_NODE = {"PREFLIGHT": "1", "PASSED": "false", "BAD": "node2"}
AGAIN = ["requeue 123456"]


def test_an_unfinished_run_is_requeued_while_it_makes_progress_and_stops_after_three_starts_without(submit):
    for step in range(4):
        assert submit(LATEST=f"step_{step:08d}", TRAIN="1")[2] == AGAIN
    assert [submit(**FAILED)[2] for _ in range(3)] == [AGAIN, AGAIN, []]
    code, started, requeued = submit(LATEST="step_00000009", SLURM_JOB_ID="123457")
    assert (code, started, requeued) == (1, "", [])


def test_a_checkpoint_from_elsewhere_starts_the_count_anew(submit, tmp_path):
    assert [len(submit(**FAILED)[2]) for _ in range(3)] == [1, 1, 0]
    (tmp_path / "run" / "LATEST").write_text("step_00000010\n")
    assert submit(**FAILED)[2] == AGAIN
    (tmp_path / "run" / "logs" / "fruitless_starts").write_text("nonsense")
    assert submit(**FAILED)[2] == AGAIN


def test_later_jobs_of_a_chain_do_not_start_after_three_fruitless_ones(submit):
    starts = [submit(**FAILED, VILG_CHAINED="yes", SLURM_JOB_ID=f"{job}") for job in range(11, 16)]
    assert [bool(started) for _, started, _ in starts] == [True] * 3 + [False] * 2
    assert [code for code, _, _ in starts] == [1] * 5 and not any(requeued for _, _, requeued in starts)


def test_starts_that_end_without_a_word_are_counted(submit):
    """The node with the batch script is lost: SLURM requeues by itself."""
    lost = [submit(HOST_LOST="yes", VILG_PREFLIGHT="no", SLURM_RESTART_COUNT=f"{i}") for i in range(4)]
    assert [bool(started) for _, started, _ in lost] == [True] * 3 + [False]


@pytest.mark.parametrize("said", ["", "srun: error: node2: task 5: Exited with exit code 2"])
def test_a_mistake_stops_the_job_and_those_that_were_submitted_with_it(submit, said):
    """srun's own code may be another one, of ranks that were ended for it."""
    mistake = {"TRAIN": "137" if said else "2", "SAID": said}
    assert submit(**mistake, VILG_CHAINED="yes")[::2] == (2, [])
    assert submit(VILG_CHAINED="yes", SLURM_JOB_ID="123457") == (2, "", [])
    assert submit(SLURM_RESTART_COUNT="1") == (2, "", [])
    code, started, requeued = submit(LATEST="step_00000010")  # by hand, perhaps mended
    assert (code, requeued) == (0, AGAIN) and "vilg train" in started
    assert submit(LATEST="step_00000020", SLURM_RESTART_COUNT="1")[2] == AGAIN


def test_a_preflight_that_finds_something_bad_ends_the_job_and_a_mistake_the_chain(submit):
    code, started, requeued = submit(PREFLIGHT="1", PASSED="false")
    assert code == 1 and requeued == [] and "vilg train" not in started
    assert submit(PREFLIGHT="2", VILG_CHAINED="yes")[::2] == (2, [])
    assert submit(VILG_CHAINED="yes") == (2, "", [])


def test_a_preflight_that_crashes_is_requeued_and_counts(submit, tmp_path):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "preflight.json").write_text('{"passed": false}')  # an earlier start's
    for requeued in (AGAIN, AGAIN, []):
        code, started, calls = submit(**CRASHED)
        assert calls == requeued and "vilg train" not in started
    assert submit(**CRASHED, VILG_CHAINED="yes") == (1, "", [])


def test_a_verdict_without_fault_before_a_crash_is_no_reason_to_stop(submit):
    assert submit(PREFLIGHT="1", PASSED="true")[2] == AGAIN
    assert submit(PREFLIGHT="134", VILG_CHAINED="yes")[::2] == (134, [])


def test_a_stop_file_ends_the_job_and_keeps_later_ones_from_starting(submit):
    assert submit(STOP="yes", LATEST="step_00000020")[::2] == (0, [])
    assert submit(VILG_CHAINED="yes") == (0, "", [])


def test_a_stop_file_that_a_rank_finds_first_is_no_mistake(submit, tmp_path):
    assert submit(STOP="yes", TRAIN="2")[::2] == (0, [])
    (tmp_path / "run" / "STOP").unlink()
    assert "vilg train" in submit(LATEST="step_00000020", VILG_CHAINED="yes")[1]


def test_a_bad_node_joins_those_left_out_only_when_asked_and_does_not_count(submit):
    assert submit(**BAD_NODE)[::2] == (1, [])
    for _ in range(4):
        code, _, calls = submit(**BAD_NODE, VILG_EXCLUDE_BAD="yes")
        assert code == 0 and calls == [*AGAIN, "update JobId=123456 ExcNodeList=node7,node2"]


def test_local_script_says_how_it_is_used():
    done = subprocess.run([ROOT / "launch" / "local.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "launch/local.sh RECIPE" in done.stdout
    assert Path(ROOT / "launch" / "local.sh").stat().st_mode & 0o111
