"""`vilg generate`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vilg.data.filters.similarity import ClipScorer
from vilg.errors import UserError
from vilg.inference.decode import DECODES
from vilg.inference.drawing import OnStep
from vilg.inference.drawn_folder import DrawnFolder, files_stamp
from vilg.inference.generate import draw_images
from vilg.inference.load import Bundle, read_sampling, read_segment
from vilg.inference.options import is_first_process, is_main, of_first_process, opened, parse_options, read_lines
from vilg.inference.rerank import clip_scores, rerank_scores
from vilg.inference.sampling import SamplingConfig, changed_sampling
from vilg.inference.texts import cut_note

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
    parser.add_argument(
        "--out", type=Path, required=True,
        help="folder for grid.png, pictures and scores.jsonl; a run that was stopped goes on in its own",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in --out")
    args = parse_options(parser, argv, temperature=None)
    if args.num < 1:
        raise UserError(f"--num {args.num}: draw at least one candidate")
    if not 0 <= args.best <= args.num:
        raise UserError(f"--best {args.best}: keep between 1 and --num {args.num} candidates, or 0 for all")
    prompts = _prompts(args)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; name a folder")
    segment = read_segment(args.model)
    fitted = [segment.prompt(prompt, truncate=args.truncate) for prompt in prompts]
    given = {name: getattr(args, name) for name in ("guidance", "guidance_start", "temperature", "top_k", "top_p")}
    sampling = changed_sampling(read_sampling(args.model), given)
    clip = ClipScorer(args.clip, device=args.device, option="--clip") if args.clip else None
    scored_by = f"cosine by {args.clip}" if clip else "log-probability per prompt token"
    facts = {"seed": args.seed, "score_is": scored_by} | asdict(sampling)
    settings = facts | {"truncate": args.truncate, "decode": args.decode}
    settings["model_files"] = files_stamp(args.model, without=args.out)
    if args.clip:
        settings["clip_files"] = files_stamp(args.clip, without=args.out)
    folder = DrawnFolder(args.out, prompts, num=args.num, keep=args.best or args.num, settings=settings)
    finished = 0
    if is_first_process():  # before the model is read: a folder that will not do is said at once
        finished = folder.claim(overwrite=args.overwrite)
        if note := cut_note("prompt", fitted):
            print(note, file=sys.stderr)

    with opened(args.model, device=args.device) as bundle:
        of_each = [each.facts("drawn") | facts for each in fitted]
        _draw(bundle, folder, args, sampling, clip, facts=of_each, finished=finished)
        if is_main(bundle):
            print(folder.summary())
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts:
        lines = read_lines(args.prompts, option="--prompts", expected="one prompt a line")
        prompts += [line for _, line in lines]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT or --prompts FILE")
    return prompts


def _draw(
    bundle: Bundle,
    folder: DrawnFolder,
    args: argparse.Namespace,
    sampling: SamplingConfig,
    clip: ClipScorer | None,
    *,
    facts: Sequence[Mapping[str, object]],
    finished: int,
) -> None:
    """Draw, score and write the prompts behind the first `finished`, as many at once as a batch holds."""
    prompts, quiet = folder.prompts, not is_main(bundle)
    at_once = max(1, args.batch // args.num)
    finished = of_first_process(finished)
    if finished < len(prompts):  # what was begun together is drawn together again: sums may round otherwise
        finished -= finished % at_once
    if not quiet:
        folder.begin(finished)
        if finished:
            print(f"{finished} of {len(prompts)} prompts were drawn before; going on behind them", file=sys.stderr)
    with tqdm(
        total=len(prompts) * args.num, initial=finished * args.num, unit="image", desc="drawing", bar_format=_BAR,
        disable=quiet,
    ) as bar:  # fmt: skip
        on_step = _advance(bar, bundle.spec.image_slots)
        for start in range(finished, len(prompts), at_once):
            part = prompts[start : start + at_once]
            images, codes = draw_images(
                bundle, part, num=args.num, seed=args.seed, sampling=sampling, batch_rows=args.batch,
                truncate=args.truncate, graph=not args.eager, decode=args.decode, on_step=on_step,
            )  # fmt: skip
            if clip is None:
                scores = rerank_scores(bundle, part, codes, batch=args.batch)
            else:
                scores = clip_scores(clip, part, images, batch=args.batch)
            if not quiet:
                for row, (drawn, scored) in enumerate(zip(images, scores, strict=True), start):
                    folder.add(row, drawn, scored, facts[row])
                folder.write_grid(start + len(part))
    if not quiet:
        folder.write_grid(len(prompts))


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
