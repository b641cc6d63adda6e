"""Claim: what end-to-end training costs in the 300m recipe: step time and memory against two stages. For one GPU.

    python benchmarks/end_to_end_step.py --json benchmarks/results/end_to_end_step.json     # 200 steps each, bf16
    python benchmarks/end_to_end_step.py --tiny --device cpu --json /tmp/tried.json         # tries the script; says nothing

Three contenders, each in a process of its own, on launch/recipes/300m.yaml as `vilg train` builds it (ZeRO 1, bf16, one
micro-batch a step), with random tokens and random 256-pixel images:

- `two-stage`: the recipe as it is;
- `end-to-end`: with model.reconstructor (pixel and edge losses, balance, moving average), VQGAN's decoder in fp32;
- `adversarial`: and with the discriminator learning in every step.

Prints and writes median step and 20/80 % quantiles over the steps after the warm-up, peak memory, parameters beside the
transformer, the losses of the first and last steps, and ratios to two-stage.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # recipes name ds_configs/ relative to it

import numpy as np  # noqa: E402
import torch  # noqa: E402

from vilg.checkpoint.state import source_commit, versions  # noqa: E402
from vilg.config import Recipe, load_recipe  # noqa: E402
from vilg.parallel.grid import Grid  # noqa: E402
from vilg.tokens.sequence import SequenceBatch, collate, image_to_text, text_to_image  # noqa: E402
from vilg.tokens.vqgan import ImageTokenizer, ImageTokenizerConfig  # noqa: E402
from vilg.tokens.vqgan.config import TamingConfig  # noqa: E402
from vilg.train.distributed import distributed  # noqa: E402
from vilg.train.engine import build_engine, build_model  # noqa: E402
from vilg.train.metrics import peak_memory  # noqa: E402
from vilg.train.open import sequence_spec  # noqa: E402
from vilg.train.reconstruction import build_reconstruction  # noqa: E402
from vilg.train.step import count, plan_step  # noqa: E402

END_TO_END = "model.reconstructor."
CONTENDERS = {
    "two-stage": [],
    "end-to-end": [f"{END_TO_END}ramp_steps=100"],
    "adversarial": [f"{END_TO_END}ramp_steps=100", f"{END_TO_END}adversarial.weight=0.5", f"{END_TO_END}adversarial.start_step=1",
                    f"{END_TO_END}adversarial.ramp_steps=100"],
}  # fmt: skip
WARM_UP = 10
TINY = ["model.num_layers=2", "model.hidden_size=64", "model.num_heads=2", "tokens.grid=[8,8]", "tokens.text_slots=16",
        "tokens.text_vocab_size=512", "tokens.image_vocab_size=512"]  # fmt: skip


def recipe_of(args: argparse.Namespace) -> Recipe:
    cut = [f"batch.micro_size={args.micro}", f"batch.global_size={args.micro}", "schedule.warmup_steps=50"]
    return load_recipe("launch/recipes/300m.yaml", [*cut, *CONTENDERS[args.contender], *(TINY if args.tiny else [])], world_size=1)


def tokenizer_of(recipe: Recipe, factor: int, *, tiny: bool) -> ImageTokenizer:
    """Untrained: time and memory are those of its shape, which is VQGAN's with taming's defaults for f = 8."""
    torch.manual_seed(0)
    rows, codes = recipe.tokens.grid[0], recipe.tokens.image_vocab_size
    shape = dict(image_size=rows * factor, factor=factor, num_codes=codes)
    if not tiny:
        shape |= dict(architecture="taming", code_dim=256, taming=TamingConfig())
    tokenizer = ImageTokenizer(ImageTokenizerConfig(**shape))
    with torch.no_grad():
        tokenizer.codebook.vectors.normal_()
    return tokenizer


def batch_of(recipe: Recipe, side: int, seed: int) -> SequenceBatch:
    """`micro` pairs in both directions, captions of 20 tokens or as many as fit, images of noise in large squares."""
    spec, draw = sequence_spec(recipe), np.random.default_rng(seed)
    sequences = []
    for _ in range(recipe.batch.micro_size):
        text = draw.integers(4, spec.text_vocab_size, min(20, spec.text_slots - 1)).tolist()
        codes = draw.integers(0, spec.image_vocab_size, spec.image_slots)
        image = draw.integers(0, 256, (side // 8, side // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        sequences += [text_to_image(spec, text, codes, image), image_to_text(spec, text, codes)]
    return collate(sequences)


def measure(args: argparse.Namespace) -> dict:
    """One contender, in this process."""
    device, recipe = torch.device(args.device), recipe_of(args)
    with distributed(device):
        grid, spec = Grid.build(), sequence_spec(recipe)
        model = build_model(recipe, spec, grid, device)
        model.reset_parameters(0)
        tokenizer = tokenizer_of(recipe, args.factor, tiny=args.tiny)
        reconstruction = build_reconstruction(recipe, grid, model, tokenizer, device, fresh=True)
        engine = build_engine(recipe, grid, model, device, reconstruction)
        batches = [batch_of(recipe, tokenizer.image_size, seed) for seed in range(4)]
        text_targets, image_targets, _ = count(batches[:1])
        seconds, losses, skipped = [], [], 0
        for number in range(1, WARM_UP + args.steps + 1):
            plan = plan_step(recipe, number, text_targets=text_targets, image_targets=image_targets)
            started = time.perf_counter()
            result = engine.train_step([batches[number % 4]], plan)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number > WARM_UP:
                seconds.append(time.perf_counter() - started)
            skipped += result.skipped
            losses.append([float(result.image_loss), float(result.text_loss), float(result.reconstruction_loss)])
        beside = [reconstruction.trained, reconstruction.judge.trained] if reconstruction else []
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameters_beside": sum(w.numel() for player in beside if player for w in player.weights),
            "median_ms": 1e3 * statistics.median(seconds),
            "q20_q80_ms": [1e3 * float(q) for q in np.quantile(seconds, (0.2, 0.8))],
            "peak_memory_gib": peak_memory(device) / 2**30,
            "steps_skipped": skipped,
            "losses_first_10": np.round(np.mean(losses[:10], 0), 4).tolist(),
            "losses_last_10": np.round(np.mean(losses[-10:], 0), 4).tolist(),
            "figures_last": {key: round(float(value), 5) for key, value in result.figures.items()},
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro", type=int, default=4, help="pairs of a step, two sequences each, one decoded image each")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--factor", type=int, default=8, help="pixels per code along a side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the script")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--contender", choices=CONTENDERS, help="run one in this process and print it as JSON")
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args)))
        return 0
    on_gpu = args.device.startswith("cuda")
    result = {
        "hardware": torch.cuda.get_device_name() if on_gpu else platform.machine(), "versions": versions(), "commit": source_commit(),
        "recipe": "launch/recipes/300m.yaml", "tiny": args.tiny, "pairs": args.micro, "steps": args.steps, "factor": args.factor,
        "losses": "image, text (nats per token), pixels", "contenders": {},
    }  # fmt: skip
    for contender in CONTENDERS:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], f"--contender={contender}"], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            print(f"{contender}: ended with exit code {done.returncode}; its message is above", file=sys.stderr)
            return 1
        found = result["contenders"][contender] = json.loads(done.stdout.splitlines()[-1])
        ratio = found["median_ms"] / result["contenders"]["two-stage"]["median_ms"]
        result[f"{contender}_over_two_stage_time"] = round(ratio, 3)
        print(f"{contender:11} {found['median_ms']:9.1f} ms ({ratio:.2f} x)  {found['peak_memory_gib']:6.2f} GiB  "
              f"{found['parameters_beside'] / 1e6:.1f}M parameters beside, {found['steps_skipped']} steps skipped", flush=True)  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
