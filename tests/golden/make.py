"""Tiny data for the trainer's tests, and the command that writes the golden losses anew:

    OMP_NUM_THREADS=1 python -m tests.golden.make

Run it only when a change is meant to change the numbers, and say why in the commit.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from vilg.data.fields import encode_codes
from vilg.data.manifest import Manifest, ShardEntry
from vilg.data.writer import ShardWriter
from vilg.tokens.text import train_text_tokenizer
from vilg.tokens.vqgan import ImageTokenizer, ImageTokenizerConfig

ROOT = Path(__file__).resolve().parents[2]
DEBUG_RECIPE = ROOT / "launch" / "recipes" / "debug.yaml"
GOLDEN = Path(__file__).with_name("debug_losses.json")
NUM_SAMPLES, NUM_HELD_OUT = 96, 40
_COLOURS = ("red", "green", "blue", "白色", "黑色")
_THINGS = ("horse", "apple", "boat", "马", "苹果", "船")


def make_data(folder: Path) -> dict[str, str]:
    """Text tokenizer, untrained image tokenizer, token shards and held-out ones; the recipe overrides that name them."""
    generator = np.random.Generator(np.random.Philox(key=2026))
    captions = [f"a {c} {t}" for c in _COLOURS for t in _THINGS] + [f"{c}的{t}" for c in _COLOURS for t in _THINGS]
    train_text_tokenizer(captions, folder / "text.model", vocab_size=320)
    torch.manual_seed(0)
    shape = ImageTokenizerConfig(
        image_size=32,
        factor=4,
        num_codes=512,
        code_dim=8,
        encoder_width=16,
        encoder_blocks=1,
        decoder_width=16,
        decoder_blocks=1,
    )
    image = ImageTokenizer(shape)
    image.save(folder / "image")
    # Every caption has its own 8 x 8 texture of a few codes, with noise: something to learn within 50 steps.
    for name, shards, samples in (("tokens", 2, NUM_SAMPLES // 2), ("held_out", 1, NUM_HELD_OUT)):
        entries = []
        for number in range(shards):
            with ShardWriter(folder / name / f"{number:05d}.tar") as shard:
                for sample in range(samples):
                    kind = int(generator.integers(len(captions)))
                    texture = (np.add.outer(np.arange(8) * (kind % 7 + 1), np.arange(8) * (kind % 5 + 1)) + kind * 8) % 512
                    codes = np.where(generator.random((8, 8)) < 0.1, generator.integers(0, 512, (8, 8)), texture)
                    shard.write(
                        f"{number:05d}{sample:04d}",
                        {
                            "img.npy": encode_codes(codes.astype(np.uint16).reshape(-1)),
                            "txt": captions[kind].encode(),
                            "json": b"{}",
                        },
                    )
            entries.append(ShardEntry(shard.path.name, shard.samples, shard.bytes, shard.sha256))
        Manifest(image.hash, (8, 8), 512, tuple(entries)).save(folder / name)
    return {
        "tokens.text_model": str(folder / "text.model"),
        "tokens.image_model": str(folder / "image"),
        "data.train": str(folder / "tokens"),
        "evaluation.data": str(folder / "held_out"),
        "parallel.deepspeed": str(ROOT / "ds_configs" / "zero1.json"),
    }


def train_command(overrides: dict[str, object], *, processes: int) -> list[str]:
    """The command a user would type: alone, or under torchrun."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*start, "vilg", "train", str(DEBUG_RECIPE), *(f"--{key}={value}" for key, value in overrides.items())]


def train_environment() -> dict[str, str]:
    """One thread per process, the loopback interface, and the repository on the path."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}


def read_evaluations(run_dir: Path) -> dict[int, dict[str, float]]:
    """Held-out losses of a run by step, of the steps that have any."""
    rows = [json.loads(line) for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: {key: value for key, value in row.items() if key.startswith("val_")} for row in rows}
    return {step: found for step, found in losses.items() if found}


def read_losses(run_dir: Path) -> list[float]:
    """The loss of every step of a run, in order."""
    rows = [json.loads(line) for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "steps are missing, doubled or out of order"
    return [row["loss"] for row in rows]


def platform_id() -> dict[str, str]:
    """What the last digits depend on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": model,
        "capability": capability,
        "torch": torch.__version__,
        "sentencepiece": version("sentencepiece"),
    }


def main() -> None:
    """Train the debug recipe with two processes and write its losses."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = {**make_data(folder), "run_dir": folder / "run"}
        subprocess.run(train_command(overrides, processes=2), env=train_environment(), check=True, cwd=ROOT)
        losses = read_losses(folder / "run")
    GOLDEN.write_text(json.dumps({"platform": platform_id(), "losses": losses}, indent=1) + "\n")
    print(f"wrote {len(losses)} losses to {GOLDEN}")


if __name__ == "__main__":
    main()
