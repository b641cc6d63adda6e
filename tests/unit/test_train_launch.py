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
case "$*" in *"vilg preflight"*) [ -z "${BAD:-}" ] || echo "$BAD" > "$RUN/logs/bad_nodes"; exit "${PREFLIGHT:-0}";; esac
[ -z "${LATEST:-}" ] || echo "$LATEST" > "$RUN/LATEST"
[ -z "${STOP:-}" ] || touch "$RUN/STOP"
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
        return code, started.read_text(), requeued.read_text().splitlines() if requeued.exists() else []

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


def test_an_unfinished_run_is_requeued_while_it_makes_progress_and_stops_after_three_starts_without(submit):
    for step in range(2):
        assert submit(LATEST=f"step_{step:08d}")[2] == ["requeue 123456"]
    assert [len(submit(TRAIN="1")[2]) for _ in range(3)] == [1, 1, 0]


def test_a_mistake_a_failed_preflight_a_stop_file_and_a_chained_job_are_not_requeued(submit):
    assert submit(TRAIN="2")[::2] == (2, [])
    code, started, requeued = submit(PREFLIGHT="1")
    assert code == 1 and requeued == [] and "vilg train" not in started
    assert submit(TRAIN="1", VILG_CHAINED="yes")[::2] == (1, [])
    assert submit(STOP="yes", LATEST="step_00000020")[::2] == (0, [])


def test_a_bad_node_joins_those_left_out_only_when_asked(submit):
    assert submit(PREFLIGHT="1", BAD="node2", VILG_PREFLIGHT="yes")[::2] == (1, [])
    code, _, calls = submit(PREFLIGHT="1", BAD="node2", VILG_EXCLUDE_BAD="yes")
    assert code == 0 and calls == ["requeue 123456", "update JobId=123456 ExcNodeList=node7,node2"]


def test_local_script_says_how_it_is_used():
    done = subprocess.run([ROOT / "launch" / "local.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "launch/local.sh RECIPE" in done.stdout
    assert Path(ROOT / "launch" / "local.sh").stat().st_mode & 0o111
