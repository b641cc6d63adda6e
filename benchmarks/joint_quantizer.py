"""What becomes of end-to-end training when the image tokenizer learns in it, in small, on a CPU:

    python benchmarks/joint_quantizer.py --demo runs/demo                  # everything, one after another
    python benchmarks/joint_quantizer.py --demo runs/demo --only 1         # seed 1 alone, as a job of its own
    python benchmarks/joint_quantizer.py --demo runs/demo --gradients      # the tokenizer alone, by two gradients (a minute)
    python benchmarks/joint_quantizer.py --demo runs/demo --collect        # tables and result file from what is finished

Data, model, settings and measure are those of end_to_end.py (its end-to-end training is `frozen` here); every contender has the same
data order and initial weights within a seed. `slow` has the rates that the recipe has by default, relative to the
reconstructor's; `fast` the reconstructor's own rate and the code vectors' pace of a tokenizer's own training.

The second table is why the gradient passes the codes by rotation (vilg/train/joint_quantizer.py): the tokenizer of these runs learns on
by its objective alone, without a transformer, and the held-back images show what becomes of it.
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.end_to_end import SETTINGS, SHARDS, STEPS, feature_net, gaussian, read_labelled  # noqa: E402
from benchmarks.end_to_end_setup import END_TO_END, RECIPE, prepare, side_by_side, train, vilg  # noqa: E402
from vilg.checkpoint.state import source_commit, versions  # noqa: E402
from vilg.config import load_recipe  # noqa: E402
from vilg.evaluate.frechet import frechet_distance  # noqa: E402
from vilg.inference.decode import decode_pictures  # noqa: E402
from vilg.inference.generate import generate_codes  # noqa: E402
from vilg.inference.load import load_model  # noqa: E402
from vilg.inference.sampling import SamplingConfig  # noqa: E402
from vilg.parallel.grid import Grid  # noqa: E402
from vilg.tokens.sequence import answer, collate  # noqa: E402
from vilg.tokens.vqgan import ImageTokenizer  # noqa: E402
from vilg.tokens.vqgan.images import to_float  # noqa: E402
from vilg.tokens.vqgan.losses import code_use  # noqa: E402
from vilg.train.joint_quantizer import JointQuantizer  # noqa: E402
from vilg.train.open import sequence_spec  # noqa: E402
from vilg.train.step import StepPlan  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "joint_quantizer.json"
SEEDS, JOINT = (0, 1, 2), f"{END_TO_END}joint_quantizer."
SLOW = {f"{JOINT}lr": 0.05 * SETTINGS[f"{END_TO_END}lr"], f"{JOINT}decay": 0.99}
FAST = {f"{JOINT}lr": SETTINGS[f"{END_TO_END}lr"], f"{JOINT}decay": 0.95}
CONTENDERS = {"frozen": {}, "slow": SLOW, "fast": FAST}


def one_seed(work: Path, seed: int, steps: int) -> None:
    data, held_back = read_labelled(work / "raw"), read_labelled(work / "held_back")
    net, facts = feature_net(data, held_back)
    real, found = gaussian(net, held_back.images), {}
    for name, settings in CONTENDERS.items():
        run = work / f"{name}-{seed}"
        own = {"seed": seed, "schedule.steps": steps, "checkpoint.every_steps": steps}
        train(work, run, SETTINGS | own | settings)
        if not (run / "export").exists():
            vilg("export", run, "--out", run / "export")
        bundle = load_model(run / "export")
        prompts = [bundle.encode_prompt(caption) for caption in held_back.captions]
        seeds = [1_000_003 * seed + number for number in range(len(prompts))]
        drawn = generate_codes(
            bundle.model, bundle.spec, prompts, num=1, seeds=seeds, sampling=SamplingConfig(), batch_rows=250
        )[:, 0]
        true = bundle.encode_images(held_back.images)
        rows: dict[str, float] = _metrics(run)
        for label, codes, decode in (
            ("drawn, codebook", drawn, "codebook"), ("drawn, hidden", drawn, "hidden"),
            ("true codes, codebook", true, "codebook"), ("true codes, hidden", true, "hidden"),
        ):  # fmt: skip
            pictures = decode_pictures(bundle, prompts, codes, decode=decode)
            rows[label] = round(frechet_distance(real, gaussian(net, pictures)), 2)
            if label == "true codes, codebook":
                error = (pictures.astype(float) - held_back.images) / 127.5
                rows["psnr_db"] = round(float(10 * np.log10(4 / np.square(error).mean())), 2)
        found[name] = rows
        print(f"seed {seed}, {name}: {rows}", flush=True)
    (work / f"joint-seed{seed}.json").write_text(json.dumps({"rows": found, "feature_network": facts}, indent=1) + "\n")


def _metrics(run: Path) -> dict[str, float]:
    """Means over the last tenth of the steps; the tokenizer's only where it is trained."""
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    last = lines[-len(lines) // 10 :]
    keys = ("image_loss", "text_loss", "reconstruction_loss", "codes_changed", "codes_used", "code_perplexity", "commitment_loss")
    return {key: round(statistics.mean(line[key] for line in last), 4) for key in keys if key in last[0]}


def gradients(work: Path, steps: int = 300) -> None:
    """The tokenizer alone at the rates of `slow` and `fast`, by rotation and by the plain straight-through gradient."""
    data, held_back = read_labelled(work / "raw"), to_float(read_labelled(work / "held_back").images)
    found = {}
    for rate, settings in {"slow": SLOW, "fast": FAST}.items():
        chosen = {**RECIPE, **SETTINGS, **settings}.items()
        recipe = load_recipe("launch/recipes/demo/train.yaml", [f"{key}={value}" for key, value in chosen])
        spec, size = sequence_spec(recipe), recipe.batch.global_size
        for gradient in ("rotation", "straight through"):
            tokenizer = ImageTokenizer.load(work / "image")
            start, draw = tokenizer.encode(held_back), np.random.default_rng(0)
            quantizer = JointQuantizer(recipe, tokenizer, spec, grid=Grid.single(), device=torch.device("cpu"))
            if gradient == "straight through":
                quantizer._carried_over = lambda vectors, codes: vectors + (codes - vectors).detach()
            rows = {0: _state(tokenizer, held_back, start)}
            for step in range(1, steps + 1):
                images = data.images[draw.integers(0, len(data.images), size)]
                batch = collate([answer(spec, (), [5], np.zeros(spec.image_slots, int), image) for image in images])
                warmup = min(1.0, step / recipe.schedule.warmup_steps)
                quantizer(StepPlan(step, recipe.optimizer.lr * warmup, 0, 0, 0.0, 0.0), [batch])
                quantizer.finish(skipped=False)
            rows[steps] = _state(tokenizer, held_back, start)
            found[f"{rate}, {gradient}"] = rows
            print(f"{rate}, {gradient}: {rows}", flush=True)
    (work / "joint-gradients.json").write_text(json.dumps(found, indent=1) + "\n")


@torch.no_grad()
def _state(tokenizer: ImageTokenizer, images: torch.Tensor, start: torch.Tensor) -> dict[str, float]:
    vectors, codes = tokenizer.encoder(images), tokenizer.encode(images)
    used, perplexity = code_use(torch.bincount(codes.flatten(), minlength=tokenizer.vocab_size))
    return {
        "psnr_db": round(float(10 * torch.log10(4 / (tokenizer.decode(codes) - images).square().mean())), 2),
        "codes_used": used, "perplexity": round(perplexity, 1),
        "commitment_loss": round(float((vectors - tokenizer.codebook.lookup(codes)).square().mean()), 4),
        "codes_changed": round(float((codes != start).float().mean()), 4),
    }  # fmt: skip


def collect(work: Path, steps: int) -> dict:
    """Mean and spread (sample standard deviation) over the finished seeds."""
    found = {seed: json.loads((work / f"joint-seed{seed}.json").read_text()) for seed in SEEDS if (work / f"joint-seed{seed}.json").exists()}
    if len({json.dumps(one["feature_network"]) for one in found.values()}) != 1:
        raise SystemExit("seeds were measured by different feature networks: make them on one machine, with one torch")
    table = {}
    for name in CONTENDERS:
        table[name] = {}
        for key in next(iter(found.values()))["rows"][name]:
            values = [one["rows"][name][key] for one in found.values()]
            spread = round(statistics.stdev(values), 4) if len(values) > 1 else None
            table[name][key] = {"mean": round(statistics.mean(values), 4), "spread": spread, "values": values}
        print(name, {key: (entry["mean"], entry["spread"]) for key, entry in table[name].items()})
    return {
        "claim": "End-to-end training with the image tokenizer frozen, slow and fast; Frechet distances as in end_to_end.json",
        "hardware": f"{platform.processor() or platform.machine()}, 1 thread", "versions": versions(), "commit": source_commit(),
        "steps": steps, "settings": {name: SETTINGS | own for name, own in CONTENDERS.items()},
        "pictures": 1000, "seeds": list(found), "rows": table,
        "gradients": json.loads((work / "joint-gradients.json").read_text()),
        "feature_network": next(iter(found.values()))["feature_network"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of `vilg demo`")
    parser.add_argument("--work", type=Path, default=Path("runs/joint_quantizer"), help="folder for shards and runs")
    parser.add_argument("--only", type=int, metavar="SEED", help="do one seed and stop")
    parser.add_argument("--gradients", action="store_true", help="do the second table and stop")
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained side by side, a core each")
    parser.add_argument("--collect", action="store_true", help="train nothing; result from the seeds in --work")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = args.work.resolve()
    if not args.collect:
        prepare(args.demo.resolve(), work, shards=SHARDS)
        if args.only is not None:
            one_seed(work, args.only, args.steps)
        if args.gradients or args.only is None:
            gradients(work)
        if args.only is None and not args.gradients:
            own = ["--demo", str(args.demo), "--work", str(work), "--steps", str(args.steps)]
            side_by_side(__file__, [[*own, "--only", str(seed)] for seed in SEEDS], args.jobs)
    if args.only is None and not args.gradients:
        result = collect(work, args.steps)
        if args.steps == STEPS:
            RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
