"""`vilg tokenizer train-image`: train an image tokenizer, alone or as plain data parallel under torchrun.

A training of minutes is not resumed: interrupted, it leaves no tokenizer, and the same command starts it anew. What a
folder holds in the end: config.json, model.safetensors, recipe.yaml, metrics.jsonl, recon.png and, last, metrics.json,
by which a finished one is recognised.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ValidationError

from vilg.config.environment import process_environment
from vilg.errors import UserError
from vilg.tokens.files import write_atomically
from vilg.tokens.vqgan.config import ImageTokenizerRecipe, dump_tokenizer_recipe, load_tokenizer_recipe
from vilg.tokens.vqgan.evaluate import draw_sheet, evaluate
from vilg.tokens.vqgan.folder import read_description
from vilg.tokens.vqgan.loop import Place, train
from vilg.tokens.vqgan.source import ImageData, data_fingerprint

METRICS_VERSION = 1


def is_finished(out: Path, recipe: ImageTokenizerRecipe, fingerprint: str) -> bool:
    """Whether `out` already holds what this recipe makes of this data.

    Raises UserError if it holds a tokenizer of another recipe or of other data.
    """
    try:
        metrics = json.loads((out / "metrics.json").read_text())
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise UserError(f"{out / 'metrics.json'}: not JSON: {error}; remove it, or choose another --out") from error
    try:  # through the model, so that a key that has come since counts as its default
        same_recipe = ImageTokenizerRecipe.model_validate(metrics.get("recipe")) == recipe
    except ValidationError:
        same_recipe = False
    if same_recipe and metrics.get("data") == fingerprint:
        return True
    what = "other data" if same_recipe else "another recipe"
    raise UserError(
        f"{out}: holds a finished tokenizer of {what}; choose another --out, or replace it with --overwrite"
    )


def run(recipe: ImageTokenizerRecipe, folder: Path, out: Path, place: Place, *, workers: int = 0) -> dict[str, object]:
    """Train on a folder of raw shards, write everything into `out`, return the content of metrics.json."""
    started = time.monotonic()
    fingerprint = data_fingerprint(folder)
    data = ImageData.read(folder, recipe)
    if place.leads:
        for stale in ("metrics.json", "config.json", "model.safetensors"):
            (out / stale).unlink(missing_ok=True)
        write_atomically(out / "recipe.yaml", dump_tokenizer_recipe(recipe).encode())
        where = (
            f"{len(data.images)} images in memory"
            if data.images is not None
            else f"{len(data.shards)} shards, streamed"
        )
        print(
            f"training on {where}, {len(data.held_back)} held back, {data.bad.bad} unreadable; "
            f"{place.world_size} x {place.device.type}, {torch.get_num_threads()} thread(s) each",
            flush=True,
        )
    training_started = time.monotonic()
    tokenizer = train(recipe, data, out, place, workers=workers)
    seconds = time.monotonic() - training_started
    if not place.leads:
        return {}
    tokenizer.save(out)
    draw_sheet(tokenizer, data.held_back, out / "recon.png", place.device)
    metrics = {
        "format_version": METRICS_VERSION,
        **evaluate(tokenizer, data.held_back, place.device),
        "steps": recipe.train.steps,
        "training_seconds": round(seconds, 2),
        "images_per_second": round(recipe.train.steps * recipe.train.batch_size / seconds, 1),
        "seconds": round(time.monotonic() - started, 2),
        "processes": place.world_size,
        "device": place.device.type,
        "torch": torch.__version__,
        "hash": tokenizer.hash,
        "data": fingerprint,
        "recipe": recipe.model_dump(mode="json"),
    }
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=2).encode() + b"\n")
    return metrics


@contextlib.contextmanager
def joined(device_name: str | None) -> Iterator[Place]:
    """This process's place: alone, or one of those that torchrun started (gloo on CPUs, nccl on GPUs).

    device_name: "cpu", "cuda", or None for a GPU if there is one. Raises UserError for a GPU that is not there.
    """
    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    place = process_environment(os.environ, slurm=False)
    local_rank, world_size = int(place["LOCAL_RANK"]), int(place["WORLD_SIZE"])
    if name == "cuda" and torch.cuda.device_count() <= local_rank:
        raise UserError(
            f"--device cuda: process {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} "
            "visible); start fewer processes or use --device cpu"
        )
    device = torch.device("cuda", local_rank) if name == "cuda" else torch.device("cpu")
    if name == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Place(0, 1, device)
        return
    dist.init_process_group("nccl" if name == "cuda" else "gloo")
    try:
        yield Place(dist.get_rank(), world_size, device)
        dist.barrier()  # nobody leaves while the leading rank still evaluates
    finally:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """`vilg tokenizer train-image`."""
    parser = argparse.ArgumentParser(
        prog="vilg tokenizer train-image",
        description="Train an image tokenizer on a folder of raw shards. For several processes: torchrun "
        "--nproc-per-node N -m vilg tokenizer train-image ... Interrupted, it starts anew with the same command.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of .tar shards as img2dataset writes them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer, its figures and sheets")
    parser.add_argument("--config", type=Path, help="YAML recipe; every key has a default")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace one key, as --set train.steps=500; repeatable",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads of each process; with more than one, set OMP_WAIT_POLICY=PASSIVE"
        " or a busy machine slows it tenfold",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="reader processes of each process, when data is streamed"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished tokenizer in --out")
    options = parser.parse_args(argv)
    recipe = load_tokenizer_recipe(options.config, options.set)
    place = process_environment(os.environ, slurm=False)
    leads, world_size = place["RANK"] == "0", int(place["WORLD_SIZE"])
    if recipe.train.batch_size % world_size:
        raise UserError(f"train.batch_size={recipe.train.batch_size} is not a multiple of the {world_size} processes")
    if (options.out / "config.json").exists():
        read_description(options.out)  # refuses to write over a folder of another kind, --overwrite or not
    if not options.overwrite and is_finished(options.out, recipe, data_fingerprint(options.data)):
        if leads:
            print(f"{options.out}: finished before with this recipe and data; nothing to do")
        return 0
    torch.set_num_threads(options.threads)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING if leads else logging.ERROR)
    try:
        with joined(options.device) as place:
            metrics = run(recipe, options.data, options.out, place, workers=options.workers)
    except KeyboardInterrupt:
        if leads:
            print("interrupted: no tokenizer was written; the same command starts the training anew", file=sys.stderr)
        return 130
    if leads:
        print(
            f"{options.out}: held-back images: psnr {metrics['psnr_db']:.2f} dB, ssim {metrics['ssim']:.3f}, codes used "
            f"{metrics['codebook_used']} of {metrics['codebook_size']}, "
            f"perplexity {metrics['perplexity']:.0f}; {metrics['seconds']:.0f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
