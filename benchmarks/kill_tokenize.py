"""Claim: `vilg data tokenize`, killed outright at any moment and started again, ends with the unbroken run's bytes.

    python benchmarks/kill_tokenize.py               # 20 kills, about three minutes on two cores

Raw shards of JPEGs (one in 25 damaged), each image seen in two random crops, go through the command line. Every start is
killed with SIGKILL, its main process alone, at a random moment after it has begun to write: in turn after a while, right
when a shard has got its name (the shard's index and record follow), and right when a shard's temporary file appears.
Starts differ in their number of processes and of decoding threads; the last one is left to finish. Checked: every file of
the result (shards, indices, records, job.json, manifest.json) equals the unbroken run's byte for byte, and `vilg data
lint` finds no fault. Writes benchmarks/results/kill_tokenize.json; exits with 1 if anything differs.
"""

import argparse
import io
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vilg.checkpoint.state import source_commit, versions
from vilg.data.lint import lint
from vilg.data.writer import ShardWriter
from vilg.tokens.vqgan import ImageTokenizer, ImageTokenizerConfig

RESULT = Path(__file__).parent / "results" / "kill_tokenize.json"
SHARDS, SAMPLES, SIDE = 200, 40, 384
DAMAGED_EVERY = 25
STARTS = (("--processes", "1"), ("--processes", "2"), ("--processes", "1", "--threads", "0"))  # in turn
RECIPE = ("--batch-size", "16", "--max-bad-fraction", "0.1", "--views", "2", "--least-crop", "0.8")
KINDS = ("time", "shard", "temporary")
LONGEST_WAIT = 120.0  # seconds for a start to begin its work


def make_raw(folder: Path) -> Path:
    """Raw shards; the pictures repeat from shard to shard, in another order."""
    draw = np.random.default_rng(0)
    pictures = []
    for _ in range(SAMPLES):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 12, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((SIDE, SIDE * 3 // 4), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    for shard in range(SHARDS):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for sample in range(SAMPLES):
                number = shard * SAMPLES + sample
                picture = pictures[(sample * 7 + shard) % SAMPLES]
                fields = {"jpg": picture[:200] if number % DAMAGED_EVERY == 0 else picture}
                writer.write(f"{number:09d}", {**fields, "txt": f"caption {number}".encode(), "json": b"{}"})
    return folder


def make_tokenizer(folder: Path) -> Path:
    """An untrained image tokenizer: codes as varied as a trained one's."""
    torch.manual_seed(0)
    ImageTokenizer(ImageTokenizerConfig(image_size=64, factor=8, num_codes=1024)).save(folder)
    return folder


def start(raw: Path, tokenizer: Path, out: Path, console: Path, *options: str) -> subprocess.Popen:
    """A start of the command line."""
    command = [sys.executable, "-m", "vilg", "data", "tokenize", str(raw), "--image-model", str(tokenizer)]
    command += ["--out", str(out), *RECIPE, *options]
    with open(console, "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, console: Path) -> None:
    """Wait for a start that nobody kills."""
    if process.wait(600) != 0:
        raise RuntimeError(console.read_text()[-3000:])


def state(out: Path) -> tuple[int, int]:
    """(shards that have their name, temporary shards)."""
    return len(list(out.glob("*.tar"))), len(list(out.glob(".*.tar.tmp")))


def wait_for_moment(kind: str, out: Path, process: subprocess.Popen, draw: random.Random) -> None:
    """Return at a random moment of the kind, or when the process has ended."""
    began, working, first, delay = time.monotonic(), None, state(out), draw.uniform(0.0, 1.0)
    shards = draw.randint(1, 2)
    while process.poll() is None and time.monotonic() < began + LONGEST_WAIT:
        now, found = time.monotonic(), state(out)
        if working is None and found != first:
            working = now
        if working is not None:
            if kind == "time" and now > working + delay:
                return
            if kind == "shard" and found[0] >= first[0] + shards:
                time.sleep(draw.uniform(0.0, 0.004))
                return
            if kind == "temporary" and found[0] >= first[0] + shards - 1 and found[1]:
                time.sleep(draw.uniform(0.0, 0.05))
                return
        time.sleep(0.0005)


def published(out: Path) -> dict[str, bytes]:
    """Every file but hidden temporary ones."""
    files = (path for path in out.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw, began = random.Random(options.seed), time.time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        raw, tokenizer, console = make_raw(folder / "raw"), make_tokenizer(folder / "tokenizer"), folder / "console"
        unbroken, killed = folder / "unbroken", folder / "killed"
        finish(start(raw, tokenizer, unbroken, console), console)
        moments = []
        while len(moments) < options.kills:
            kind = KINDS[len(moments) % len(KINDS)]
            how = STARTS[len(moments) // len(KINDS) % len(STARTS)]
            process = start(raw, tokenizer, killed, console, *how)
            wait_for_moment(kind, killed, process, draw)
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                raise RuntimeError(f"a start was not there to be killed: {console.read_text()[-3000:]}")
            records = len(list((killed / "records").glob("*.json")))
            shards, temporary = state(killed)
            seen = {"records": records, "shards": shards, "temporary_shards": temporary}
            moments.append({"kind": kind, "start": " ".join(how), **seen})
            print(f"kill {len(moments)}: {moments[-1]}", flush=True)
        finish(start(raw, tokenizer, killed, console), console)
        one, other = published(unbroken), published(killed)
        different = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        faults = list(lint(killed))
        files = len(other)
    good = not different and not faults and len(moments) == options.kills
    content = {
        "format_version": 1,
        "claim": "vilg data tokenize killed by SIGKILL at random moments and started again: the unbroken run's bytes",
        "command": "python benchmarks/kill_tokenize.py",
        "commit": source_commit(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": None},
        "versions": versions(),
        "seconds": round(time.time() - began, 1),
        "data": {"shards": SHARDS, "samples": SHARDS * SAMPLES, "damaged_every": DAMAGED_EVERY, "jpeg_side": SIDE},
        "good": good,
        "kills": len(moments),
        "shard_named_but_not_recorded": sum(moment["shards"] > moment["records"] for moment in moments),
        "inside_a_shard": sum(moment["temporary_shards"] > 0 for moment in moments),
        "files_compared": files,
        "files_that_differ": different,
        "lint_faults": faults,
        "moments": moments,
    }
    print(f"{len(moments)} kills, {files} files compared, {len(different)} differ: {'good' if good else 'FAILED'}")
    if options.kills >= 20:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
