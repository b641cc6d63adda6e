"""Start-up of the loader on 145M samples: 14,500 shards of 10,000; first batch; resume to the middle.

The shards are one real shard under 14,500 hard links, with its index likewise: manifest, order and file handling have
their full size, reading the data has not (they stay in the page cache). Each case is a process of its own.

    python benchmarks/loader_start.py --json benchmarks/results/loader_start.json
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vilg.config.schema import DataConfig
from vilg.data.dataset import TokenDataset, index_path
from vilg.data.fields import encode_codes
from vilg.data.loader import STATE_VERSION, Loader, LoaderState
from vilg.data.manifest import Manifest, ShardEntry
from vilg.data.writer import ShardWriter
from vilg.tokens.sequence import SequenceSpec

SHARDS, SAMPLES, GRID, CODES = 14_500, 10_000, (32, 32), 8192
SPEC = SequenceSpec(text_slots=64, grid=GRID, text_vocab_size=300, image_vocab_size=CODES)
GLOBAL, MICRO, RANKS = 2048, 4, 64


class Bytes:
    """A text tokenizer without a model: one token a UTF-8 byte."""

    vocab_size = 260

    def encode(self, text: str) -> list[int]:
        return [4 + byte for byte in text.encode()][: SPEC.text_slots - 1]


def make_data(folder: Path) -> None:
    """One shard written, the rest linked; the manifest names all."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "00000.tar") as writer:
        for number in range(SAMPLES):
            codes = generator.integers(0, CODES, GRID[0] * GRID[1])
            caption = f"caption number {number} of a picture".encode()
            writer.write(f"{number:07d}", {"img.npy": encode_codes(codes), "txt": caption, "json": b"{}"})
    one = ShardEntry("00000.tar", writer.samples, writer.bytes, writer.sha256)
    Manifest("synthetic", GRID, CODES, (one,)).save(folder)
    TokenDataset.open(folder).shard_index(0)
    index = index_path(folder / "index", one.name)
    for number in range(1, SHARDS):
        name = f"{number:05d}.tar"
        os.link(folder / one.name, folder / name)
        os.link(index, index_path(folder / "index", name))
    entries = (ShardEntry(f"{n:05d}.tar", one.samples, one.bytes, one.sha256) for n in range(SHARDS))
    Manifest("synthetic", GRID, CODES, tuple(entries)).save(folder)


def start(folder: Path, consumed: int) -> dict[str, float]:
    """Open the data, make the loader of one of 64 ranks at `consumed` samples, take its first step's batches."""
    before = peak_bytes()
    begin = time.perf_counter()
    dataset = TokenDataset.open(folder)
    state = LoaderState(STATE_VERSION, dataset.manifest_hash, 0, consumed // dataset.num_samples, consumed)
    loader = Loader(
        dataset, Bytes(), SPEC, DataConfig(train=folder, directions="both"), seed=0, global_size=GLOBAL,
        micro_size=MICRO, data_rank=5, data_size=RANKS, state=state,
    )  # fmt: skip
    opened = time.perf_counter()
    batches = next(iter(loader))
    done = time.perf_counter()
    assert len(batches) == GLOBAL // MICRO // RANKS
    peak = peak_bytes()
    seconds = {"open_seconds": opened - begin, "first_batch_seconds": done - opened}
    return {**seconds, "peak_bytes": peak, "of_it_imports_bytes": before}


def peak_bytes() -> int:
    """Most memory of this program so far (Linux; getrusage's figure would include the process that started it)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--runs", type=int, default=3, help="processes a case, interleaved (default 3)")
    parser.add_argument("--start", nargs=2, metavar=("FOLDER", "CONSUMED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(Path(options.start[0]), int(options.start[1]))))
        return
    cases = {"start": 0, "middle": SHARDS * SAMPLES // 2 // GLOBAL * GLOBAL}
    found: dict[str, list[dict]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as temporary:
        make_data(Path(temporary))
        for _ in range(options.runs):
            for case, consumed in cases.items():
                command = [sys.executable, __file__, "--start", temporary, str(consumed)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[case].append(json.loads(output))
    medians = {
        case: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for case, runs in found.items()
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    result = {
        "start_up": {
            "samples": SHARDS * SAMPLES, "shards": SHARDS, "ranks": RANKS, "global_size": GLOBAL, "runs": options.runs,
            "medians": medians,
        },  # fmt: skip
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "commit": commit,
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    print(json.dumps(result["start_up"], indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
