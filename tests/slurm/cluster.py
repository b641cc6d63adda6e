"""A real SLURM on this machine, in a folder of its own: munged, slurmctld and one slurmd per virtual node.

Debian's `slurm-wlm` and `munge` and the rights of root are needed; `why_not` says what is missing. The virtual nodes
share the machine and its host name, and are told apart by SLURMD_NODENAME. There is no cgroup isolation, no accounting
and no container, so nothing here shows those.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

from tests.distributed.helpers import free_port
from tests.slurm.processes import environments, kill_all, start_watcher

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
STANDSTILL = 120.0  # seconds without anything new after which a wait is given up
_SBIN = "/usr/sbin:/sbin"  # not on every user's path
_NODE = "VILG_TEST_NODE"  # in the environment of a virtual node's daemons, which the step daemons inherit

# Short waits instead of a cluster's long ones; cred_expire lets a requeued job start at once instead of after 120 s.
_CONFIG = """
ClusterName=vilgtest
SlurmctldHost={host}(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
SlurmctldTimeout=30
MessageTimeout=15
SlurmdTimeout=20
ReturnToService=2
KillWait=5
MinJobAge=3600
JobRequeue=1
FirstJobId={first_job}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be brought up here; None if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"needs Debian's slurm-wlm and munge (apt-get install slurm-wlm munge); not found: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "SLURM's daemons must be started by root here"
    return None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{_SBIN}"


def wait_for(
    condition: Callable[[], object],
    what: str | Callable[[], str],
    *,
    seconds: float = STANDSTILL,
    progress: Callable[[], Hashable] = lambda: None,
    every: float = 0.3,
) -> object:
    """Poll `every` so many seconds until the condition holds; its value.

    AssertionError with `what` when `progress` has given the same value for `seconds`: how long a thing takes says how
    busy the machine is, a standstill that it will never come.
    """
    last, since = progress(), time.monotonic()
    while not (found := condition()):
        if (now := progress()) != last:
            last, since = now, time.monotonic()
        stood = time.monotonic() - since
        assert stood < seconds, f"nothing new for {stood:.0f} s: {what if isinstance(what, str) else what()}"
        time.sleep(every)
    return found


class Cluster:
    """A context manager. environment: for every client command. Nothing of it is left when it has ended."""

    def __init__(self, folder: Path, *, nodes: int = 2) -> None:
        self.folder, self.nodes = folder, [f"node{i + 1}" for i in range(nodes)]
        self.daemons: dict[str, subprocess.Popen] = {}
        self.conf = folder / "slurm.conf"
        self.mark = f"SLURM_CONF={self.conf}"  # in the environment of every process of the cluster and of its jobs
        self.watcher: subprocess.Popen | None = None
        # A job's port for its ranks follows from its number, and other clusters may run on this machine.
        self.first_job = 1000 + secrets.randbelow(50_000)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "VILG"))}
        self.environment |= {"SLURM_CONF": str(self.conf), "PATH": _path(), "GLOO_SOCKET_IFNAME": "lo"}

    def __enter__(self) -> "Cluster":
        for name in ("run", "state", "log", "dev", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._configure()
        self.watcher = start_watcher(self.mark)
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
            for node in self.nodes:
                self.start_node(node)
            self.wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            self.call("scancel", "--user=root", check=False)
        self.watcher.stdin.close()
        self.watcher.wait()
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.1.{i + 1} Port={free_port()} CPUs=8 RealMemory=64000 "
            "Gres=gpu:a100:4 State=UNKNOWN"
            for i, node in enumerate(self.nodes)
        ]
        for i in range(4):  # devices that SLURM only counts
            (self.folder / "dev" / f"nvidia{i}").symlink_to("/dev/null")
        values = dict(host=host, port=free_port(), folder=self.folder, first_job=self.first_job, nodes="\n".join(nodes))
        self.conf.write_text(_CONFIG.format(**values))
        names = ",".join(self.nodes)
        gres = f"NodeName={names} Name=gpu Type=a100 File={self.folder}/dev/nvidia[0-3]\n"
        (self.folder / "gres.conf").write_text(gres)
        version = self.call("slurmd", "-V").split()[1]
        plugin = "disabled" if tuple(map(int, version.split(".")[:2])) >= (23, 11) else "cgroup/v1"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

    def _start_munge(self) -> None:
        key, run = self.folder / "munge.key", self.folder / "run"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        files = [f"--key-file={key}", f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid"]
        files += [f"--log-file={self.folder}/log/munged.log", f"--seed-file={run}/munged.seed"]
        self._start("munged", "munged", "--foreground", "--force", "--num-threads=2", *files)
        wait_for((run / "munge.sock").exists, "munged opens no socket")

    def start_node(self, node: str) -> None:
        """Start a node, also one that was killed."""
        self._start(node, "slurmd", "-D", "-N", node, "-f", str(self.conf), node=node)

    def _start(self, name: str, *command: str, node: str = "") -> None:
        environment = {**self.environment, _NODE: node}
        with open(self.folder / "log" / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def wait_idle(self) -> None:
        """Until all nodes are up and nothing runs on them."""

        def idle() -> bool:
            return set(self.call("sinfo", "-h", "-N", "-o", "%t", check=False).split()) == {"idle"}

        wait_for(idle, lambda: f"nodes not idle:\n{self.call('sinfo', '-Nl')}\n{self.call('squeue')}")

    def clear(self) -> None:
        """End all jobs, as after a test that may have left some."""
        if self.call("squeue", "--noheader", check=False).strip():
            self.call("scancel", "--user=root", check=False)
            self.wait_idle()

    def kill_node(self, node: str) -> None:
        """What a power cut does: the node's daemon, its step daemons and all processes of its jobs end at once."""
        own = {f"{_NODE}={node}", f"SLURMD_NODENAME={node}"}
        kill_all(lambda environment: self.mark in environment and bool(own & environment))
        self.daemons[node].wait()

    def processes(self, *, containing: str = "vilg") -> list[int]:
        """Processes of jobs of this cluster (not its daemons) whose command line holds the word."""
        found = []
        for pid, environment in environments():
            if self.mark in environment and any(e.startswith("SLURM_JOB_ID=") for e in environment):
                try:
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if containing in command:
                    found.append(pid)
        return found

    def call(
        self, *command: str, check: bool = True, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Run a client command; what it printed on stdout. AssertionError if it fails."""
        environment = {**self.environment, **(env or {})}
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=STANDSTILL)
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, NodeList, ...; empty if it did not answer in time."""
        words = self.call("scontrol", "--oneliner", "show", "job", number, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def watch(
        self,
        number: str,
        found: Callable[[dict[str, str]], object],
        what: str,
        *,
        log: Path,
        seconds: float = STANDSTILL,
    ) -> object:
        """Poll a job until `found`, which is given what SLURM knows of it, holds; its value.

        AssertionError with the end of the log when neither job nor log have changed for so many seconds, and at once
        when the job is over.
        """
        facts: dict[str, str] = {}

        def told() -> str:
            text = log.read_text(errors="replace")[-6000:] if log.exists() else f"{log} is not there"
            return f"{what}\njob {number}: {facts}\n{text}"

        def holds() -> object:
            nonlocal facts
            facts = self.job(number) or facts
            is_over = facts.get("JobState") in FINAL  # asked before looking: what comes later would be missed
            value = found(facts)
            assert value or not is_over, f"the job is over, but {told()}"
            return value

        def progress() -> Hashable:
            size = log.stat().st_size if log.exists() else 0
            return size, facts.get("JobState"), facts.get("Restarts")

        return wait_for(holds, told, seconds=seconds, progress=progress)

    def wait(self, number: str, *states: str, log: Path) -> dict[str, str]:
        """Wait until a job is in one of the states (default: a final one); what SLURM knows of it then."""
        wanted = states or FINAL

        def there(facts: dict[str, str]) -> dict[str, str] | None:
            return facts if facts.get("JobState") in wanted else None

        return self.watch(number, there, f"not {' or '.join(wanted)}", log=log)
