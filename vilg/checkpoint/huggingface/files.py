"""The files and keys that let `transformers` open an export folder: shipped code, `tokenizer.json`, `config.json` keys.

`text.model` (SentencePiece) stays the truth; `tokenizer.json` says the same to the `tokenizers` library.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from vilg.tokens.sequence import BEGIN_OF_TEXT, END_OF_TEXT, PAD, UNKNOWN
from vilg.tokens.text import TextTokenizer

SHIPPED = ("modeling_vilg.py", "pictures_vilg.py")
# `tokenizers` knows no pieces that text cannot spell. A space inside does it: no piece of a text holds one.
_SPECIAL = {UNKNOWN: "<unknown piece>", BEGIN_OF_TEXT: "<begin text>", END_OF_TEXT: "<end text>", PAD: "<text padding>"}
_SPACE = r"\s\x{1c}-\x{1f}\x{85}"
_INVISIBLE = rf"[\p{{Cc}}\p{{Cf}}&&[^{_SPACE}\x{{200c}}\x{{200d}}]]"


def config_keys(sequence: dict[str, Any]) -> dict[str, Any]:
    """What `transformers` reads in config.json beside our own keys."""
    return {
        "model_type": "vilg",
        "architectures": ["VilgForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_vilg.VilgConfig",
            "AutoModelForCausalLM": "modeling_vilg.VilgForCausalLM",
        },
        "bos_token_id": BEGIN_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": PAD,
        "vocab_size": sequence["text_vocab_size"] + sequence["image_vocab_size"] + 1,
    }


def write_files(folder: Path, text: TextTokenizer) -> None:
    """The shipped code and the tokenizer's files."""
    for name in SHIPPED:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(text), ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": _SPECIAL[UNKNOWN],
        "bos_token": _SPECIAL[BEGIN_OF_TEXT],
        "eos_token": _SPECIAL[END_OF_TEXT],
        "pad_token": _SPECIAL[PAD],
        "padding_side": "left",
        "split_special_tokens": True,  # what a user types never yields a special id
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def tokenizer_json(text: TextTokenizer) -> dict[str, Any]:
    """The vocabulary with `normalise` and SentencePiece's rules, in the format of the `tokenizers` library."""
    pieces = [[_SPECIAL.get(i, piece), score] for i, (piece, score) in enumerate(text.scored_pieces())]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

    def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": content, **flags} for i, content in _SPECIAL.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                replaced({"String": "\u2581"}, " "),
                {"type": "NFC"},
                replaced({"Regex": _INVISIBLE}, ""),
                replaced({"Regex": f"[{_SPACE}]+"}, " "),
                {"type": "Strip", "strip_left": True, "strip_right": True},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
                # Or the characters <0xE4> would become the byte piece of that name.
                {"type": "Split", "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"}, "behavior": "Isolated", "invert": False},
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                replaced({"String": "\u2581"}, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {"type": "Unigram", "unk_id": UNKNOWN, "vocab": pieces, "byte_fallback": True},
    }
