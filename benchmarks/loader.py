"""Claim: reading token shards costs a third of webdataset's time or less, raw pictures no more; memory stays flat.

    pip install torchdata==0.11.0        # a peer; vilg does not need it
    python benchmarks/loader.py --json benchmarks/results/loader.json

One process pinned to one core, data in the page cache, contenders in turn, medians of CPU time a sample. Token shards
hold 1,024 codes and a caption; every contender ends with the trainer's micro-batch (`SequenceBatch`, 64 samples), one
id a byte of the caption:

- vilg: `Loader` (order over all samples, strict checks, resumable);
- webdataset: its documented pipeline (shuffle(1000), decode, to_tuple, map, batched), in the process and through a
  DataLoader; and bare: arrays and texts in batches, without the micro-batch;
- torchdata: `StatefulDataLoader` (shuffled, 64 a batch) over a map data set that opens each shard with `tarfile`, notes
  where members lie and reads them by offset.

Raw shards hold JPEGs of 256 x 256: vilg's reader and decoder as `vilg data tokenize` uses them, index included, against
webdataset's decode("rgb8"); both to uint8 [64, 256, 256, 3]. Memory: RssAnon of vilg's loader after each of ten epochs.
"""

import argparse
import gc
import io
import itertools
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vilg.checkpoint.state import source_commit, versions
from vilg.config.schema import DataConfig
from vilg.data.dataset import TokenDataset
from vilg.data.fields import encode_codes
from vilg.data.loader import Loader
from vilg.data.manifest import Manifest, ShardEntry
from vilg.data.shards import RAW_FIELDS, ShardReader, index_shard
from vilg.data.writer import ShardWriter
from vilg.tokens.sequence import SequenceSpec, collate, text_to_image
from vilg.tokens.vqgan.images import decode_image

GRID, CODES, SIDE, BATCH = (32, 32), 8192, 256, 64
SPEC = SequenceSpec(text_slots=64, grid=GRID, text_vocab_size=300, image_vocab_size=CODES)
SHARDS, TOKEN_SAMPLES, RAW_SAMPLES = 8, 2500, 250
Contender = Callable[[], Iterator[int]]  # yields the number of samples in each batch, for ever


class Bytes:
    """A text tokenizer without a model: one token a UTF-8 byte."""

    vocab_size = 260

    def encode(self, text: str) -> list[int]:
        return [4 + byte for byte in text.encode()][: SPEC.text_slots - 1]


def make_tokens(folder: Path) -> None:
    generator, entries = np.random.default_rng(0), []
    for shard in range(SHARDS):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for number in range(TOKEN_SAMPLES):
                caption = f"caption {shard} {number} of a picture of horses".encode()
                codes = encode_codes(generator.integers(0, CODES, GRID[0] * GRID[1]))
                writer.write(f"{shard:05d}{number:04d}", {"img.npy": codes, "txt": caption})
        entries.append(ShardEntry(writer.path.name, writer.samples, writer.bytes, writer.sha256))
    Manifest("synthetic", GRID, CODES, tuple(entries)).save(folder)


def make_raw(folder: Path) -> None:
    """Smooth random pictures, JPEG quality 95: about 20 kB each, as photographs of that size are."""
    generator = np.random.default_rng(1)
    for shard in range(SHARDS):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for number in range(RAW_SAMPLES):
                small = Image.fromarray(generator.integers(0, 256, (48, 48, 3), np.uint8))
                stream = io.BytesIO()
                small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(stream, format="JPEG", quality=95)
                writer.write(f"{shard:05d}{number:04d}", {"jpg": stream.getvalue(), "txt": b"a picture"})


def shards_of(folder: Path) -> str:
    return f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar"


def pair(item: tuple[np.ndarray, str]):
    return text_to_image(SPEC, Bytes().encode(item[1]), item[0])


def our_loader(folder: Path) -> Loader:
    config = DataConfig(train=folder, directions="alternate", text_to_image_fraction=1.0, workers=0)
    return Loader(TokenDataset.open(folder), Bytes(), SPEC, config, seed=0, global_size=16 * BATCH, micro_size=BATCH)


def vilg_tokens(folder: Path) -> Iterator[int]:
    for batches in our_loader(folder):
        yield sum(len(batch) for batch in batches)


def web_tokens(folder: Path, *, full: bool = True, through_loader: bool = False) -> Iterator[int]:
    data = wds.WebDataset(shards_of(folder), shardshuffle=100, seed=0, empty_check=False).repeat().shuffle(1000)
    data = data.decode().to_tuple("img.npy", "txt")
    data = data.map(pair).batched(BATCH, collation_fn=collate) if full else data.batched(BATCH)
    batches = DataLoader(data, batch_size=None, num_workers=0) if through_loader else data
    for _ in batches:
        yield BATCH


