"""Claim: of several candidates the one under which the model finds the prompt likeliest is right more often than one sample.

    .venv/bin/vilg demo --out runs/demo
    .venv/bin/python benchmarks/demo_rerank.py --demo runs/demo --json benchmarks/results/demo_rerank.json

For each scene and language, --num pictures are drawn with the export's own sampling settings and scored by inverse prompting
(`vilg.inference.rerank`), as `vilg generate --best` does. best of n: the pictures are dealt into num / n groups, the best of
each group counts, and groups are averaged, so all n look at the same pictures. any of n: a group with at least one right
picture, which is as far as any choice among them could come. Right is a picture whose nearest scene has the glyph that was asked for
(docs/demo.md); the standard error is over scenes. Inverse prompting is also compared with a choice by chance of the
same size, which is best of 1.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from vilg.checkpoint.state import source_commit, versions  # noqa: E402
from vilg.demo.evaluate import EVALUATED_SPLITS, distinct_scenes  # noqa: E402
from vilg.demo.generate_data import read_scenes  # noqa: E402
from vilg.demo.scenes import LANGUAGES  # noqa: E402
from vilg.demo.scores import SceneMatcher  # noqa: E402
from vilg.inference.generate import draw_images  # noqa: E402
from vilg.inference.load import load_model  # noqa: E402
from vilg.inference.rerank import rerank_scores  # noqa: E402


def figures(right: np.ndarray, scores: np.ndarray) -> dict[str, dict[str, float]]:
    """right: bool [P, K], scores: float [P, K] -> for each n that divides K: best of n, any of n, standard errors."""
    prompts, num = right.shape
    found = {}
    for n in (n for n in (1, 2, 4, 8, 16) if num % n == 0):
        groups, values = right.reshape(prompts, -1, n), scores.reshape(prompts, -1, n)
        best = np.take_along_axis(groups, values.argmax(-1)[..., None], -1)[..., 0].mean(1)  # [P]
        possible = groups.any(-1).mean(1)
        gain = best - right.mean(1)
        error = {name: x.std(ddof=1) / prompts**0.5 for name, x in (("best", best), ("gain", gain))}
        found[f"best_of_{n}"] = {
            "right": float(best.mean()), "standard_error": float(error["best"]),
            "gain_over_one": float(gain.mean()), "gain_standard_error": float(error["gain"]),
            "any_of_n": float(possible.mean()),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    parser.add_argument("--num", type=int, default=8, help="candidates of a prompt")
    parser.add_argument("--num-scenes", type=int, default=128, help="scenes of a split; held out are 64")
    parser.add_argument("--glyphs", type=int, nargs="+", help="objects asked for, by number; default: the demo's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    config, bundle = read_scenes(options.demo / "raw"), load_model(options.demo / "export")
    matcher, splits = SceneMatcher(config), {}
    for split in EVALUATED_SPLITS:
        every = distinct_scenes(config, split, config.count(split))
        glyphs = set(options.glyphs or range(config.num_glyphs))
        scenes = [scene for scene in every if glyphs.issuperset(scene.glyphs)][: options.num_scenes]
        for language in LANGUAGES:
            prompts = [scene.caption(language) for scene in scenes]
            with tqdm(total=len(prompts) * options.num, unit="image", desc=f"{split} {language}") as bar:
                images, codes = draw_images(
                    bundle, prompts, num=options.num, seed=options.seed, sampling=bundle.sampling, progress=bar.update
                )
            wanted = np.array([scene.glyphs for scene in scenes])[:, None]
            nearest = matcher.nearest(images.reshape(-1, *images.shape[2:])).glyphs.reshape(*images.shape[:2], -1)
            right = (nearest == wanted).all(-1)
            splits[f"{split}.{language}"] = figures(right, rerank_scores(bundle, prompts, codes)) | {"scenes": len(scenes)}
    result = {
        "claim": f"best of {options.num} by inverse prompting against one sample, glyph right",
        "command": "python benchmarks/demo_rerank.py " + " ".join(sys.argv[1:]),
        "sampling": vars(bundle.sampling),
        "candidates": options.num,
        "splits": splits,
        "machine": {"processor": platform.processor() or platform.machine()},
        "versions": versions(),
        "commit": source_commit(),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
