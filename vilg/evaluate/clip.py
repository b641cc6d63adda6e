"""`vilg eval clip`: how well drawn pictures fit their prompts, by a CLIP or Chinese-CLIP model on this machine."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vilg.data.filters.similarity import ClipScorer, Scorer
from vilg.errors import UserError
from vilg.evaluate.fid import read_batches
from vilg.inference.options import check_device
from vilg.tokens.files import write_atomically

FORMAT_VERSION = 1


def drawn_pictures(folder: Path) -> list[tuple[Path, str]]:
    """(picture, prompt) of what `vilg generate` kept, from its scores.jsonl. Raises UserError naming file and line."""
    path = folder / "scores.jsonl"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; name a folder that `vilg generate` wrote") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if entry["file"] is not None:
                found.append((folder / entry["file"], entry["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: no line of `vilg generate` with file and prompt") from None
    if not found:
        raise UserError(f"{path}: names no picture")
    return found


def similarities(scorer: Scorer, pairs: Sequence[tuple[Path, str]], *, batch: int) -> np.ndarray:
    """Cosine of each picture and its prompt, float32 [number of pairs]."""
    scores, start = [], 0
    with tqdm(total=len(pairs), unit="image", desc="comparing") as bar:
        for pictures in read_batches([path for path, _ in pairs], side=scorer.image_size, batch=batch):
            prompts = [prompt for _, prompt in pairs[start : start + len(pictures)]]
            scores.append(scorer.score(pictures, prompts))
            start += len(pictures)
            bar.update(len(pictures))
    return np.concatenate(scores)


def main(argv: Sequence[str]) -> int:
    """Mean CLIP similarity of drawn pictures and their prompts."""
    parser = argparse.ArgumentParser(prog="vilg eval clip", description=main.__doc__)
    parser.add_argument("pictures", type=Path, help="folder that `vilg generate` wrote")
    parser.add_argument("--clip", type=Path, required=True, help="folder of a CLIP or Chinese-CLIP model (transformers)")
    parser.add_argument("--batch", type=int, default=64, help="pairs compared at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="JSON file for the figures and the settings behind them")
    args = parser.parse_args(argv)
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: at least one pair")
    check_device(args.device)
    pairs = drawn_pictures(args.pictures)
    scores = similarities(ClipScorer(args.clip, device=args.device, option="--clip"), pairs, batch=args.batch)
    by_prompt: dict[str, list[float]] = {}
    for (_, prompt), score in zip(pairs, scores.tolist(), strict=True):
        by_prompt.setdefault(prompt, []).append(score)
    result = {
        "format_version": FORMAT_VERSION,
        "cosine": {"mean": float(scores.mean()), "standard_deviation": float(scores.std())},
        # Hessel et al., arXiv 2104.08718, equation 1.
        "clip_score": float(2.5 * scores.clip(min=0).mean()),
        "pictures": len(pairs),
        "prompts": {prompt: {"mean": float(np.mean(each)), "best": max(each)} for prompt, each in by_prompt.items()},
        "model": str(args.clip),
    }
    if args.out:
        write_atomically(args.out, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    cosine, spread = result["cosine"].values()
    print(f"cosine {cosine:.4f} +- {spread:.4f}  CLIPScore {result['clip_score']:.4f}  ({len(pairs)} pictures, {len(by_prompt)} prompts)")
    return 0
