"""`vilg preflight RECIPE`: what would stop or slow a long run, found in seconds before it starts.

Runs alone or on all ranks under torchrun or srun; rank 0 prints one table. Exit code 0 if nothing is bad, 1 otherwise.
A node that is slower than its peers is named (peers.py); with --exclude-bad it counts as bad.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from vilg.config import Recipe, load_recipe, take_overrides
from vilg.data.loader import Blend, open_data
from vilg.data.manifest import write_json
from vilg.errors import UserError
from vilg.model.size import num_parameters, state_bytes
from vilg.parallel.ranks import Ranks, SharedError
from vilg.tokens.files import write_atomically
from vilg.tokens.text import TextTokenizer
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tools.machines import Report, Row, check_machines
from vilg.train.distributed import distributed
from vilg.train.open import sequence_spec
from vilg.train.rundir import check_run_dir

BAD = 1
_PROBE_BYTES = 64 * 2**20


def main(argv: Sequence[str]) -> int:
    """The command `vilg preflight`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    overrides, rest = take_overrides(argv)
    options = _parser().parse_args(rest)
    with distributed(device) as ranks:
        try:
            report = examine(options.recipe, overrides, ranks, device, accept=options.accept)
            if ranks.is_main:
                _print(report, options)
        except SharedError:
            if ranks.is_main:
                raise
            raise SystemExit(2) from None
    statuses = {"bad", "slow"} if options.exclude_bad else {"bad"}
    return BAD if any(row.status in statuses for row in report.rows) else 0


def examine(
    path: Path, overrides: Sequence[str], ranks: Ranks, device: torch.device, *, accept: str = ""
) -> Report:
    """Check everything; the same report on every rank. Raises SharedError if the recipe itself cannot be read."""
    accepted = tuple(filter(None, accept.split(",")))
    recipe = ranks.on_main(lambda: load_recipe(path, overrides, world_size=ranks.world_size))
    report = Report([Row("recipe", "ok", f"{path}: {recipe.name}, {ranks.world_size} process(es)")])
    for name, check in (
        ("run folder", lambda: _run_folder(recipe, accepted)),
        ("disk", lambda: _disk(recipe)),
        ("tokenizers", lambda: _tokenizers(recipe)),
        ("shards", lambda: _shards(recipe)),
    ):
        report.rows += ranks.on_main(lambda name=name, check=check: _guarded(name, check))
    check_machines(report, ranks, device)
    return report


def _print(report: Report, options: argparse.Namespace) -> None:
    width = max(len(row.check) for row in report.rows)
    for row in report.rows:  # line by line: srun would break a long text anywhere
        print(f"{row.status:<6}  {row.check:<{width}}  {row.detail}", flush=True)
    if report.bad_nodes:
        print(f"nodes to run without: {', '.join(report.bad_nodes)}")
    if options.json:
        write_json(options.json, asdict(report))
    if options.bad_nodes and report.bad_nodes:
        write_atomically(options.bad_nodes, "".join(f"{node}\n" for node in report.bad_nodes).encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilg preflight",
        description="Check recipe, machines and data before a long run. Alone, or on all ranks under torchrun or srun.",
        epilog="exit code 0: nothing is bad; 1: something is; 2: the recipe itself is wrong",
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and every rank's figures there too")
    parser.add_argument("--bad-nodes", type=Path, metavar="FILE", help="write the bad and slow nodes there, if any")
    parser.add_argument("--exclude-bad", action="store_true", help="a slow node counts as bad in the exit code too")
    parser.add_argument("--accept", default="", metavar="KEY,KEY", help="as for vilg train")
    return parser


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
    data = open_data(recipe.data)
    data.check(sequence_spec(recipe), image_tokenizer_hash=ImageTokenizer.load(recipe.tokens.image_model).hash)
    parts, counts = (data.parts, data.counts) if isinstance(data, Blend) else ((data,), (1,))
    for dataset, count in zip(parts, counts):
        # The first and the last sample of every shard: opens each, and checks it against its entry in the manifest.
        first = 0
        for shard in dataset.manifest.shards:
            for index in {first, first + shard.samples - 1} if shard.samples else ():
                dataset.sample(index)
            first += shard.samples
        epochs = recipe.schedule.steps * recipe.batch.global_size * count / sum(counts) / dataset.num_samples
        where = f"{dataset.folder}: " if len(parts) > 1 else ""
        yield Row(
            "shards",
            "ok",
            f"{where}{len(dataset.manifest.shards)} shards, {dataset.num_samples:,} samples, read {epochs:.1f} times",
        )
