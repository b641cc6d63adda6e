"""Data and recipe that the end-to-end benchmarks share: real images of the demo at 16 pixels, 4 x 4 codes, small enough for
thousands of steps on one core.

    prepare(demo, work)     image tokenizer and token shards with images, made once in `work`
    train(work, run, ...)   one `vilg train` in a process of its own

The data of a demo without its trainings take half a minute:

    vilg demo-data --out D/raw --config launch/recipes/demo/scenes.yaml
    vilg tokenizer train-text --captions D/raw/train --vocab-size 1000 --out D/text.model
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
END_TO_END = "model.reconstructor."
SIDE, NUM_CODES = 16, 256
TOKENIZER = {
    "model.image_size": SIDE, "model.factor": 4, "model.num_codes": NUM_CODES, "model.decoder_width": 48,
    "model.encoder_width": 64, "train.steps": 800, "train.held_back": 200,
}  # fmt: skip
RECIPE = {
    "tokens.grid": "[4,4]", "tokens.image_vocab_size": NUM_CODES, "precision": "fp32", "parallel.engine": "torch",
    "samples.every_steps": 0, "logging.every_steps": 100, "data.directions": "alternate", "logging.tensorboard": False,
    "logging.heartbeat_seconds": 0,
}  # fmt: skip


def prepare(demo: Path, work: Path, *, shards: int) -> None:
    """Copy the demo's text tokenizer and first raw shards into `work/raw`, and the shard after them into `work/held_back`;
    train the image tokenizer on the former and tokenize them with their images. What is there already is kept."""
    found = sorted((demo / "raw" / "train").glob("*.tar"))
    if len(found) <= shards or not (demo / "text.model").exists():
        raise SystemExit(f"{demo} holds no demo with more than {shards} raw shards; make it with: vilg demo --out {demo}")
    for folder, chosen in (("raw", found[:shards]), ("held_back", found[shards : shards + 1])):
        (work / folder).mkdir(parents=True, exist_ok=True)
        for shard in chosen:
            if not (work / folder / shard.name).exists():
                shutil.copy(shard, work / folder / shard.name)
    shutil.copy(demo / "text.model", work / "text.model")
    if not (work / "image" / "metrics.json").exists():
        settings = [part for key, value in TOKENIZER.items() for part in ("--set", f"{key}={value}")]
        vilg("tokenizer", "train-image", "--data", work / "raw", "--out", work / "image", *settings)
    if not (work / "tokens" / "manifest.json").exists():
        vilg("data", "tokenize", work / "raw", "--image-model", work / "image", "--out", work / "tokens", "--store-images",
             "--processes", 1)  # fmt: skip


def train(work: Path, run: Path, settings: dict[str, object]) -> float:
    """Seconds of one training; a finished one is left alone. Raises CalledProcessError if it fails."""
    everything = RECIPE | {
        "run_dir": run, "data.train": work / "tokens", "tokens.text_model": work / "text.model",
        "tokens.image_model": work / "image",
    } | settings  # fmt: skip
    started = time.perf_counter()
    vilg("train", "launch/recipes/demo/train.yaml", *(f"--{key}={value}" for key, value in everything.items()))
    return time.perf_counter() - started


def side_by_side(script: str, arguments: Iterable[list[str]], jobs: int) -> None:
    """Run a benchmark once for each list of arguments, at most `jobs` processes of one thread each at a time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda own: subprocess.run([sys.executable, script, *own], env=environment, check=True), arguments))


def vilg(*arguments: object) -> None:
    """Run a command of vilg; its output goes where ours goes."""
    subprocess.run([sys.executable, "-m", "vilg", *map(str, arguments)], check=True, cwd=ROOT)
