"""`vilg generate` and `vilg caption`."""

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from vilg.errors import UserError
from vilg.inference.caption import GREEDY, caption_codes
from vilg.inference.generate import draw_images
from vilg.inference.load import Bundle, load_model
from vilg.inference.rerank import text_log_likelihood
from vilg.inference.sampling import SamplingConfig
from vilg.pictures.sheet import Cell, Picture, Section, sample_sheet
from vilg.tokens.files import write_atomically
from vilg.tokens.vqgan.images import BadImage, decode_image


def generate_main(argv: Sequence[str]) -> int:
    """Text -> image from an export folder: PNGs, a grid and scores.jsonl."""
    parser = argparse.ArgumentParser(prog="vilg generate", description=generate_main.__doc__)
    parser.add_argument("--prompt", action="append", default=[], help="what the picture shows; may be given again")
    parser.add_argument("--prompts", type=Path, help="UTF-8 file with one prompt a line")
    parser.add_argument("--num", type=int, default=4, help="candidates drawn for each prompt")
    parser.add_argument("--best", type=int, default=0, help="keep this many by the model's own captioning; 0 keeps all")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 is none")
    parser.add_argument("--top-k", type=int, help="codes kept when sampling; 0 keeps all")
    parser.add_argument("--top-p", type=float, help="probability mass kept when sampling; 1 keeps all")
    parser.add_argument("--out", type=Path, required=True, help="folder for grid.png, pictures and scores.jsonl")
    args = _parse(parser, argv, temperature=None)
    if args.num < 1:
        raise UserError(f"--num {args.num}: draw at least one candidate")
    if not 0 <= args.best <= args.num:
        raise UserError(f"--best {args.best}: keep between 1 and --num {args.num} candidates, or 0 for all")
    prompts = [*args.prompt, *_read_prompts(args.prompts)]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT or --prompts FILE")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; name a folder")

    bundle = load_model(args.model, device=args.device)
    given = {name: getattr(args, name) for name in ("guidance", "temperature", "top_k", "top_p")}
    sampling = replace(bundle.sampling, **{name: value for name, value in given.items() if value is not None})
    with tqdm(total=len(prompts) * args.num, unit="image", desc="drawing") as bar:
        images, codes = draw_images(
            bundle, prompts, num=args.num, seed=args.seed, sampling=sampling, batch_rows=args.batch, progress=bar.update
        )
    scores = rerank_scores(bundle, prompts, codes)
    _write_pictures(args.out, prompts, images, scores, keep=args.best or args.num, seed=args.seed, sampling=sampling)
    print(f"{len(prompts)} prompts x {args.best or args.num} of {args.num} candidates -> {args.out / 'grid.png'}")
    return 0


def caption_main(argv: Sequence[str]) -> int:
    """Image -> text from an export folder: one line of JSON for each picture on standard output."""
    parser = argparse.ArgumentParser(prog="vilg caption", description=caption_main.__doc__)
    parser.add_argument("images", nargs="+", type=Path, help="JPEG, PNG or WebP files")
    parser.add_argument("--language", choices=("zh", "en"), help="the caption's script; the model chooses otherwise")
    args = _parse(parser, argv, temperature=0.0)
    sampling = replace(GREEDY, temperature=args.temperature)
    bundle = load_model(args.model, device=args.device)
    codes = bundle.encode_images(np.stack([_read_image(path, bundle.image_size[0]) for path in args.images]))
    captions = caption_codes(
        bundle.model, bundle.spec, bundle.text, codes,
        language=args.language, sampling=sampling, seed=args.seed, batch=args.batch,
    )  # fmt: skip
    for path, caption in zip(args.images, captions, strict=True):
        print(json.dumps({"image": str(path), "caption": caption}, ensure_ascii=False))
    return 0


def rerank_scores(bundle: Bundle, prompts: Sequence[str], codes: torch.Tensor) -> np.ndarray:
    """Inverse-prompting scores float32 [P, K] of codes int64 [P, K, N]: mean log-probability per prompt token.

    A prompt that fills the whole text segment loses its last token here: as a target it shares the segment with the
    begin token.
    """
    num = codes.shape[1]
    texts = [bundle.encode_prompt(prompt)[: bundle.spec.text_slots - 1] for prompt in prompts for _ in range(num)]
    scores = text_log_likelihood(bundle.model, bundle.spec, codes.flatten(0, 1), texts)
    return scores.view(len(prompts), num).numpy()


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str], *, temperature: float | None) -> argparse.Namespace:
    parser.add_argument("--model", type=Path, required=True, help="export folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random streams")
    parser.add_argument("--temperature", type=float, default=temperature, help="sampling temperature; 0 is greedy")
    parser.add_argument("--batch", type=int, default=64, help="rows decoded together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: decode at least one row at a time")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more")
    check_device(args.device)
    return args


def check_device(name: str) -> None:
    """Raise UserError unless torch can compute on `--device name` here."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a GPU that is not there, or torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); use cpu, or cuda with a GPU") from None


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: {error}; expected a UTF-8 file with one prompt a line") from None
    return [line.strip() for line in lines if line.strip()]


def _read_image(path: Path, size: int) -> np.ndarray:
    try:
        return decode_image(path.read_bytes(), size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except BadImage as error:
        raise UserError(f"{path}: {error}") from None


def _write_pictures(
    out: Path,
    prompts: Sequence[str],
    images: np.ndarray,
    scores: np.ndarray,
    *,
    keep: int,
    seed: int,
    sampling: SamplingConfig,
) -> None:
    """Pictures as NNNN_RR.png (prompt, rank) with their facts as PNG text, one grid, one JSON line a candidate."""
    lines, cells = [], []
    for row, prompt in enumerate(prompts):
        order = np.argsort(-scores[row], kind="stable")
        for rank, candidate in enumerate(order):
            kept = rank < keep
            name = f"{row:04d}_{rank:02d}.png"
            score = round(float(scores[row, candidate]), 6)
            facts = {"prompt": prompt, "seed": seed, "candidate": int(candidate), "score": score}
            lines.append(facts | asdict(sampling) | {"file": name if kept else None})
            if kept:
                text = PngInfo()
                for key, value in (facts | asdict(sampling)).items():
                    text.add_itxt(key, str(value))
                content = io.BytesIO()
                Image.fromarray(images[row, candidate]).save(content, format="PNG", pnginfo=text)
                write_atomically(out / name, content.getvalue())
        shown = [Picture(images[row, i], f"{scores[row, i]:.2f}") for i in order[:keep]]
        cells.append(Cell(shown, [prompt]))
    columns = max(1, 8 // keep)
    note = "under each picture: log-probability per prompt token"
    sample_sheet([Section("", cells, columns=columns, note=note)], out / "grid.png")
    scores_text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(out / "scores.jsonl", scores_text.encode())