class TarPairs(Dataset):
    """Map data set over tars, as users write it: where members lie is noted once, then they are read by offset."""

    def __init__(self, folder: Path) -> None:
        self.files, self.places = [], []
        for path in sorted(folder.glob("*.tar")):
            self.files.append(open(path, "rb"))
            with tarfile.open(path) as tar:
                members = [(len(self.files) - 1, member.offset_data, member.size) for member in tar]
            self.places += list(zip(members[::2], members[1::2], strict=True))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int):
        codes, text = (self._bytes(*place) for place in self.places[index])
        return pair((np.load(io.BytesIO(codes)), text.decode()))

    def _bytes(self, number: int, offset: int, size: int) -> bytes:
        file = self.files[number]
        file.seek(offset)
        return file.read(size)


def torchdata_tokens(folder: Path) -> Iterator[int]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(TarPairs(folder), batch_size=BATCH, shuffle=True, num_workers=0, collate_fn=collate)
    while True:
        for batch in loader:
            yield len(batch)


def vilg_raw(folder: Path) -> Iterator[int]:
    for path in itertools.cycle(sorted(folder.glob("*.tar"))):
        with ShardReader(path, index_shard(path, RAW_FIELDS)) as reader:
            for start in range(0, len(reader), BATCH):
                fields = [reader.read(n) for n in range(start, min(start + BATCH, len(reader)))]
                texts = [each["txt"].decode() for each in fields]
                yield len(np.stack([decode_image(each["jpg"], SIDE) for each in fields])) * bool(texts)


def web_raw(folder: Path) -> Iterator[int]:
    data = wds.WebDataset(shards_of(folder), shardshuffle=False, empty_check=False).repeat().decode("rgb8")
    for images, _ in data.to_tuple("jpg", "txt").batched(BATCH):
        yield len(np.stack(images))


def measure(contenders: dict[str, Contender], *, samples: int, repeats: int) -> dict[str, dict]:
    """Microseconds of CPU a sample and samples/s of each contender: median and all, in turn, after one batch."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            batches = contender()
            next(batches)
            gc.collect()
            count, cpu, wall = 0, time.process_time(), time.perf_counter()
            while count < samples:
                count += next(batches)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            found[name].append((1e6 * cpu / count, count / wall))
            print(f"  {name}: {found[name][-1][0]:.1f} us, {found[name][-1][1]:.0f} samples/s", file=sys.stderr, flush=True)
    return {
        name: {
            "cpu_us_per_sample": statistics.median(cpu for cpu, _ in runs),
            "samples_per_second": statistics.median(rate for _, rate in runs),
            "all_cpu_us": [round(cpu, 2) for cpu, _ in runs],
        }
        for name, runs in found.items()
    }


def memory_by_epoch(folder: Path, *, epochs: int) -> list[float]:
    """RssAnon in MB after each epoch of our loader."""
    loader, sizes = our_loader(folder), []
    steps_an_epoch = SHARDS * TOKEN_SAMPLES // (16 * BATCH)
    batches = iter(loader)
    for _ in range(epochs):
        for _ in range(steps_an_epoch):
            next(batches)
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes.append(round(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024, 1))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each contender (default 7)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, to try the script")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    scale = 10 if options.quick else 1
    with tempfile.TemporaryDirectory() as name:
        tokens, raw = Path(name, "tokens"), Path(name, "raw")
        make_tokens(tokens)
        make_raw(raw)
        memory = memory_by_epoch(tokens, epochs=10)
        token_times = measure(
            {
                "vilg": lambda: vilg_tokens(tokens),
                "webdataset": lambda: web_tokens(tokens),
                "webdataset, DataLoader": lambda: web_tokens(tokens, through_loader=True),
                "webdataset, bare": lambda: web_tokens(tokens, full=False),
                "torchdata": lambda: torchdata_tokens(tokens),
            },
            samples=20_000 // scale, repeats=options.repeats,
        )  # fmt: skip
        raw_times = measure(
            {"vilg": lambda: vilg_raw(raw), "webdataset": lambda: web_raw(raw)},
            samples=2000 // scale, repeats=options.repeats,
        )  # fmt: skip
    ours = token_times["vilg"]["cpu_us_per_sample"]
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    result = {
        "claim": "token shards at least 3x webdataset, raw pictures no slower, memory flat over ten epochs",
        "command": "python benchmarks/loader.py",
        "tokens": token_times,
        "tokens_times_faster": {
            name: round(times["cpu_us_per_sample"] / ours, 2) for name, times in token_times.items() if name != "vilg"
        },
        "raw_jpg_256": raw_times,
        "raw_times_faster": round(
            raw_times["webdataset"]["cpu_us_per_sample"] / raw_times["vilg"]["cpu_us_per_sample"], 2
        ),
        "memory_mb_after_each_epoch": memory,
        "machine": {"cpu": models[0].partition(":")[2].strip() if models else platform.machine(), "cores_used": 1},
        "versions": {**versions(), **{name: version(name) for name in ("webdataset", "torchdata", "pillow")}},
        "commit": source_commit(),
        "samples_a_run": {"tokens": 20_000 // scale, "raw": 2000 // scale, "repeats": options.repeats},
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
