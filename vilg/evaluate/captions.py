"""`vilg eval caption`: BLEU-1..4, METEOR, ROUGE-L and CIDEr of captions against references.

The metrics are pycocoevalcap's, the code behind COCO's caption challenge; what goes in are tokens cut here (segment.py),
on words and, where a script is written without spaces, on characters too. Every figure says which, as papers on
Chinese captions rarely do: ERNIE-ViLG's figures on COCO-CN are on characters (arXiv 2112.15283, table 5).
"""

import argparse
import contextlib
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePath

import numpy as np

from vilg.data.sources import Table, read_captions
from vilg.errors import UserError
from vilg.evaluate.java import needs_java
from vilg.evaluate.segment import Tokens, characters, has_unspaced, words
from vilg.tokens.files import write_atomically

FORMAT_VERSION = 1
EMPTY = "vilgnothing"  # stands for a caption without tokens: it matches nothing, and no metric divides by its length


def score_tokens(
    captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, meteor: bool = True
) -> dict[str, float]:
    """Corpus figures: bleu_1 to bleu_4, rouge_l, cider, and meteor if asked for; all but CIDEr lie from 0 to 1.

    captions: tokens of one caption an image; references: of one or more. Raises UserError if pycocoevalcap is missing,
    or Java where METEOR is wanted; ValueError for an image without references.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ModuleNotFoundError as error:
        raise UserError(f"caption metrics need {error.name}: pip install pycocoevalcap") from None
    if len(captions) != len(references) or not all(references):
        raise ValueError(f"{len(captions)} captions and {len(references)} images with references, none may be empty")
    found = {i: [_line(tokens)] for i, tokens in enumerate(captions)}
    wanted = {i: [_line(tokens) for tokens in each] for i, each in enumerate(references)}
    with contextlib.redirect_stdout(io.StringIO()):  # they print
        bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
        scores = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
        scores["rouge_l"] = float(Rouge().compute_score(wanted, found)[0])
        scores["cider"] = float(Cider().compute_score(wanted, found)[0])
    if meteor:
        with needs_java("METEOR", instead="--no-meteor"):
            from pycocoevalcap.meteor.meteor import Meteor

            stand_in = _stand_ins([*captions, *(tokens for each in references for tokens in each)])
            found = {i: [_line(map(stand_in, tokens))] for i, tokens in enumerate(captions)}
            wanted = {i: [_line(map(stand_in, tokens)) for tokens in each] for i, each in enumerate(references)}
            scores["meteor"] = float(Meteor().compute_score(wanted, found)[0])
    return scores


def _stand_ins(texts: Iterable[Tokens]) -> Callable[[str], str]:
    """For METEOR: a token in a script without spaces -> an ASCII word of its own; other tokens stay what they are.

    METEOR cuts Chinese into characters whatever it is given (-norm), so that its figure "on words" would be the one on
    characters. It has no stems, synonyms or paraphrases of such scripts, so a word is only a name there; those made here
    are no English words, and have no ending that its stemmer takes off.
    """
    tokens = dict.fromkeys(token for text in texts for token in text)
    names = (f"zq{''.join('abcdefghij'[int(digit)] for digit in str(number))}q" for number in itertools.count())
    free = (name for name in names if name not in tokens)
    known = {token: next(free) for token in tokens if has_unspaced(token)}
    return lambda token: known.get(token, token)


def score_captions(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], *, ptb: bool = True, meteor: bool = True
) -> dict[str, dict[str, float]]:
    """`score_tokens` on words, and on characters if a reference holds any of a script without spaces.

    Both by image; every captioned image needs references. Returns {"words": ..., "characters": ...}.
    """
    names = list(captions)
    texts = [captions[name] for name in names]
    flat = [text for name in names for text in references[name]]
    ends = np.cumsum([len(references[name]) for name in names]).tolist()
    units: dict[str, Callable[[Sequence[str]], list[Tokens]]] = {"words": lambda texts: words(texts, ptb=ptb)}
    if any(map(has_unspaced, flat)):
        units["characters"] = characters
    found = {}
    for unit, cut in units.items():
        tokens = cut([*texts, *flat])
        cut_texts, cut_flat = tokens[: len(texts)], tokens[len(texts) :]
        grouped = [cut_flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        found[unit] = score_tokens(cut_texts, grouped, meteor=meteor)
    return found


def main(argv: Sequence[str]) -> int:
    """BLEU, METEOR, ROUGE-L and CIDEr of captions against references, on words and on characters."""
    parser = argparse.ArgumentParser(prog="vilg eval caption", description=main.__doc__)
    parser.add_argument("captions", type=Path, help="what `vilg caption` printed, or any table of images and captions")
    parser.add_argument("--references", type=Path, required=True, help="JSONL, CSV, TSV, or COCO's JSON; several an image")
    parser.add_argument("--tokenizer", choices=("ptb", "plain"), default="ptb",
                        help="for texts with spaces: Penn Treebank as COCO's figures (Java), or runs of letters")  # fmt: skip
    parser.add_argument("--no-meteor", action="store_true", help="leave out METEOR, which needs Java")
    parser.add_argument("--subset", action="store_true", help="images with references but without a caption are left out")
    parser.add_argument("--out", type=Path, help="JSON file for the figures and the settings behind them")
    args = parser.parse_args(argv)

    references = _by_image(args.references)
    captions = _matched(_written(args.captions), references, args)
    empty = sum(not caption.strip() for caption in captions.values())
    foreign = [name for name, caption in captions.items() if caption.strip() and not _same_script(caption, references[name])]
    if 2 * len(foreign) > len(captions):
        print(f"warning: {args.captions}: {len(foreign)} of {len(captions)} captions are in another script than all their "
              f"references, the first is that of {foreign[0]}; they match nothing (--language?)", file=sys.stderr)  # fmt: skip
    scores = score_captions(captions, references, ptb=args.tokenizer == "ptb", meteor=not args.no_meteor)
    result = {
        "format_version": FORMAT_VERSION,
        "captions": str(args.captions),
        "references": str(args.references),
        "images": len(captions),
        "empty_captions": empty,
        "captions_in_another_script": len(foreign),
        "images_left_out": len(references) - len(captions),
        "references_per_image": sum(len(references[name]) for name in captions) / len(captions),
        "tokenizer": {"with_spaces": args.tokenizer, "without_spaces": f"jieba {version('jieba')}"},
        "metrics": f"pycocoevalcap {version('pycocoevalcap')}",
        "scores": scores,
    }
    if args.out:
        write_atomically(args.out, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    said = f", {empty} captions are empty and score nothing" if empty else ""
    print(f"{len(captions)} images, {result['references_per_image']:.2f} references each{said}")
    for unit, values in scores.items():
        print(f"on {unit:<11}" + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    return 0


def _by_image(path: Path) -> dict[str, list[str]]:
    """References of each image, one or more."""
    found: dict[str, list[str]] = {}
    for name, captions in read_captions(path, Table()):
        if kept := [caption for caption in captions if caption.strip()]:
            found.setdefault(name, []).extend(kept)
        else:
            raise UserError(f"{path}: {name} has no caption")
    if not found:
        raise UserError(f"{path}: holds no captions")
    return found


def _written(path: Path) -> dict[str, str]:
    """The one caption of each image; a model may have written an empty one."""
    found: dict[str, str] = {}
    for name, captions in read_captions(path, Table()):
        if len(captions) != 1 or name in found:
            count = len(captions) + (name in found)
            raise UserError(f"{path}: {name} has {count or 'no'} captions; one of each image is scored")
        found[name] = captions[0]
    if not found:
        raise UserError(f"{path}: holds no captions")
    return found


def _same_script(caption: str, references: Sequence[str]) -> bool:
    """Whether one reference at least is written as the caption is: with spaces, or in a script without."""
    return has_unspaced(caption) in map(has_unspaced, references)


def _matched(captions: dict[str, str], references: dict[str, list[str]], args: argparse.Namespace) -> dict[str, str]:
    """Captions under the references' image names: the same path, or the only one with the same file name."""
    by_file: dict[str, list[str]] = {}
    for name in references:
        by_file.setdefault(PurePath(name).name, []).append(name)
    found: dict[str, str] = {}
    for name, caption in captions.items():
        same = [name] if name in references else by_file.get(PurePath(name).name, [])
        if len(same) != 1:
            raise UserError(f"{args.captions}: {name} has {len(same) or 'no'} references in {args.references}")
        if same[0] in found:
            raise UserError(f"{args.captions}: two captions for {same[0]} of {args.references}")
        found[same[0]] = caption
    missing = [name for name in references if name not in found]
    if missing and not args.subset:
        raise UserError(
            f"{args.captions}: {len(missing)} of {len(references)} images of {args.references} have no caption, the "
            f"first is {missing[0]}; --subset scores the others alone"
        )
    return found


def _line(tokens: Iterable[str]) -> str:
    return " ".join(tokens) or EMPTY
