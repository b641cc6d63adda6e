"""Claim: every architecture of the image tokenizer learns the demo's pictures and uses over 90% of its codes.

    python benchmarks/image_tokenizer.py                              # all of TRAININGS, one after the other
    python benchmarks/image_tokenizer.py --only taming --work DIR     # some; finished ones in DIR are not repeated

Data: `vilg demo-data` with the demo's own scenes (launch/recipes/demo/scenes.yaml), 32 x 32 pixels; figures are of 512
pictures that were held back. Every training is `vilg tokenizer train-image` with the settings below, on one core. Writes
benchmarks/results/image_tokenizer.json and, with all figures in, a sheet of reconstructions beside docs/image_tokenizer.md.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from vilg.checkpoint.state import source_commit, versions
from vilg.demo.generate_data import main as demo_data
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.config import load_tokenizer_recipe
from vilg.tokens.vqgan.images import to_float, to_uint8
from vilg.tokens.vqgan.source import ImageData
from vilg.tokens.vqgan.train import main as train_image

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "image_tokenizer.json"
SHEET = ROOT / "docs" / "image_tokenizer.png"
DEMO = ROOT / "launch" / "recipes" / "demo"
SHOWN = 12  # pictures of the sheet
_TAMING = (
    "model.architecture=taming", "model.taming.ch=16", "model.taming.groups=8", "model.taming.ch_mult=[1, 2, 2]",
    "model.taming.num_res_blocks=1", "model.taming.z_channels=32", "train.lr=2e-3", "train.steps=800", "train.ema=0.99",
)  # fmt: skip
# name: settings beside the demo's own recipe (256 codes, factor 4)
TRAININGS: dict[str, tuple[str, ...]] = {
    "patch": (),
    "taming": _TAMING,
    "taming-gan": (
        *_TAMING, "loss.perceptual=0.5", "loss.adversarial.weight=0.1", "loss.adversarial.start_step=400",
        "loss.adversarial.ramp_steps=100", "loss.adversarial.width=16", "loss.adversarial.layers=2",
    ),
    "dvae": (
        "model.architecture=dvae", "model.lookup=gumbel", "model.encoder_width=64", "model.decoder_width=64",
        "train.lr=2e-3", "quantizer.kl_weight=1e-3",
    ),
}  # fmt: skip
KEPT = ("psnr_db", "ssim", "codebook_used", "codebook_size", "perplexity", "num_images", "steps", "training_seconds", "hash")


def sheet(work: Path, names: list[str]) -> Image.Image:
    """The first held-back pictures, and below them what each tokenizer makes of them."""
    data = ImageData.read(work / "raw" / "train", load_tokenizer_recipe(DEMO / "image_tokenizer.yaml"))
    real, scale, left = data.held_back[:SHOWN], 2, 90
    side = real.shape[1] * scale
    picture = Image.new("RGB", (left + SHOWN * (side + 4), (1 + len(names)) * (side + 4)), "white")
    for row, name in enumerate(["real", *names]):
        shown = real
        if name != "real":
            tokenizer = ImageTokenizer.load(work / name)
            shown = to_uint8(tokenizer.decode(tokenizer.encode(to_float(real))))
        ImageDraw.Draw(picture).text((4, row * (side + 4) + side // 2 - 6), name, fill="black")
        for column, image in enumerate(shown):
            enlarged = Image.fromarray(np.asarray(image).repeat(scale, axis=0).repeat(scale, axis=1))
            picture.paste(enlarged, (left + column * (side + 4), row * (side + 4)))
    return picture


def measure(work: Path, names: list[str], steps: int | None) -> None:
    """Train what is not there yet, and print a line each."""
    raw = work / "raw"
    if not raw.exists():
        assert demo_data(["--config", str(DEMO / "scenes.yaml"), "--out", str(raw)]) in (None, 0)
    for name in names:
        settings = [*TRAININGS[name], *([f"train.steps={steps}"] if steps else [])]
        arguments = ["--data", str(raw / "train"), "--out", str(work / name), "--config", str(DEMO / "image_tokenizer.yaml")]
        assert train_image([*arguments, "--device", "cpu", *(a for s in settings for a in ("--set", s))]) == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--work", type=Path, help="folder for data and tokenizers; default: a temporary one")
    parser.add_argument("--steps", type=int, help="to try the script: so many steps, no result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        measure(work, options.only, options.steps)
        found = {}
        for name in TRAININGS:
            if (work / name / "metrics.json").exists():
                metrics = json.loads((work / name / "metrics.json").read_text())
                found[name] = {key: metrics[key] for key in KEPT} | {"settings": list(TRAININGS[name])}
                found[name]["codebook_use"] = metrics["codebook_used"] / metrics["codebook_size"]
        for name, figures in found.items():
            print(
                f"{name}: psnr {figures['psnr_db']:.2f} dB, ssim {figures['ssim']:.3f}, codes {figures['codebook_use']:.1%}, "
                f"perplexity {figures['perplexity']:.0f}, {figures['training_seconds']:.0f} s"
            )
        if options.steps:
            return 0
        content = {
            "format_version": 1,
            "claim": "every architecture learns the demo's pictures and uses over 90% of its 256 codes (512 held-back pictures)",
            "command": "python benchmarks/image_tokenizer.py",
            "commit": source_commit(),
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": None},
            "versions": versions(),
            "threads": 1,
            "trainings": found,
        }
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
        if set(found) == set(TRAININGS):
            sheet(work, list(found)).save(SHEET)
    return 0 if all(figures["codebook_use"] > 0.9 for figures in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
