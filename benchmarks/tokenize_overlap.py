"""Claim: `vilg data tokenize` decodes pictures while the encoder works: a job takes the longer of both, not their sum.

    python benchmarks/tokenize_overlap.py               # two minutes on two cores
    python benchmarks/tokenize_overlap.py --quick       # to try the script

JPEGs of 640 x 480 become tokens in one process, with 0 (one after the other), 1 and 2 decoding threads, in turn, by two
encoders: the image tokenizer at 64 x 64 pixels on a CPU core, and a stand-in for a GPU at 256 x 256, which needs no core
and waits as long as one thread needs to decode the batch. The rates are those of whole jobs, index, hashes and writing
included; all of an encoder's jobs must give the same bytes. Medians over the repeats; writes
benchmarks/results/tokenize_overlap.json.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vilg.checkpoint.state import source_commit, versions
from vilg.data.encode import Recipe
from vilg.data.tokenize import tokenize
from vilg.data.writer import ShardWriter
from vilg.tokens.vqgan import ImageTokenizer, ImageTokenizerConfig
from vilg.tokens.vqgan.images import decode_image

RESULT = Path(__file__).parent / "results" / "tokenize_overlap.json"
BATCH = 16
CORE_SIZE, GPU_SIZE = 64, 256  # pixels
THREADS = (0, 1, 2)


class StandIn:
    """An encoder that needs no core. seconds: of a batch."""

    vocab_size, factor, image_size, hash = 8192, 8, GPU_SIZE, "stand-in"

    def __init__(self, seconds: float):
        self.seconds = seconds

    def encode(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] -> int64 [B, H / 8, W / 8]"""
        time.sleep(self.seconds * len(images) / BATCH)
        return (images[:, 0, :: self.factor, :: self.factor] * 127 + 128).long()


def make_raw(folder: Path, shards: int, samples: int) -> list[bytes]:
    """Raw shards; returns the pictures of one."""
    draw = np.random.default_rng(0)
    pictures = []
    for _ in range(samples):
        pixels = np.asarray(Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8)).resize((640, 480)), np.int16)
        file = io.BytesIO()
        noisy = (pixels + draw.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    for shard in range(shards):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for number, picture in enumerate(pictures):
                writer.write(f"{shard:05d}{number:04d}", {"jpg": picture, "txt": b"a picture", "json": b"{}"})
    return pictures


def decoding_time(pictures: list[bytes], size: int) -> float:
    """Seconds that one thread needs for a picture."""
    decode_image(pictures[0], size)
    began = time.perf_counter()
    for picture in pictures:
        decode_image(picture, size)
    return (time.perf_counter() - began) / len(pictures)


def encoding_time(encoder: ImageTokenizer | StandIn) -> float:
    """Seconds of a batch, by the image."""
    images = torch.zeros(BATCH, 3, encoder.image_size, encoder.image_size)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        encoder.encode(images)
        times.append((time.perf_counter() - began) / BATCH)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="little data, no result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards, samples = (2, 32) if options.quick else (4, 100)
    repeats = 2 if options.quick else options.repeats
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pictures = make_raw(folder / "raw", shards, samples)
        torch.manual_seed(0)
        model = ImageTokenizer(ImageTokenizerConfig(image_size=CORE_SIZE, factor=8)).eval()
        stand_in = StandIn(decoding_time(pictures, GPU_SIZE) * BATCH)
        for name, encoder in (("tokenizer on a core", model), ("stand-in for a GPU", stand_in)):
            rates: dict[int, list[float]] = {threads: [] for threads in THREADS}
            hashes = set()
            for repeat in range(repeats):
                for threads in THREADS:
                    out, began = folder / f"{name}{repeat}-{threads}", time.perf_counter()
                    recipe = Recipe(encoder.image_size, BATCH)
                    made = tokenize(folder / "raw", out, encoder, recipe=recipe, threads=threads, progress=False)
                    rates[threads].append(shards * samples / (time.perf_counter() - began))
                    hashes.add(made.hash)
            medians = {threads: round(statistics.median(runs), 1) for threads, runs in rates.items()}
            found[name] = {
                "size": encoder.image_size,
                "decoding_ms_an_image": round(1e3 * decoding_time(pictures, encoder.image_size), 2),
                "encoding_ms_an_image": round(1e3 * encoding_time(encoder), 2),
                "median_images_per_s_by_threads": medians,
                "images_per_s": {threads: [round(rate, 1) for rate in runs] for threads, runs in rates.items()},
                "bytes_equal": len(hashes) == 1,
            }
            each = ", ".join(f"{t} threads {rate} images/s ({rate / medians[0]:.2f} x)" for t, rate in medians.items())
            print(f"{name}: {each}", flush=True)
    same = all(each["bytes_equal"] for each in found.values())
    content = {
        "format_version": 1,
        "claim": "decoding overlaps encoding: images/s of whole jobs by decoding threads, the same bytes",
        "command": "python benchmarks/tokenize_overlap.py",
        "commit": source_commit(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": None},
        "versions": versions(),
        "data": {"jpeg": [640, 480], "batch": BATCH, "shards": shards, "samples": shards * samples},
        "repeats": repeats,
        **found,
    }
    if not options.quick:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
