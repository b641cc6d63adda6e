"""`vilg eval scenes`: both directions of an exported model measured on scenes it did and did not see.

Every figure comes with its ceiling: the same measure on real pictures (must be 1) and on their reconstructions.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vilg.demo.generate_data import read_scenes
from vilg.demo.scenes import LANGUAGES, Scene, SceneConfig, make_scene, render
from vilg.demo.scores import SceneMatcher, scene_scores
from vilg.errors import UserError
from vilg.inference.caption import caption_codes
from vilg.inference.generate import draw_images
from vilg.inference.likelihood import image_nll
from vilg.inference.load import Bundle, load_model
from vilg.inference.options import check_device
from vilg.inference.rerank import rerank_scores
from vilg.tokens.files import write_atomically

EVALUATED_SPLITS = ("seen", "held_out")
REPORT_FORMAT_VERSION = 1


@dataclass(frozen=True)
class SplitResult:
    """What one split gave: figures for the report, pictures for the sheet.

    real, reconstructed: uint8 [I, S, S, 3]; per language: best uint8 [I, S, S, 3], best_right bool [I] (the nearest of
    all scenes is the one asked for), captions I strings.
    """

    figures: dict[str, object]
    scenes: list[Scene]
    real: np.ndarray
    reconstructed: np.ndarray
    best: dict[str, np.ndarray]
    best_right: dict[str, np.ndarray]
    captions: dict[str, list[str]]


def distinct_scenes(config: SceneConfig, split: str, limit: int) -> list[Scene]:
    """The first scenes of a split that differ in their caption, at most `limit`: equal prompts draw equal pictures."""
    chosen: dict[str, Scene] = {}
    for index in range(config.count(split)):
        if len(chosen) == limit:
            break
        scene = make_scene(config, split, index)
        chosen.setdefault(scene.caption("en"), scene)
    return list(chosen.values())


def evaluate_split(
    bundle: Bundle, config: SceneConfig, split: str, *, num_scenes: int, num_candidates: int, seed: int
) -> SplitResult:
    """All figures of one split; `num_candidates` pictures a prompt, each of them a single sample."""
    matcher = SceneMatcher(config)
    scenes = distinct_scenes(config, split, num_scenes)
    real = np.stack([render(config, scene) for scene in scenes])
    codes = bundle.encode_images(real)
    reconstructed = bundle.decode_images(codes)
    figures: dict[str, object] = {
        "scenes": len(scenes),
        "real": scene_scores(real, scenes, config, matcher=matcher),
        "reconstruction": scene_scores(reconstructed, scenes, config, matcher=matcher),
    }
    best, best_right, captions = {}, {}, {}
    for language in LANGUAGES:
        figures[language], best[language], captions[language] = _evaluate_language(
            bundle, config, scenes, codes, language, matcher=matcher, num_candidates=num_candidates, seed=seed
        )
        found = matcher.nearest(best[language])
        best_right[language] = np.array([
            tuple(found.glyphs[i]) == tuple(scene.glyphs) and found.backgrounds[i] == scene.background
            for i, scene in enumerate(scenes)
        ])
    return SplitResult(figures, scenes, real, reconstructed, best, best_right, captions)


def _evaluate_language(
    bundle: Bundle,
    config: SceneConfig,
    scenes: list[Scene],
    codes: Tensor,
    language: str,
    *,
    matcher: SceneMatcher,
    num_candidates: int,
    seed: int,
) -> tuple[dict[str, object], np.ndarray, list[str]]:
    prompts = [scene.caption(language) for scene in scenes]
    captions = caption_codes(bundle.model, bundle.spec, bundle.text, codes, language=language)
    exact = float(np.mean([found == prompt for found, prompt in zip(captions, prompts, strict=True)]))

    with tqdm(total=len(prompts) * num_candidates, unit="image", desc=f"drawing {language}", leave=False) as bar:
        images, drawn = draw_images(
            bundle, prompts, num=num_candidates, seed=seed, sampling=bundle.sampling, progress=bar.update
        )
    chosen = rerank_scores(bundle, prompts, drawn).argmax(1)
    best = images[np.arange(len(prompts)), chosen]
    # Every candidate is one sample: their mean is what a single sample scores, with a smaller error than the first alone.
    singles = [scene_scores(images[:, k], scenes, config, matcher=matcher) for k in range(num_candidates)]
    reranked = scene_scores(best, scenes, config, matcher=matcher)

    texts = [bundle.encode_prompt(prompt) for prompt in prompts]
    wrong = [texts[i] for i in _other_glyph(scenes)]
    figures = {
        "caption_exact": exact,
        "image_glyph_recall": float(np.mean([single["glyph_recall"] for single in singles])),
        "image_glyph_recall_best_of_n": reranked["glyph_recall"],
        "image_background_accuracy": float(np.mean([single["background_accuracy"] for single in singles])),
        "image_background_accuracy_best_of_n": reranked["background_accuracy"],
        "nll_right": float(image_nll(bundle.model, bundle.spec, codes, texts).mean()),
        "nll_wrong_caption": float(image_nll(bundle.model, bundle.spec, codes, wrong).mean()),
    }
    return figures, best, captions


def _other_glyph(scenes: list[Scene]) -> list[int]:
    """For each scene the next one (cyclic) that shows other glyphs: its caption is the wrong one, and may name another
    background too. Where all show the same glyphs, the next one, which has another background."""
    count = len(scenes)
    others = []
    for index, scene in enumerate(scenes):
        candidates = ((index + step) % count for step in range(1, count))
        others.append(next((i for i in candidates if scenes[i].glyphs != scene.glyphs), (index + 1) % count))
    return others


def evaluate(
    model: Path, raw: Path, *, num_scenes: int, num_candidates: int, seed: int, device: str = "cpu"
) -> tuple[dict[str, object], dict[str, SplitResult]]:
    """Figures of both splits (JSON-ready) and the results behind them.

    Raises UserError if there are fewer than two scenes of a split, or if the model draws pictures of another size.
    """
    if num_scenes < 2 or num_candidates < 1:
        raise UserError(
            f"--num-scenes {num_scenes} --num-candidates {num_candidates}: use two scenes (each lends the other its "
            "caption as the wrong one) and one candidate, or more"
        )
    config = read_scenes(raw)
    for split in EVALUATED_SPLITS:
        if config.count(split) < 2:
            raise UserError(f"{raw}: made with num_{split}={config.count(split)}; the evaluation needs two or more")
    bundle = load_model(model, device=device)
    if bundle.image_size != (config.image_size, config.image_size):
        raise UserError(f"{model} draws {bundle.image_size} pixels, the scenes in {raw} have {config.image_size}")
    results = {
        split: evaluate_split(bundle, config, split, num_scenes=num_scenes, num_candidates=num_candidates, seed=seed)
        for split in EVALUATED_SPLITS
    }
    report = {
        "format_version": REPORT_FORMAT_VERSION,
        "best_of_n": num_candidates,
        "sampling": vars(bundle.sampling),
        "glyphs": config.num_glyphs,
        "backgrounds": config.num_backgrounds,
        "held_out_backgrounds_per_glyph": config.backgrounds_held_out,
        **{split: result.figures for split, result in results.items()},
    }
    return report, results


def main(argv: Sequence[str]) -> int:
    """Measure an exported model on the demo's scenes and draw the sheet."""
    parser = argparse.ArgumentParser(prog="vilg eval scenes", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="export folder")
    parser.add_argument("--raw", type=Path, required=True, help="folder made by `vilg demo-data`")
    parser.add_argument("--out", type=Path, required=True, help="folder for scenes.json (figures) and samples.png")
    parser.add_argument("--num-scenes", type=int, default=128, help="scenes measured per split")
    parser.add_argument("--num-candidates", type=int, default=4, help="n of best-of-n")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random streams")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    check_device(args.device)
    from vilg.demo.report import draw_samples, print_figures

    report, results = evaluate(
        args.model,
        args.raw,
        num_scenes=args.num_scenes,
        num_candidates=args.num_candidates,
        seed=args.seed,
        device=args.device,
    )
    draw_samples(results, args.out / "samples.png", best_of=args.num_candidates)
    write_atomically(args.out / "scenes.json", json.dumps(report, indent=2).encode() + b"\n")
    print_figures(report)
    return 0
