"""`vilg preflight RECIPE`: what would stop or slow a long run, found in seconds before it starts.

Runs alone or on all ranks under torchrun or srun; rank 0 prints one table. Exit code 0 if nothing is bad, 1 otherwise.
"""

import argparse
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from vilg.checkpoint.state import versions
from vilg.config import Recipe, load_recipe, take_overrides
from vilg.data.loader import TokenDataset
from vilg.errors import UserError
from vilg.model.size import num_parameters, state_bytes
from vilg.parallel.ranks import Ranks, SharedError
from vilg.tokens.sequence import SequenceSpec
from vilg.tokens.text import TextTokenizer
from vilg.tokens.vqgan import ImageTokenizer
from vilg.train.distributed import distributed
from vilg.train.open import sequence_spec
from vilg.train.rundir import check_run_dir

BAD = 1
_PROBE_BYTES = 64 * 2**20
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Row:
    """One line of the report. `absent`: this machine has no such part, which is no fault."""

    check: str
    status: Literal["ok", "bad", "absent"]
    detail: str


def main(argv: Sequence[str]) -> int:
    """The command `vilg preflight`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with distributed(device) as ranks:
        try:
            rows = _report(argv, ranks, device)
        except SharedError:
            if ranks.is_main:
                raise
            raise SystemExit(2) from None
    return BAD if any(row.status == "bad" for row in rows) else 0


def _report(argv: Sequence[str], ranks: Ranks, device: torch.device) -> list[Row]:
    overrides, rest = take_overrides(argv)
    parser = argparse.ArgumentParser(
        prog="vilg preflight", description="Check recipe, machines and data before a long run."
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--json", type=Path, help="write the rows there too, for machines")
    parser.add_argument("--bad-nodes", type=Path, help="write the names of bad nodes there, if there are any")
    parser.add_argument("--accept", default="", metavar="KEY,KEY", help="as for vilg train")
    options = parser.parse_args(rest)
    accept = tuple(filter(None, options.accept.split(",")))
    recipe = ranks.on_main(lambda: load_recipe(options.recipe, overrides, world_size=ranks.world_size))
    rows = [Row("recipe", "ok", f"{options.recipe}: {recipe.name}, {ranks.world_size} process(es)")]
    for name, check in (
        ("run folder", lambda: _run_folder(recipe, accept)),
        ("disk", lambda: _disk(recipe)),
        ("tokenizers", lambda: _tokenizers(recipe)),
        ("shards", lambda: _shards(recipe)),
    ):
        rows += ranks.on_main(lambda name=name, check=check: _guarded(name, check))
    rows += _machines(ranks, device)
    rows += _collectives(ranks, device)
    if ranks.is_main:
        width = max(len(row.check) for row in rows)
        print("\n".join(f"{row.status:<6}  {row.check:<{width}}  {row.detail}" for row in rows))
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return rows


def _guarded(name: str, check: Callable[[], Iterator[Row]]) -> list[Row]:
    """The rows of a check; a mistake that it finds is a bad row instead of the end of the report."""
    rows: list[Row] = []
    try:
        rows.extend(check())
    except (UserError, OSError) as error:
        rows.append(Row(name, "bad", str(error)))
    return rows


def _run_folder(recipe: Recipe, accept: Sequence[str]) -> Iterator[Row]:
    yield Row("run folder", "ok", "; ".join([str(recipe.run_dir), *check_run_dir(recipe, accept)]))


def _disk(recipe: Recipe) -> Iterator[Row]:
    folder = recipe.run_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    parameters = num_parameters(recipe.model, sequence_spec(recipe))
    state = state_bytes(parameters, precision=recipe.precision, zero_stage=0, data_size=1)
    # One more than is kept exists while a checkpoint is being written.
    needed = (state.weights + state.optimizer) * (recipe.checkpoint.keep_last + 1)
    text = (
        f"{free / 1e9:.1f} GB free at {folder}, {needed / 1e9:.2f} GB for {recipe.checkpoint.keep_last} + 1 checkpoints"
    )
    yield Row("disk space", "ok" if free > needed else "bad", text)
    probe = folder / f".vilg-preflight-{os.getpid()}"
    try:
        started = time.perf_counter()
        with open(probe, "wb") as stream:
            stream.write(os.urandom(2**20) * (_PROBE_BYTES // 2**20))
            stream.flush()
            os.fsync(stream.fileno())
        speed = _PROBE_BYTES / (time.perf_counter() - started)
    finally:
        probe.unlink(missing_ok=True)
    yield Row("disk speed", "ok", f"{speed / 1e6:.0f} MB/s written and flushed: {needed / speed:.0f} s for all of them")


def _tokenizers(recipe: Recipe) -> Iterator[Row]:
    text, image = TextTokenizer.load(recipe.tokens.text_model), ImageTokenizer.load(recipe.tokens.image_model)
    yield Row(
        "tokenizers",
        "ok",
        f"text {text.vocab_size} pieces ({text.hash[:12]}), image {image.vocab_size} codes ({image.hash[:12]})",
    )


def _shards(recipe: Recipe) -> Iterator[Row]:
    dataset = TokenDataset.open(recipe.data.train)
    spec: SequenceSpec = sequence_spec(recipe)
    dataset.check(spec, image_tokenizer_hash=ImageTokenizer.load(recipe.tokens.image_model).hash)
    # The first and the last sample of every shard: opens each, and checks it against its entry in the manifest.
    first = 0
    for shard in dataset.manifest.shards:
        for index in {first, first + shard.samples - 1} if shard.samples else ():
            dataset.sample(index)
        first += shard.samples
    epochs = recipe.schedule.steps * recipe.batch.global_size / dataset.num_samples
    yield Row(
        "shards",
        "ok",
        f"{len(dataset.manifest.shards)} shards, {dataset.num_samples:,} samples, read {epochs:.1f} times",
    )


def _machines(ranks: Ranks, device: torch.device) -> list[Row]:
    """Versions, memory and speed of every rank, gathered; versions must be equal."""
    mine = {
        "host": socket.gethostname(),
        "versions": versions(),
        "device": _device_facts(device),
        "flops": _matmul_flops(device),
    }
    everybody: list = [mine]
    if ranks.world_size > 1:
        everybody = [None] * ranks.world_size
        dist.all_gather_object(everybody, mine, group=ranks.group)
    hosts = sorted({facts["host"] for facts in everybody})
    different = [f"rank {i} on {f['host']}" for i, f in enumerate(everybody) if f["versions"] != mine["versions"]]
    listed = ", ".join(f"{name} {version}" for name, version in mine["versions"].items())
    rows = [
        Row("versions", "bad", f"rank {ranks.rank} has {listed}; others differ: {', '.join(different)}")
        if different
        else Row("versions", "ok", f"equal on {len(hosts)} host(s): {listed}")
    ]
    speeds = [facts["flops"] for facts in everybody]
    slowest = min(range(len(speeds)), key=speeds.__getitem__)
    speed = (
        f"matmul {min(speeds) / 1e12:.2f} to {max(speeds) / 1e12:.2f} TFLOP/s; "
        f"slowest: rank {slowest} on {everybody[slowest]['host']}"
    )
    if device.type == "cuda":
        kinds = sorted({facts["device"] for facts in everybody})
        rows.append(Row("GPUs", "ok" if len(kinds) == 1 else "bad", f"{len(everybody)} x {'; '.join(kinds)}"))
        rows.append(Row("GPU speed", "ok", f"bf16 {speed}"))
    else:
        rows.append(Row("CPU", "ok", f"{mine['device']}; fp32 {speed}"))
        rows += [Row(name, "absent", "no CUDA device on this machine") for name in ("GPUs", "GPU speed")]
    return rows


def _device_facts(device: torch.device) -> str:
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{os.cpu_count()} cores, {memory / 2**30:.0f} GiB, {torch.get_num_threads()} thread(s) per process"


def _matmul_flops(device: torch.device) -> float:
    """Best of a few large products, in operations per second."""
    size = _MATMUL_SIZE[device.type]
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _collectives(ranks: Ranks, device: torch.device) -> list[Row]:
    if ranks.world_size == 1:
        return [Row("all-reduce", "absent", "one process; start under torchrun or srun to measure it")]
    data = torch.ones(_PROBE_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(3):
        ranks.barrier()
        started = time.perf_counter()
        data.fill_(1.0)
        dist.all_reduce(data)
        right = float(data[-1]) == ranks.world_size
        best = min(best, time.perf_counter() - started)
    # A ring sends 2 (n - 1) / n of the data through every rank.
    bandwidth = 2 * (ranks.world_size - 1) / ranks.world_size * _PROBE_BYTES / best
    word = f"{dist.get_backend()} over {ranks.world_size} ranks: {bandwidth / 1e9:.2f} GB/s per rank"
    return [Row("all-reduce", "ok" if right else "bad", word if right else f"{word}; the sum was wrong")]
