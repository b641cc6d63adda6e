"""Captions: language, words, nouns, special characters.

Chinese is cut and tagged by jieba (MIT; imported when the first Chinese caption comes). Everything else goes by light
rules, made for captions of a few words.
"""

import logging
import re
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\uff66-\uff9d]")
_HANGUL = re.compile(r"[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_NOUN_TAGS = ("n", "vn")  # jieba's: n nouns, nr ns nt nz names, vn verbs used as nouns

# English words that are no nouns and stand in captions: closed classes, and the most usual open ones.
_NO_NOUNS = frozenset(
    """
    a an the this that these those my your his her its our their some any no every each all both few many much more
    most several other another such what which who whom whose i you he she it we they me him us them myself yourself
    himself herself itself ourselves themselves mine yours hers ours theirs somebody anybody nobody everybody something
    anything nothing everything one two three four five six seven eight nine ten first second third last next
    and or but nor so yet for if because although though while when where why how than as whether until unless since
    of in on at by with from to into onto over under above below between among through during before after about
    against around across along behind beside beyond inside outside near off out up down without within upon toward
    towards per via like
    am is are was were be been being do does did doing done have has had having can could will would shall should may
    might must not don't isn't aren't wasn't
    very too also just only even still again always never often here there then now soon once quite rather really
    get got go goes going gone come comes coming make makes made making take takes taken taking see sees seen look
    looks looking click read buy
    good new old big small large little long short great best nice beautiful cute happy red green blue yellow black
    white brown pink orange purple grey gray high low free
    """.split()
)


@dataclass(frozen=True)
class Tagger:
    """Chinese words. cut: text -> words; noun: text -> whether one of its words is a noun."""

    cut: Callable[[str], list[str]]
    noun: Callable[[str], bool]


def language(caption: str) -> str:
    """The script of a caption as a language: zh, en, ja, ko or other (what `vilg.config.ingest.Language` lists).

    zh: one letter in four is Han, and no kana; ja: any kana beside them; ko: one in four is Hangul; en: nine in ten are
    plain Latin letters, so Spanish without accents counts as en.
    """
    letters = [c for c in caption if c.isalpha()]
    if not letters:
        return "other"
    han, kana, hangul = (len(script.findall(caption)) for script in (_HAN, _KANA, _HANGUL))
    if 4 * (han + kana) >= len(letters):
        return "ja" if kana else "zh"
    if 4 * hangul >= len(letters):
        return "ko"
    return "en" if 10 * sum(c.isascii() for c in letters) >= 9 * len(letters) else "other"


def count_words(caption: str) -> int:
    """Words of a caption: jieba's where there is a Han character, else runs of letters and digits."""
    words = chinese().cut(caption) if _HAN.search(caption) else _WORD.findall(caption)
    return sum(any(c.isalnum() for c in word) for word in words)


def has_noun(caption: str) -> bool:
    """Whether a caption holds a noun. Without Han characters: a word of two letters or more that is none of a list of
    words that are no nouns and does not end in -ly; verbs and adjectives beyond the list pass for nouns."""
    if _HAN.search(caption):
        return chinese().noun(caption)
    return any(_may_be_noun(word) for word in _WORD.findall(caption.lower().replace("’", "'")))


def _may_be_noun(word: str) -> bool:
    letters = word.replace("'", "").replace("-", "")
    return len(word) > 1 and letters.isalpha() and word not in _NO_NOUNS and not word.endswith("ly")


def special_characters(caption: str, allowed: str) -> str:
    """The characters of a caption that are neither letter, digit nor mark of any script nor in `allowed`, each once."""
    special = (c for c in caption if c not in allowed and unicodedata.category(c)[0] not in "LMN")
    return "".join(dict.fromkeys(special))


@cache
def chinese() -> Tagger:
    """jieba, silent, with its own dictionary (a second to load)."""
    import jieba
    import jieba.posseg

    jieba.setLogLevel(logging.ERROR)
    # jieba caches its dictionary as marshal data under a fixed name in /tmp, where anybody might have put one.
    with tempfile.TemporaryDirectory() as private:
        words: Any = jieba.Tokenizer()
        words.tmp_dir = private
        words.initialize()
    tags: Any = jieba.posseg.POSTokenizer(words)
    known = tags.word_tag_tab

    def noun(text: str) -> bool:
        # A look-up decides nearly always; the tagger is twenty times slower and needed for words it does not know.
        if any(known.get(word, "").startswith(_NOUN_TAGS) for word in words.lcut(text)):
            return True
        return any(
            pair.flag.startswith(_NOUN_TAGS) or (pair.flag == "eng" and has_noun(pair.word)) for pair in tags.cut(text)
        )

    return Tagger(words.lcut, noun)
