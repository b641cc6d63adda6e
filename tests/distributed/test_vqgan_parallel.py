"""An image tokenizer trained by two processes: one network, one codebook."""

import json

import torch

from tests.distributed.helpers import run_distributed
from tests.vqgan_support import pictures, small_recipe, write_shards
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.loop import Place, train
from vilg.tokens.vqgan.source import ImageData
from vilg.tokens.vqgan.train import joined, run

RECIPE = small_recipe(steps=30, lr=1e-2)


def train_on_rank(rank, world_size, shards, out):
    data = ImageData.read(shards, RECIPE)
    tokenizer = train(RECIPE, data, out, Place(rank, world_size, torch.device("cpu")))
    return tokenizer.hash


def run_as_command(rank, world_size, shards, out):
    with joined("cpu") as place:
        return run(RECIPE, shards, out, place)


def test_two_processes_end_with_the_same_tokenizer_which_the_leading_one_writes(tmp_path):
    shards, out = write_shards(tmp_path / "raw", pictures(200)), tmp_path / "out"
    hashes = run_distributed(2, train_on_rank, (shards, tmp_path / "library"))
    assert hashes[0] == hashes[1]
    metrics, nothing = run_distributed(2, run_as_command, (shards, out), init=False)
    assert nothing == {} and metrics["processes"] == 2
    assert ImageTokenizer.load(out).hash == metrics["hash"] == hashes[0]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["psnr_db"] > lines[0]["psnr_db"] + 1
    assert lines[-1]["codes_used"] > 20
