"""The cluster of the session, and what its jobs train."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.golden.make import DEBUG_RECIPE, ROOT, make_data
from tests.slurm.cluster import Cluster, why_not
from vilg.train.rundir import LOGS

# Small, so that little waits; a batch that two, and four, processes can share.
STEPS = 30
SHORT = {
    "batch.micro_size": 4,
    "schedule.steps": STEPS,
    "schedule.warmup_steps": 2,
    "checkpoint.every_steps": 10,
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


@pytest.fixture(autouse=True)
def _nothing_runs_on(cluster):
    """A test that fails leaves no job that would keep the nodes from the next one."""
    yield
    cluster.clear()


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

    def wait(self, *states: str) -> dict[str, str]:
        """Until the job is in one of the states (default: at its end); what SLURM knows of it then."""
        return self.cluster.wait(self.number, *states, log=self.log)

    def wait_for_text(self, text: str) -> None:
        """Until the log holds the text."""
        self.cluster.watch(self.number, lambda _: text in self.text(), f"{text!r} is not in the log", log=self.log)


class Submit:
    """`vilg submit` of the debug recipe on two nodes of two processes each."""

    def __init__(self, cluster: Cluster, data: dict[str, str]) -> None:
        self.cluster, self.data = cluster, data

    def attempt(
        self, run_dir: Path, *options: str, recipe: Path = DEBUG_RECIPE, env: dict[str, str] | None = None,
        nodes: str = "2", **changes,
    ) -> subprocess.CompletedProcess:  # fmt: skip
        """Run the command; options behind -- go to sbatch, changes are overrides of the recipe with __ for the dot."""
        cut = options.index("--") if "--" in options else len(options)
        overrides = {"run_dir": run_dir, **self.data, **SHORT}
        overrides |= {key.replace("__", ".") if key != "run_dir" else key: value for key, value in changes.items()}
        command = [sys.executable, "-m", "vilg", "submit", str(recipe), "--nodes", nodes, "--gpus-per-node", "0"]
        command += ["--tasks-per-node", "2", *options[:cut], *(f"--{key}={value}" for key, value in overrides.items())]
        environment = {**self.cluster.environment, **job_environment(), **(env or {})}
        return subprocess.run(
            [*command, *options[cut:]], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
        )

    def __call__(self, run_dir: Path, *options: str, **settings) -> Job:
        """Submit; AssertionError if that is refused."""
        done = self.attempt(run_dir, *options, **settings)
        assert done.returncode == 0, done.stderr
        numbers = [line.split()[2].rstrip(";") for line in done.stdout.splitlines() if line.startswith("submitted job")]
        return Job(self.cluster, run_dir, numbers)


def job_environment() -> dict[str, str]:
    """What the batch scripts need to find this interpreter and this repository."""
    return {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def submit(cluster, data) -> Submit:
    """The command, with this cluster and data."""
    return Submit(cluster, data)
