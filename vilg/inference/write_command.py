"""`vilg caption` and `vilg answer`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from vilg.errors import UserError
from vilg.inference.caption import MOST_BEAMS, answer_codes, caption_codes, writing_sampling
from vilg.inference.load import read_segment
from vilg.inference.options import encode_files, is_main, opened, parse_options, read_lines
from vilg.inference.texts import cut_note


def caption_main(argv: Sequence[str]) -> int:
    """Image -> text from an export folder: one line of JSON for each picture on standard output."""
    parser = argparse.ArgumentParser(prog="vilg caption", description=caption_main.__doc__)
    parser.add_argument("images", nargs="+", type=Path, help="JPEG, PNG or WebP files")
    args, settings = _parse(parser, argv)
    with opened(args.model, device=args.device) as bundle:
        codes = encode_files(bundle, args.images, batch=args.batch)
        with tqdm(total=len(codes), unit="image", desc="writing", disable=not is_main(bundle)) as bar:
            captions = caption_codes(bundle.model, bundle.spec, bundle.text, codes, progress=bar.update, **settings)
        if is_main(bundle):
            for path, caption in zip(args.images, captions, strict=True):
                print(json.dumps({"image": str(path), "caption": caption}, ensure_ascii=False))
    return 0


def answer_main(argv: Sequence[str]) -> int:
    """Image + question -> answer from an export folder: one line of JSON for each question on standard output, as
    `vilg eval vqa` reads them."""
    parser = argparse.ArgumentParser(prog="vilg answer", description=answer_main.__doc__)
    parser.add_argument("images", nargs="*", type=Path, help="JPEG, PNG or WebP files; each is asked every --question")
    parser.add_argument("--question", action="append", default=[], help="what to ask; may be given again")
    parser.add_argument(
        "--questions", type=Path, help="JSONL of image and question; image paths are relative to that file's folder"
    )
    parser.add_argument("--truncate", action="store_true", help="cut a question that does not fit, instead of an error")
    args, settings = _parse(parser, argv)
    if bool(args.images) != bool(args.question):
        raise UserError("give both IMAGE and --question TEXT, or --questions FILE")
    asked = [(str(image), image, question) for image in args.images for question in args.question]
    if args.questions:
        asked += _read_questions(args.questions)
    if not asked:
        raise UserError("no question: give IMAGE --question TEXT, or --questions FILE")
    files = list(dict.fromkeys(path for _, path, _ in asked))
    place = {path: number for number, path in enumerate(files)}
    segment = read_segment(args.model)
    questions = [segment.question(question, truncate=args.truncate) for _, _, question in asked]
    with opened(args.model, device=args.device) as bundle:
        codes = encode_files(bundle, files, batch=args.batch)[[place[path] for _, path, _ in asked]]
        with tqdm(total=len(asked), unit="answer", desc="answering", disable=not is_main(bundle)) as bar:
            answers = answer_codes(
                bundle.model, bundle.spec, bundle.text, codes, [question.ids for question in questions],
                progress=bar.update, **settings,
            )  # fmt: skip
        if is_main(bundle):
            for (image, _, question), fitted, answer in zip(asked, questions, answers, strict=True):
                line = {"image": image, "question": question, "answer": answer} | fitted.facts("asked")
                print(json.dumps(line, ensure_ascii=False))
            if note := cut_note("question", questions):
                print(note, file=sys.stderr)
    return 0


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, dict]:
    """The options, and the settings of `answer_codes` among them."""
    parser.add_argument("--language", choices=("zh", "en"), help="the text's script; the model chooses otherwise")
    parser.add_argument(
        "--beams", "--num-beams", dest="num_beams", type=int, default=1,
        help=f"beam search with this many beams, at most {MOST_BEAMS}; 1 is none",
    )  # fmt: skip
    parser.add_argument(
        "--length-penalty", type=float, default=1.0,
        help="of beam search: log-probability / (number of tokens ** this); larger favours longer texts",
    )  # fmt: skip
    args = parse_options(parser, argv, temperature=0.0)
    how = dict(num_beams=args.num_beams, length_penalty=args.length_penalty)
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    how["sampling"] = writing_sampling(given, **how)
    return args, dict(how, language=args.language, seed=args.seed, batch=args.batch)


def _read_questions(path: Path) -> list[tuple[str, Path, str]]:
    """(image as the file names it, where it lies, question) of each line. Raises UserError naming file and line."""
    found = []
    for number, line in read_lines(path, option="--questions", expected="one JSON object a line"):
        try:
            entry = json.loads(line)
            image, question = entry["image"], entry["question"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: expected a JSON object with image and question ({error!r})") from None
        if not isinstance(image, str) or not isinstance(question, str):
            raise UserError(f"{path}:{number}: image and question must be texts")
        found.append((image, path.parent / image, question))
    return found
