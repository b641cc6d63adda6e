"""Tokenising on several processes and ranks: the same bytes, one error, nobody left behind by a killed parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.unit.data_support import make_raw
from tests.unit.test_data_tokenize import published
from vilg.data.tokenize import main, place
from vilg.errors import UserError
from vilg.tokens.vqgan import ImageTokenizer, ImageTokenizerConfig

SHARDS, SAMPLES = 30, 20


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with raw shards, a tokenizer, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("job")
    make_raw(folder / "raw", [SAMPLES] * SHARDS, lambda n, f: f | {"png": b"broken"} if n % 60 == 7 else f)
    torch.manual_seed(0)
    small = {"code_dim": 8, "encoder_width": 16, "decoder_width": 16, "num_codes": 64}
    ImageTokenizer(ImageTokenizerConfig(image_size=32, factor=4, **small)).save(folder / "model")
    assert main(arguments(folder, "whole", "--processes", "1", "--threads", "0")) == 0
    return folder


def arguments(folder: Path, out: str, *options: str) -> list[str]:
    paths = [str(folder / "raw"), "--image-model", str(folder / "model"), "--out", str(folder / out)]
    return [*paths, "--batch-size", "8", "--max-bad-fraction", "0.1", *options]


def test_threads_change_nothing(job):
    assert main(arguments(job, "threads", "--processes", "1", "--threads", "3")) == 0
    assert published(job / "threads") == published(job / "whole")


def test_processes_change_nothing_and_a_finished_job_is_seen(job):
    for _ in range(2):
        assert main(arguments(job, "processes", "--processes", "2")) == 0
        assert published(job / "processes") == published(job / "whole")


def test_ranks_share_the_shards_and_the_last_one_writes_the_manifest(job, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(arguments(job, "ranks")) == 0
        assert (job / "ranks" / "manifest.json").exists() == (rank == "0")
    assert "part 2/2 is finished" in capsys.readouterr().out
    assert published(job / "ranks") == published(job / "whole")


def test_a_place_is_that_of_torchrun_or_of_a_job_step():
    step = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert place({}) == (0, 1, 0)
    assert place(step) == (3, 8, 1)
    assert place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}) == (0, 1, 0)  # a script beside srun
    assert place(step | {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2"}) == (5, 6, 2)


@pytest.mark.parametrize("device, message", [("gpu", "is none that tokenizes"), ("cuda:99", "is not there: . GPUs are")])
def test_a_device_that_is_not_there_is_a_clear_error(job, device, message):
    with pytest.raises(UserError, match=f"--device {device} {message}"):
        main(arguments(job, "devices", "--device", device))


def test_a_mistake_that_a_process_meets_is_the_jobs(job, tmp_path):
    make_raw(tmp_path / "raw", [40, 40], lambda n, f: f | {"png": b"broken"} if n >= 40 else f)
    (tmp_path / "model").symlink_to(job / "model")
    with pytest.raises(UserError, match=r"40 of the first (40|80) samples cannot be used.*00001\.tar key '000010039'"):
        main(arguments(tmp_path, "out", "--processes", "2"))


def test_killed_outright_it_leaves_no_process_and_ends_with_the_same_bytes(job):
    out = job / "killed"
    for records in (1, 6):
        command = [sys.executable, "-m", "vilg", "data", "tokenize", *arguments(job, "killed", "--processes", "2")]
        started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while len(list((out / "records").glob("*.json"))) < records:
            assert started.poll() is None, started.stderr.read().decode()
            time.sleep(0.001)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        os.kill(started.pid, signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL and len(children) >= 2
        until = time.monotonic() + 60
        while any(running(child) for child in children):
            assert time.monotonic() < until, "its processes go on"
            time.sleep(0.01)
    assert not (out / "manifest.json").exists()
    assert main(arguments(job, "killed", "--processes", "1")) == 0
    assert published(out) == published(job / "whole")


def running(pid: str) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
