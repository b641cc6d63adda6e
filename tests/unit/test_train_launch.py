"""The batch script against stand-ins for SLURM's commands: what it starts, and when it requeues."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.make import DEBUG_RECIPE, ROOT

# Stands for srun: notes how it was called, and does what the ranks would do to the run folder.
SRUN = """#!/usr/bin/env bash
echo "$@ port=$MASTER_PORT addr=$MASTER_ADDR" >> "$NOTES/srun"
case "$*" in *"vilg preflight"*) exit "${PREFLIGHT:-0}";; esac
mkdir -p "$RUN"
[ -z "${LATEST:-}" ] || echo "$LATEST" > "$RUN/LATEST"
[ -z "${DONE:-}" ] || touch "$RUN/DONE"
exit "${TRAIN:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> "$NOTES/scontrol"; fi
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
            **settings,
        }
        command = [ROOT / "launch" / "train.sbatch", DEBUG_RECIPE, f"--run_dir={tmp_path / 'run'}"]
        code = subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode
        started, requeued = (tmp_path / "notes" / "srun"), (tmp_path / "notes" / "scontrol")
        return code, started.read_text(), requeued.read_text().splitlines() if requeued.exists() else []

    return run


def test_a_finished_run_is_not_requeued_and_ranks_get_address_and_port(submit):
    code, started, requeued = submit(DONE="yes", LATEST="step_00000050")
    assert code == 0 and requeued == []
    assert "vilg preflight" in started and f"vilg train {DEBUG_RECIPE}" in started
    assert "port=23456 addr=node1" in started and "--kill-on-bad-exit=1" in started


def test_an_unfinished_run_is_requeued_while_it_makes_progress(submit):
    for step in range(4):
        assert submit(LATEST=f"step_{step:08d}")[2] == ["requeue 123456"]


def test_three_starts_without_a_new_checkpoint_end_the_requeueing(submit):
    submit(LATEST="step_00000010")
    assert [len(submit(TRAIN="1")[2]) for _ in range(3)] == [1, 1, 0]


def test_a_mistake_or_a_failed_preflight_is_not_requeued(submit):
    assert submit(TRAIN="2")[::2] == (2, [])
    code, started, requeued = submit(PREFLIGHT="1")
    assert code == 1 and requeued == [] and "vilg train" not in started


def test_local_script_says_how_it_is_used():
    done = subprocess.run([ROOT / "launch" / "local.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "launch/local.sh RECIPE" in done.stdout
    assert Path(ROOT / "launch" / "local.sh").stat().st_mode & 0o111
