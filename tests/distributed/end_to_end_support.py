"""Pictures as token shards with their images, and a short end-to-end recipe, for the tests of whole runs."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.distributed.helpers import run_distributed
from tests.distributed.resume_support import Job, Layout, Overrides, train_jobs
from tests.golden.make import make_data
from vilg.data.tokenize import main as tokenize
from vilg.data.writer import ShardWriter

TORCH, SECTION = Layout(engine="torch"), "model.reconstructor."
RECIPE = {
    "schedule.steps": 6, "schedule.warmup_steps": 2, "checkpoint.every_steps": 3, "checkpoint.keep_last": 9,
    "logging.tensorboard": "false", "evaluation.every_steps": 3, "evaluation.pairs": 9, "model.num_layers": 2, "model.hidden_size": 32, "data.text_to_image_fraction": 0.7,
    f"{SECTION}ramp_steps": 4, f"{SECTION}lr": 1e-3, f"{SECTION}ema": 0.5, f"{SECTION}adversarial.weight": 0.5,
    f"{SECTION}adversarial.start_step": 2, f"{SECTION}adversarial.r1_every": 2, f"{SECTION}adversarial.width": 8,
    f"{SECTION}adversarial.layers": 2,
}  # fmt: skip


def make_pictures(folder: Path, image_model: Path | None = None) -> Overrides:
    """The golden data's tokenizers (or that image tokenizer), token shards of random pictures with their images, and
    held-out ones."""
    folder.mkdir()
    made, draw = make_data(folder), np.random.default_rng(0)
    image_model = image_model or folder / "image"
    for name, count in (("pictures", 48), ("held_out_pictures", 9)):
        raw = folder / f"raw_{name}"
        with ShardWriter(raw / "00000.tar") as shard:
            for number in range(count):
                content = io.BytesIO()
                pixels = np.repeat(np.repeat(draw.integers(0, 256, (4, 4, 3), np.uint8), 8, 0), 8, 1)
                Image.fromarray(pixels).save(content, "PNG")
                shard.write(f"{number:06d}", {"png": content.getvalue(), "txt": b"a red horse", "json": b"{}"})
        arguments = ["--image-model", str(image_model), "--out", str(folder / name), "--store-images"]
        assert tokenize([str(raw), *arguments, "--processes", "1"]) == 0
    named = {"data.train": str(folder / "pictures"), "evaluation.data": str(folder / "held_out_pictures")}
    return {**made, "tokens.image_model": str(image_model), **named, **RECIPE}


def start(layout: Layout, common: Overrides, run: Path, **how) -> list[str | None]:
    """Errors of one start of a run, one per rank. how: of `Job`."""
    job = Job({**common, **layout.overrides(), "run_dir": run}, **how)
    return [errors[0] for errors in run_distributed(layout.processes, train_jobs, ([job],), init=False)]
