"""`vilg eval vqa`: answers compared with references, exactly, and against always giving the most usual answer.

An answer is right if it equals one of its references after folding: NFKC, lower case, no punctuation, no English article,
one space between words and none between Chinese characters.
"""

import argparse
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vilg.errors import UserError
from vilg.evaluate.segment import has_unspaced
from vilg.tokens.files import write_atomically

FORMAT_VERSION = 1
_ARTICLE = re.compile(r"\b(a|an|the)\b")
Key = tuple[str, str]  # image, question


@dataclass(frozen=True)
class Accuracy:
    """right of total answers; majority: as many are right when each question gets its most usual reference."""

    right: int
    total: int
    majority: int

    def to_dict(self) -> dict[str, float]:
        return {"accuracy": self.right / self.total, "majority": self.majority / self.total, "answers": self.total}


def folded(answer: str) -> str:
    """What is compared: see above."""
    text = unicodedata.normalize("NFKC", answer).lower()
    text = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    if has_unspaced(text):
        return "".join(text.split())
    return " ".join(_ARTICLE.sub(" ", text).split())


def score_answers(answers: dict[Key, str], references: dict[Key, list[str]]) -> tuple[Accuracy, dict[str, Accuracy]]:
    """All answers together, and by question. Every answered key needs references.

    The most usual answer of a question is counted over these references, which favours the baseline.
    """
    usual: dict[str, Counter[str]] = {}
    for (_, question), texts in references.items():
        usual.setdefault(question, Counter()).update(folded(text) for text in texts)
    best = {question: counts.most_common(1)[0][0] for question, counts in usual.items()}
    tallies: dict[str, list[int]] = {}
    for key, answer in answers.items():
        right = {folded(text) for text in references[key]}
        tally = tallies.setdefault(key[1], [0, 0, 0])
        for place, hit in enumerate((folded(answer) in right, True, best[key[1]] in right)):
            tally[place] += hit
    by_question = {question: Accuracy(*tally) for question, tally in tallies.items()}
    return Accuracy(*(sum(column) for column in zip(*tallies.values(), strict=True))), by_question


def main(argv: Sequence[str]) -> int:
    """Exact-match accuracy of answers to questions about images."""
    parser = argparse.ArgumentParser(prog="vilg eval vqa", description=main.__doc__)
    parser.add_argument("answers", type=Path, help="JSONL of image, question, answer")
    parser.add_argument("--references", type=Path, required=True, help="JSONL of image, question, answer or answers (a list)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    references = _read(args.references)
    given = _read(args.answers)
    for key, texts in given.items():
        if key not in references:
            raise UserError(f"{args.answers}: {key[0]}, {key[1]!r} has no reference in {args.references}")
        if len(texts) > 1:
            raise UserError(f"{args.answers}: {key[0]}, {key[1]!r} has {len(texts)} answers")
    missing = [key for key in references if key not in given]
    if missing:
        raise UserError(f"{args.answers}: {len(missing)} of {len(references)} questions are not answered, first {missing[0]}")
    total, by_question = score_answers({key: texts[0] for key, texts in given.items()}, references)
    result = {
        "format_version": FORMAT_VERSION,
        **total.to_dict(),
        "questions": {question: accuracy.to_dict() for question, accuracy in by_question.items()},
        "folding": "NFKC, lower case, no punctuation, no English article",
    }
    if args.out:
        write_atomically(args.out, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"exact match {total.right / total.total:.4f}, most usual answer {total.majority / total.total:.4f} ({total.total} answers)")
    return 0


def _read(path: Path) -> dict[Key, list[str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    found: dict[Key, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            texts = entry["answers"] if "answers" in entry else [entry["answer"]]
            key = (entry["image"], entry["question"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: expected image, question and answer ({error!r})") from None
        if not texts or not all(isinstance(text, str) for text in (*key, *texts)):
            raise UserError(f"{path}:{number}: image, question and answers should be texts")
        found.setdefault(key, []).extend(texts)
    if not found:
        raise UserError(f"{path}: holds no answers")
    return found
