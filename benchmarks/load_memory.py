"""Claim: continuing on another layout needs the host memory of a rank's own share, and little more.

    python benchmarks/load_memory.py

A checkpoint of about 0.2B parameters is written in DeepSpeed's files, ZeRO 3 over 8 data ranks, bf16. One rank of another
layout (tensor 2 of 4, no ZeRO) then fills its fp32 weights and moments from it, as `vilg train` does. Measured: the
largest memory of its own (RssAnon; mapped files are the system's to drop), above what it held before the destination
existed, against the bytes of that share and of the whole checkpoint. Writes benchmarks/results/load_memory.json.
"""

import json
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from benchmarks.synthetic_checkpoint import TEN_BILLION_LAYERS, real_saves, write_checkpoint
from tests.distributed.helpers import run_distributed
from vilg.checkpoint.reader import open_weights
from vilg.checkpoint.state import source_commit, versions

RESULT = Path(__file__).parent / "results" / "load_memory.json"
MODEL = {**TEN_BILLION_LAYERS, "model": {"num_layers": 4, "hidden_size": 2048, "num_heads": 32}}
TENSOR_RANK, TENSOR_SIZE = 1, 4


def own_memory() -> int:
    """Bytes of this process that are no mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def load(rank: int, world_size: int, checkpoint: Path) -> dict[str, float]:
    """Fill one tensor rank's weights and moments; bytes and seconds."""
    from vilg.train.moved_state import fill_plain

    weights = open_weights(checkpoint)
    parts = {n: weights.part(n, kind="weight", rank=TENSOR_RANK, size=TENSOR_SIZE).shape for n in weights.names}
    before, peak, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    masters = {name: torch.empty(shape) for name, shape in parts.items()}
    optimizer = torch.optim.AdamW(list(masters.values()))

    def part(name, kind):
        return weights.part(name, kind=kind, rank=TENSOR_RANK, size=TENSOR_SIZE)

    fill_plain(optimizer, masters, part, steps=weights.optimizer_steps)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    share = sum(12 * tensor.numel() for tensor in masters.values())
    largest = max(4 * torch.Size(shape).numel() for _, shape in weights.sizes())
    return {
        "share_bytes": share,
        "largest_tensor_bytes": largest,
        "peak_bytes": peak[0] - before,
        "peak_over_share": (peak[0] - before) / share,
        "seconds": seconds,
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        real = real_saves(Path(scratch) / "real")["zero3"]
        checkpoint = Path(scratch) / "checkpoints" / real.name
        write_checkpoint(checkpoint, real, data=8, tensor=1, changes=MODEL)
        whole = sum(path.stat().st_size for path in checkpoint.iterdir())
        [found] = run_distributed(1, load, (checkpoint,), init=False, timeout=600)
    print(f"whole checkpoint {whole / 1e6:.0f} MB, the rank's share {found['share_bytes'] / 1e6:.0f} MB")
    print(f"largest own memory {found['peak_bytes'] / 1e6:.0f} MB: {found['peak_over_share']:.2f} of the share")
    content = {
        "format_version": 1,
        "claim": "host memory on load stays near a rank's own share",
        "command": "python benchmarks/load_memory.py",
        "commit": source_commit(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": None},
        "versions": versions(),
        "model": MODEL,
        "checkpoint_bytes": whole,
        **found,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
