"""What the batch script decides after a start, against stand-ins for SLURM's commands: cases that are slow to bring about
on the real SLURM of tests/slurm, which covers the rest.
"""

import os
import shutil
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
if [ -n "${WARNED:-}" ]; then # it ends when it is told to, which the real srun tells the ranks
    trap 'echo told >> "$NOTES/srun"; exit 0' USR1
    kill -USR1 "$PPID"
    for _ in {1..200}; do /bin/sleep 0.1; done
fi
echo "3: the rank's words"
exit "${TRAIN:-0}"
"""
# Gives the first SILENT calls of each kind no answer.
SCONTROL = """#!/usr/bin/env bash
case "$*" in
    "show hostnames"*) ;;
    *show*|requeue*|update*)
        echo >> "$NOTES/asked $*"
        if [ "$(wc -l < "$NOTES/asked $*")" -le "${SILENT:-0}" ]; then
            echo "slurm_load error: Unable to contact slurm controller (connect failure)" >&2
            exit 1
        fi;;
esac
case "$*" in
    "show hostnames"*) echo node1; echo node2;;
    *"show node"*) echo "NodeName=$4 Arch=x NodeAddr=10.0.0.1 NodeHostName=$4";;
    *"show job"*) echo "JobId=1 ReqNodeList=(null) ExcNodeList=node7 Nice=0";;
    *)
        echo "$@" >> "$NOTES/scontrol"
        [ -z "${FORBIDDEN:-}" ] || { echo "Requested operation is presently disabled for job 1" >&2; exit 1; };;
esac
"""
SCANCEL = "#!/bin/sh\nexit 1\n"  # no answer either
SLEEP = '#!/bin/sh\necho >> "$NOTES/slept"\n'


@pytest.fixture
def submit(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL), ("sleep", SLEEP)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(**settings: str) -> tuple[int, str, list[str]]:
        """Exit code, what was started, and calls of scontrol, after a batch with these outcomes; its words are in `said`."""
        shutil.rmtree(tmp_path / "notes", ignore_errors=True)
        (tmp_path / "notes").mkdir()
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
        recipe = settings.pop("recipe", DEBUG_RECIPE)
        command = [ROOT / "launch" / "train.sbatch", recipe, f"--run_dir={tmp_path / 'run'}"]
        with open(tmp_path / "said", "w") as said:
            code = subprocess.run(command, env=environment, stdout=said, stderr=said, timeout=60).returncode
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


def slept(tmp_path: Path) -> int:
    notes = tmp_path / "notes" / "slept"
    return len(notes.read_text().splitlines()) if notes.exists() else 0


def test_a_controller_that_does_not_answer_for_a_while_is_asked_again(submit, tmp_path):
    code, started, requeued = submit(LATEST="step_00000010", SILENT="5")
    assert code == 0 and requeued == AGAIN and "addr=10.0.0.1" in started and slept(tmp_path) == 10
    code, _, calls = submit(**BAD_NODE, VILG_EXCLUDE_BAD="yes", SILENT="5")
    assert code == 0 and calls == [*AGAIN, "update JobId=123456 ExcNodeList=node7,node2"]


def test_without_any_answer_the_first_nodes_name_is_its_address_and_the_end_says_why(submit, tmp_path):
    code, started, requeued = submit(LATEST="step_00000010", SILENT="1000000")
    assert (code, requeued) == (1, []) and "addr=node1" in started and slept(tmp_path) >= 2 * 10
    said = (tmp_path / "said").read_text()
    assert "SLURM does not answer, nothing is requeued" in said and "does not requeue" not in said


def test_a_cluster_that_forbids_requeueing_is_asked_once(submit, tmp_path):
    code, _, requeued = submit(LATEST="step_00000010", FORBIDDEN="yes")
    assert code == 1 and requeued == AGAIN and slept(tmp_path) == 0
    assert "SLURM does not requeue this job" in (tmp_path / "said").read_text()


def test_the_ranks_are_warned_though_the_controller_does_not_answer(submit):
    code, started, requeued = submit(LATEST="step_00000010", WARNED="yes", VILG_PREFLIGHT="no")
    assert code == 0 and requeued == AGAIN and started.endswith("told\n")


ABSENT = "0: slurmstepd-node1: error: execve(): /shared/python: No such file or directory"
ENDED = "srun: error: node1: task 0: Exited with exit code 2"


@pytest.mark.parametrize("said", [f"{ABSENT}\n{ENDED}", f"{ENDED}\n{ABSENT}"])
def test_a_node_without_the_interpreter_is_no_mistake_of_the_ranks(submit, tmp_path, said):
    """SLURM gives the tasks exit code 2, the number of the error."""
    assert submit(TRAIN="2", SAID=said)[::2] == (0, AGAIN)
    assert not (tmp_path / "run" / "logs" / "mistake").exists()
    assert submit(TRAIN="2", SAID=said, VILG_CHAINED="yes")[::2] == (75, [])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"SLURM_SUBMIT_DIR": "/not/mounted"}, "has no /not/mounted"),
        ({"PYTHON": "/not/mounted/python"}, "has no /not/mounted/python"),
        ({"VILG_RUN_DIR": "/proc/run"}, "cannot make /proc/run/logs"),
    ],
)
def test_a_host_without_the_file_system_leaves_the_job_to_another_three_times(submit, tmp_path, setting, message):
    for restart, (code, requeued) in {"0": (0, AGAIN), "2": (0, AGAIN), "3": (1, [])}.items():
        assert submit(**setting, SLURM_RESTART_COUNT=restart) == (code, "", requeued)
        assert message in (tmp_path / "said").read_text()
    assert submit(**setting, VILG_CHAINED="yes") == (1, "", [])  # the next of its chain is another start


def test_a_mistake_in_the_call_ends_the_job_at_once_with_its_message(submit, tmp_path):
    assert submit(recipe="no-such.yaml") == (2, "", [])
    assert "no-such.yaml" in (tmp_path / "said").read_text()
    assert submit(SLURM_SUBMIT_DIR="")[1:] == ("", [])
    assert "start this script with vilg submit or sbatch" in (tmp_path / "said").read_text()


def test_local_script_says_how_it_is_used():
    done = subprocess.run([ROOT / "launch" / "local.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "launch/local.sh RECIPE" in done.stdout
    assert Path(ROOT / "launch" / "local.sh").stat().st_mode & 0o111
