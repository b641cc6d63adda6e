"""The cluster of the session, and what its jobs train."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.golden.make import DEBUG_RECIPE, ROOT, make_data
from tests.slurm.cluster import Cluster, wait_for, why_not
from vilg.train.rundir import LOGS

# Small, so that little waits; a batch that two, and four, processes can share.
SHORT = {
    "batch.micro_size": 4,
    "schedule.steps": 12,
    "schedule.warmup_steps": 2,
    "checkpoint.every_steps": 4,
    "logging.every_steps": 1,
    "logging.tensorboard": "false",
}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two virtual nodes; skips with the reason where there can be none."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def data(session_tmp) -> dict[str, str]:
    """Recipe overrides that name tiny data."""
    folder = session_tmp / "slurm-data"
    folder.mkdir()
    return make_data(folder)


@dataclass
class Job:
    """A submitted run. number: the last job's."""

    cluster: Cluster
    run_dir: Path
    numbers: list[str] = field(default_factory=list)

    @property
    def number(self) -> str:
        return self.numbers[-1]

    @property
    def log(self) -> Path:
        return self.run_dir / LOGS / f"slurm-{self.number}.out"

    def text(self) -> str:
        """What the job's log holds so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, *states: str, seconds: float = 150) -> dict[str, str]:
        """Until the job is in one of the states (default: at its end); what SLURM knows of it then."""
        return self.cluster.wait(self.number, *states, seconds=seconds, log=[self.log])

    def wait_for_text(self, text: str, *, seconds: float = 100) -> None:
        """Until the log holds the text."""
        wait_for(lambda: text in self.text(), seconds, lambda: f"{text!r} is not in the log:\n{self.text()[-4000:]}")


@pytest.fixture(scope="session")
def submit(cluster, data):
    """`vilg submit` of the debug recipe on two nodes of two processes each; returns the Job."""

    def run(run_dir: Path, *options: str, env: dict[str, str] | None = None, nodes: str = "2", **changes) -> Job:
        overrides = {**data, **SHORT, **changes, "run_dir": run_dir}
        keys = [f"--{key.replace('__', '.')}={value}" for key, value in overrides.items()]
        command = [sys.executable, "-m", "vilg", "submit", str(DEBUG_RECIPE), "--nodes", nodes, "--gpus-per-node", "0"]
        command += ["--tasks-per-node", "2", *options, *keys]
        environment = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        before, cluster.environment = cluster.environment, {**cluster.environment, **environment}
        try:
            said = cluster.call(*command)
        finally:
            cluster.environment = before
        numbers = [line.split()[2] for line in said.splitlines() if line.startswith("submitted job")]
        return Job(cluster, run_dir, numbers)

    return run
