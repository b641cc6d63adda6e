"""`vilg data tokenize`: raw shards -> token shards and their manifest.

Each raw shard becomes one token shard of the same name (`vilg.data.encode`). Jobs may share the work (`--part 2/8`:
every eighth shard from the second; ranks under torchrun or srun, and a machine's own processes, divide a part further);
whichever finds all shards finished writes the manifest.

A job may be killed at any moment: a shard gets its name when it is whole, `records/NAME.json` follows, and whoever
starts the same command again, in any division, continues behind the last record. `job.json` refuses to mix two
tokenizers or recipes in a folder.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from vilg.data.children import cores
from vilg.data.encode import LEAST_CROP, Count, ImageEncoder, Recipe, encode_shards
from vilg.data.manifest import FILE_NAME, Manifest
from vilg.data.progress import Progress
from vilg.data.records import FORMAT_VERSION, Record, claim, finished, record_path
from vilg.data.shards import RAW_FIELDS, index_shard
from vilg.data.tokenize_processes import Work, in_processes
from vilg.errors import UserError
from vilg.tokens.raw import raw_shards

_FEW = 20  # bad samples that never stop a job, however small it is
_WORTH_A_PROCESS = 32 << 20  # bytes of raw shards; a process starts in seconds


def tokenize(
    raw: Path,
    out: Path,
    image_tokenizer: ImageEncoder,
    *,
    recipe: Recipe | None = None,
    device: torch.device | str = "cpu",
    threads: int = 1,
    max_bad_fraction: float = 0.01,
    progress: bool = True,
    count: Callable[[int], Count] | None = None,
    part: tuple[int, int] = (1, 1),
) -> Manifest | None:
    """Encode the raw shards in `raw` into token shards in `out`, in this process; returns the manifest written last, or
    None while shards of other parts are missing.

    recipe: default: the size the tokenizer was trained on, 64 images a batch, the middle of each. threads: that decode
    while a batch is encoded. max_bad_fraction: share of unreadable samples above which the job stops (the first few
    are always let pass). count: makes of the number of images who counts them; default: a bar if `progress`. part:
    (i, n), of n jobs on the same folder this is the i-th.
    Raises UserError: no shards, a damaged raw shard, an unfit size, `out` holding another job's shards, too many bad.
    """
    recipe = recipe if recipe is not None else Recipe(image_tokenizer.image_size, 64)
    shards = _begin(raw, out, image_tokenizer, recipe)
    mine = shards[part[0] - 1 :: part[1]]
    records = [record for shard in mine if (record := finished(out, shard)) is not None]
    known = {record.entry.name for record in records}
    left = [(shard, index_shard(shard, RAW_FIELDS, sha256="")) for shard in mine if shard.name not in known]
    done = sum(record.entry.samples + recipe.views * len(record.rejected) for record in records)
    begin = count if count is not None else partial(Progress, "tokenize", enabled=progress)
    bar = begin(done + recipe.views * sum(len(index) for _, index in left))
    bar.skip(done)
    check_bad(records, max_bad_fraction, recipe)
    for record in encode_shards(left, out, image_tokenizer, recipe, device=device, threads=threads, count=bar):
        records.append(record)
        check_bad(records, max_bad_fraction, recipe)
    bar.close()
    return complete(raw, out, image_tokenizer, recipe, max_bad_fraction)


def _begin(raw: Path, out: Path, image_tokenizer: ImageEncoder, recipe: Recipe) -> list[Path]:
    """Check that recipe, tokenizer and `out` fit each other, write job.json; the raw shards."""
    if recipe.image_size % image_tokenizer.factor:
        raise UserError(
            f"--image-size {recipe.image_size} is not a multiple of the image tokenizer's factor "
            f"{image_tokenizer.factor}; use "
            f"{max(1, recipe.image_size // image_tokenizer.factor) * image_tokenizer.factor}"
        )
    if image_tokenizer.vocab_size > 1 << 16:
        raise UserError(f"the image tokenizer has {image_tokenizer.vocab_size} codes; token shards hold 65536 at most")
    shards = raw_shards(Path(raw))
    job = {
        "format_version": FORMAT_VERSION,
        "image_tokenizer": image_tokenizer.hash,
        "image_vocab_size": image_tokenizer.vocab_size,
        **recipe.job(),
    }
    claim(out, job, [shard.name for shard in shards])
    return shards


def complete(
    raw: Path, out: Path, image_tokenizer: ImageEncoder, recipe: Recipe, max_bad_fraction: float
) -> Manifest | None:
    """Write the manifest if all shards are finished, else None."""
    shards = raw_shards(Path(raw))
    # Looking is cheap; only who may be the last one reads from the other parts' raw shards to be sure.
    if not all(record_path(out, shard.name).exists() for shard in shards):
        return None
    records = [record for shard in shards if (record := finished(out, shard)) is not None]
    if len(records) < len(shards):
        return None
    check_bad(records, max_bad_fraction, recipe)
    side = recipe.image_size // image_tokenizer.factor
    entries = tuple(record.entry for record in records)
    size = recipe.image_size if recipe.images else None
    manifest = Manifest(image_tokenizer.hash, (side, side), image_tokenizer.vocab_size, entries, size)
    if manifest.num_samples == 0:
        raise UserError(f"{raw}: not one usable sample in {len(shards)} shards")
    manifest.save(out)
    return manifest


def check_bad(records: Sequence[Record], max_bad_fraction: float, recipe: Recipe) -> None:
    """Raise UserError if too many of the samples seen so far cannot be used."""
    rejected = [item for record in records for item in record.rejected]
    seen = len(rejected) + sum(record.entry.samples for record in records) // recipe.views
    if len(rejected) > max(_FEW, max_bad_fraction * seen):
        examples = "; ".join(f"{r.shard} key {r.key!r}: {r.detail}" for r in rejected[-3:])
        raise UserError(
            f"{len(rejected)} of the first {seen} samples cannot be used, more than --max-bad-fraction "
            f"{max_bad_fraction} allows. The last ones: {examples}. Filter the data with `vilg data ingest`, or raise "
            "it; finished shards are kept"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """`vilg data tokenize`."""
    options = _parser().parse_args(argv)
    if (options.processes is not None and options.processes < 1) or (options.threads or 0) < 0:
        raise UserError("--processes must be at least 1, --threads 0 or more")
    from vilg.tokens.vqgan import ImageTokenizer

    rank, ranks, local_rank = place(os.environ)
    part = _divided(_part(options.part), rank, ranks)
    image_tokenizer = ImageTokenizer.load(options.image_model)
    size = options.image_size if options.image_size is not None else image_tokenizer.image_size
    recipe = Recipe(size, options.batch_size, options.views, options.least_crop, options.seed, options.store_images)
    mine = _begin(options.raw, options.out, image_tokenizer, recipe)[part[0] - 1 :: part[1]]
    devices = _devices(options.device, options.processes, local_rank if ranks > 1 else None, mine)
    threads = options.threads if options.threads is not None else max(1, cores() // len(devices))
    work = Work(options.raw, options.out, options.image_model, recipe, options.max_bad_fraction, threads)
    if len(devices) == 1:
        torch.set_num_threads(1)  # what a CPU's sums come to may depend on their number
        manifest = tokenize(
            work.raw, work.out, image_tokenizer.to(devices[0]), recipe=recipe, device=devices[0], threads=threads,
            max_bad_fraction=work.max_bad_fraction, part=part,
        )  # fmt: skip
    else:
        in_processes(work, devices, [_divided(part, number, len(devices)) for number in range(len(devices))])
        manifest = complete(work.raw, work.out, image_tokenizer, recipe, work.max_bad_fraction)
    if manifest is None:
        print(f"part {part[0]}/{part[1]} is finished; the manifest follows with the last part")
        return 0
    _summary(options.out, manifest)
    return 0


def _summary(out: Path, manifest: Manifest) -> None:
    rejected = [asdict(item) for e in manifest.shards for item in Record.load(record_path(out, e.name)).rejected]
    summary = {
        "samples": manifest.num_samples,
        "shards": len(manifest.shards),
        "grid": list(manifest.grid),
        "image_vocab_size": manifest.image_vocab_size,
        "bad_samples": len(rejected),
        "manifest": str(out / FILE_NAME),
    }
    print(json.dumps(summary, ensure_ascii=False))
    for item in rejected[:_FEW]:
        print(f"left out: {item['shard']} key {item['key']!r}: {item['detail']}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilg data tokenize",
        description="Encode raw image-text shards into token shards. Started again, it continues where it was stopped.",
    )
    add = parser.add_argument
    add("raw", type=Path, help="folder of raw shards (key.jpg|png|webp, .txt, .json), or one .tar")
    add("--image-model", type=Path, required=True, help="folder of the image tokenizer")
    add("--out", type=Path, required=True, help="folder for token shards and manifest.json")
    add("--image-size", type=int, help="side in pixels (default: that of the image tokenizer)")
    add("--batch-size", type=int, default=64, help="images per encoder call")
    add("--views", type=int, default=1, help="samples made of each image, each another random crop")
    add("--least-crop", type=float, help=f"random squares, at least this share ({LEAST_CROP} to 1) of the shorter side")
    add("--seed", type=int, default=0, help="of the random crops")
    add("--store-images", action="store_true", help="keep the resized image beside its codes, for end-to-end training")
    add("--device", help="cpu, cuda, cuda:1 ... (default: all GPUs, a process each; without any the CPU)")
    add("--processes", type=int, help="on this machine (default: one a GPU, or one a core if there is enough work)")
    add("--threads", type=int, help="of each process that decode while it encodes (default: cores / processes)")
    add("--max-bad-fraction", type=float, default=0.01, help="share of bad samples that stops the job")
    add("--part", default="1/1", metavar="I/N", help="this is the I-th of N jobs that share the work, as in 2/8")
    return parser


def place(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this machine) of torchrun, or of srun; (0, 1, 0) without either."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(environment.get(name, "").isdigit() for name in names):
            rank, ranks, local_rank = (int(environment[name]) for name in names)
            return rank, ranks, local_rank
    return 0, 1, 0


def _devices(wanted: str | None, processes: int | None, local_rank: int | None, shards: Sequence[Path]) -> list[str]:
    """The device of each process of this machine. local_rank: there is a process a rank already."""
    present = torch.cuda.device_count()
    kind, _, number = (wanted or "cpu").partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdigit():
        raise UserError(f"--device {wanted} is none that tokenizes; use cpu, cuda or a GPU's number like cuda:1")
    if kind == "cuda" and int(number or 0) >= present:
        raise UserError(f"--device {wanted} is not there: {present} GPUs are seen; use cpu, or look at `vilg env`")
    gpus = present if wanted in (None, "cuda") else 0
    devices = [f"cuda:{number}" for number in range(gpus)] or [wanted or "cpu"]
    if local_rank is not None:
        devices = [devices[local_rank % len(devices)]]
    if processes is None:
        processes = len(devices)
        if devices == ["cpu"] and local_rank is None:
            processes = min(cores(), 1 + sum(shard.stat().st_size for shard in shards) // _WORTH_A_PROCESS)
    return [devices[number % len(devices)] for number in range(max(1, min(processes, len(shards))))]


def _divided(part: tuple[int, int], number: int, count: int) -> tuple[int, int]:
    """The share of the `number`-th (from 0) of `count` processes in a part."""
    return part[0] + number * part[1], part[1] * count


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise UserError(f"--part {text} is no part; write the number of this job and of all, from 1/8 to 8/8")
    return int(number), int(count)
