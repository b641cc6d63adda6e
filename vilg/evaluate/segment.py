"""Captions cut into tokens, for metrics that compare tokens.

The common metric package splits at spaces, so an unsegmented Chinese caption is one long token there and its score is
zero without a word. Here metrics take token lists, and only these functions make them.
"""

import re
import unicodedata
from collections.abc import Sequence

from vilg.data.filters.captions import chinese
from vilg.errors import UserError

# Scripts written without spaces: Han, kana, Hangul is spaced but compared by syllable in the same figures.
_UNSPACED = "\u1100-\u11ff\u3041-\u30ff\u3131-\u318e\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9d\U00020000-\U000323af"
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_TOKEN = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_])+")

Tokens = list[str]


def has_unspaced(text: str) -> bool:
    """Whether a text holds a character of a script that is written without spaces."""
    return bool(_CHARACTER.search(text))


def characters(texts: Sequence[str]) -> list[Tokens]:
    """Each Han character, kana or Hangul syllable by itself, runs of other letters and digits whole; lower case, width
    folded (NFKC), no punctuation."""
    return [_TOKEN.findall(_folded(text)) for text in texts]


def words(texts: Sequence[str], *, ptb: bool) -> list[Tokens]:
    """Texts with such characters cut by jieba, others by the Penn Treebank tokenizer of the COCO caption challenge (ptb;
    needs Java) or into runs of letters and digits; lower case, no punctuation.

    Raises UserError if ptb and pycocoevalcap or Java is missing.
    """
    cut: list[Tokens] = [[] for _ in texts]
    spaced = [i for i, text in enumerate(texts) if not has_unspaced(text)]
    if ptb and spaced:
        for index, tokens in zip(spaced, _penn_treebank([texts[i] for i in spaced]), strict=True):
            cut[index] = tokens
    for index, text in enumerate(texts):
        if has_unspaced(text):
            cut[index] = [word for word in chinese().cut(_folded(text)) if any(c.isalnum() for c in word)]
        elif not ptb:
            cut[index] = _TOKEN.findall(_folded(text))
    return cut


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _penn_treebank(texts: Sequence[str]) -> list[Tokens]:
    from vilg.evaluate.java import needs_java

    with needs_java("the Penn Treebank tokenizer", instead="--tokenizer plain"):
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        # A text that is all white space would lose its line, and shift those behind it.
        lines = {i: [{"caption": " ".join(text.split()) or "."}] for i, text in enumerate(texts)}
        found = PTBTokenizer().tokenize(lines)
    if len(found) != len(texts):
        raise UserError(f"the Penn Treebank tokenizer returned {len(found)} lines for {len(texts)} captions")
    return [found[i][0].split() for i in range(len(texts))]
