"""`vilg generate`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vilg.data.filters.similarity import ClipScorer
from vilg.errors import UserError
from vilg.inference.decode import DECODES
from vilg.inference.drawing import OnStep
from vilg.inference.generate import draw_images
from vilg.inference.options import is_main, opened, parse_options, read_lines
from vilg.inference.pictures import png_bytes
from vilg.inference.rerank import clip_scores, rerank_scores
from vilg.pictures.sheet import Cell, Picture, Section, sample_sheet
from vilg.tokens.files import write_atomically

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"


def generate_main(argv: Sequence[str]) -> int:
    """Text -> image from an export folder: PNGs, a grid and scores.jsonl."""
    parser = argparse.ArgumentParser(prog="vilg generate", description=generate_main.__doc__)
    parser.add_argument("--prompt", action="append", default=[], help="what the picture shows; may be given again")
    parser.add_argument("--prompts", type=Path, help="UTF-8 file with one prompt a line")
    parser.add_argument("--truncate", action="store_true", help="cut a prompt that does not fit, instead of an error")
    parser.add_argument("--num", type=int, default=4, help="candidates drawn for each prompt")
    parser.add_argument("--best", type=int, default=0, help="keep this many, those with the best scores; 0 keeps all")
    parser.add_argument(
        "--clip", type=Path, help="score by this CLIP or Chinese-CLIP folder, instead of the model's own captioning"
    )
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 is none")
    parser.add_argument(
        "--guidance-start", type=float, help="guidance of the first slot, moving evenly to --guidance at the last"
    )
    parser.add_argument("--eager", action="store_true", help="on a GPU: start kernel by kernel, without a CUDA graph")
    parser.add_argument(
        "--decode", choices=DECODES, default="auto",
        help="pixels from the codebook, or from hidden states by the reconstructor of end-to-end training (auto: if any)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for grid.png, pictures and scores.jsonl")
    args = parse_options(parser, argv, temperature=None)
    if args.num < 1:
        raise UserError(f"--num {args.num}: draw at least one candidate")
    if not 0 <= args.best <= args.num:
        raise UserError(f"--best {args.best}: keep between 1 and --num {args.num} candidates, or 0 for all")
    prompts = list(args.prompt)
    if args.prompts:
        lines = read_lines(args.prompts, option="--prompts", expected="one prompt a line")
        prompts += [line for _, line in lines]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT or --prompts FILE")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; name a folder")

    clip = ClipScorer(args.clip, device=args.device) if args.clip else None
    with opened(args.model, device=args.device) as bundle:
        given = {name: getattr(args, name) for name in ("guidance", "guidance_start", "temperature", "top_k", "top_p")}
        sampling = replace(bundle.sampling, **{name: value for name, value in given.items() if value is not None})
        quiet = not is_main(bundle)
        with tqdm(
            total=len(prompts) * args.num, unit="image", desc="drawing", bar_format=_BAR, disable=quiet
        ) as bar:
            images, codes = draw_images(
                bundle, prompts, num=args.num, seed=args.seed, sampling=sampling, batch_rows=args.batch,
                truncate=args.truncate, graph=not args.eager, decode=args.decode,
                on_step=_advance(bar, bundle.spec.image_slots),
            )  # fmt: skip
        if clip is None:
            scores, scored_by = rerank_scores(bundle, prompts, codes), "log-probability per prompt token"
        else:
            scores, scored_by = clip_scores(clip, prompts, images, batch=args.batch), f"cosine by {args.clip}"
        if quiet:
            return 0
        facts = {"seed": args.seed, "score_is": scored_by} | asdict(sampling)
        _write_pictures(args.out, prompts, images, scores, keep=args.best or args.num, facts=facts)
        print(f"{len(prompts)} prompts x {args.best or args.num} of {args.num} candidates -> {args.out / 'grid.png'}")
    return 0


def _advance(bar: tqdm, num_slots: int) -> OnStep:
    """Moves the bar by parts of pictures, some thirty times a batch: at each the GPU, if there is one, is waited for."""
    every = max(1, num_slots // 32)

    def on_step(drawn: int, codes: Tensor) -> None:
        past = drawn % every or every
        if past == every or drawn == num_slots:
            if codes.is_cuda:
                torch.cuda.synchronize(codes.device)
            bar.update(len(codes) * past / num_slots)

    return on_step


def _write_pictures(
    out: Path,
    prompts: Sequence[str],
    images: np.ndarray,
    scores: np.ndarray,
    *,
    keep: int,
    facts: Mapping[str, object],
) -> None:
    """Pictures as NNNN_RR.png (prompt, rank) with their facts as PNG text, one grid, one JSON line a candidate."""
    lines, cells = [], []
    for row, prompt in enumerate(prompts):
        order = np.argsort(-scores[row], kind="stable")
        for rank, candidate in enumerate(order):
            kept = rank < keep
            name = f"{row:04d}_{rank:02d}.png"
            score = round(float(scores[row, candidate]), 6)
            all_facts = {"prompt": prompt, "candidate": int(candidate), "score": score} | facts
            lines.append(all_facts | {"file": name if kept else None})
            if kept:
                write_atomically(out / name, png_bytes(images[row, candidate], all_facts))
        shown = [Picture(images[row, i], f"{scores[row, i]:.2f}") for i in order[:keep]]
        cells.append(Cell(shown, [prompt]))
    columns = max(1, 8 // keep)
    note = f"under each picture: {facts['score_is']}"
    sample_sheet([Section("", cells, columns=columns, note=note)], out / "grid.png")
    scores_text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(out / "scores.jsonl", scores_text.encode())
