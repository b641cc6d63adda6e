"""Export of a sharded checkpoint with the 10B model's shapes, against `cp` and DeepSpeed's own zero_to_fp32.

    python benchmarks/export.py --folder /fast/disk                  # about 11 GB there, removed at the end
    python benchmarks/export.py --json benchmarks/results/export.json

The checkpoint: four layers of the 10B model (hidden 4096, 64 heads) with bf16 weights, fp32 masters and Adam moments,
in DeepSpeed's files: once as 8 data ranks with ZeRO 3, once as 4 tensor x 2 data ranks with ZeRO 1 (zero_to_fp32
cannot read that one). Files are made one by one from a real save of a tiny model (synthetic_checkpoint.py), which the
same code must reproduce in keys, types, shapes and order before anything is measured.

Every contender is a process of its own, and starts with the checkpoint's files dropped from the page cache. Times
include the start of Python and the flush to the disk. `cp` copies what the export writes (the same bytes read and
written) and, once, the whole checkpoint. Memory is read from /proc/PID/status every 10 ms: `anonymous` is what the
process took (RssAnon); `resident` (VmHWM) also counts pages of mapped files, which the system takes back whenever it
wants.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.synthetic_checkpoint import TEN_BILLION_LAYERS, check_format, real_saves, write_checkpoint
from vilg.checkpoint.state import source_commit, versions

_ZERO_TO_FP32 = """
import os, sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert
convert(sys.argv[1], sys.argv[2], safe_serialization=True, tag=sys.argv[3])
for entry in os.scandir(sys.argv[2]):
    with open(entry.path, "rb+") as stream:
        os.fsync(stream.fileno())
"""


@dataclass(frozen=True)
class Measured:
    """One run of a contender. Memory in bytes."""

    seconds: float
    anonymous: int
    resident: int


def main() -> int:
    """Make the checkpoints, measure all contenders, print and store the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary folder")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--rounds", type=int, default=3, help="runs of the contenders that medians are taken of")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = measure_all(Path(name), rounds=options.rounds)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure_all(folder: Path, *, rounds: int) -> dict:
    """The result as a dictionary; `folder` may be left full."""
    real = real_saves(folder / "real")
    for layout, checkpoint in real.items():
        check_format(checkpoint, folder / "check" / layout)
    found: dict = {
        "claim": "export takes at most twice the time of cp, and a quarter of the memory of zero_to_fp32",
        "command": " ".join(["python", "benchmarks/export.py", "--rounds", str(rounds)]),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "memory": psutil.virtual_memory().total},
        "versions": versions(),
        "commit": source_commit(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "model": TEN_BILLION_LAYERS,
    }
    for layout, sizes in {"zero3": dict(data=8, tensor=1), "tensor": dict(data=2, tensor=4)}.items():
        checkpoint = folder / "run" / "checkpoints" / "step_00000004"
        started = time.perf_counter()
        write_checkpoint(checkpoint, real[layout], **sizes)
        print(f"{layout}: checkpoint made in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        found[layout] = {**sizes, **measure(checkpoint, folder, rounds=rounds, with_peer=layout == "zero3")}
        shutil.rmtree(checkpoint)
    return found


def measure(checkpoint: Path, folder: Path, *, rounds: int, with_peer: bool) -> dict:
    """Contenders in turn, `rounds` times where it is cheap; medians and ratios."""
    out, copy = folder / "export", folder / "copy"
    runs: dict[str, list[Measured]] = {}

    def run(name: str, command: list[str], *, keep: bool = False) -> None:
        _drop_from_cache([checkpoint, out])
        runs.setdefault(name, []).append(_run(command))
        last = runs[name][-1]
        print(f"  {name}: {last.seconds:.1f} s, {last.anonymous / 1e6:.0f} MB", file=sys.stderr, flush=True)
        for path in (copy, *([] if keep else [out])):
            shutil.rmtree(path, ignore_errors=True)

    def export(*options: str) -> list[str]:
        return [sys.executable, "-m", "vilg", "export", str(checkpoint), "--out", str(out), *options]

    def copied(source: Path) -> list[str]:
        return ["sh", "-c", 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +', "sh", str(source), str(copy)]

    for _ in range(rounds):
        run("export fp32, not verified", export("--dtype", "fp32", "--no-verify"), keep=True)
        written = _size(out)
        run("cp of the export", copied(out))
    run("export fp32, verified", export("--dtype", "fp32"))
    run("export bf16, verified", export("--dtype", "bf16"))
    run("cp of the checkpoint", copied(checkpoint))
    for _ in range(rounds if with_peer else 0):
        run("zero_to_fp32", [sys.executable, "-c", _ZERO_TO_FP32, str(checkpoint.parent), str(copy), checkpoint.name])
    medians = {name: statistics.median(m.seconds for m in found) for name, found in runs.items()}
    peaks = {name: max(m.anonymous for m in found) for name, found in runs.items()}
    ours = medians["export fp32, not verified"]
    ratios = {"export to cp of the same bytes, time": ours / medians["cp of the export"]}
    if with_peer:
        ratios["export (verified) to zero_to_fp32, memory"] = peaks["export fp32, verified"] / peaks["zero_to_fp32"]
        ratios["export (not verified) to zero_to_fp32, time"] = ours / medians["zero_to_fp32"]
    return {
        "checkpoint_bytes": _size(checkpoint),
        "exported_bytes": written,
        "median_seconds": medians,
        "peak_anonymous_bytes": peaks,
        "ratios": ratios,
        "runs": {name: [asdict(m) for m in found] for name, found in runs.items()},
    }


def _run(command: list[str]) -> Measured:
    """Raises RuntimeError with the last lines of a command that fails."""
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        anonymous = resident = 0
        while process.poll() is None:
            anonymous = max(anonymous, _status(process.pid, "RssAnon"))
            resident = max(resident, _status(process.pid, "VmHWM"))
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{log.read().decode()[-2000:]}")
    return Measured(seconds, anonymous, resident)


def _status(pid: int, key: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def _each_file(folders: list[Path], action: Callable[[Path], None]) -> None:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                action(path)


def _drop_from_cache(folders: list[Path]) -> None:
    def drop(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

    _each_file(folders, drop)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
