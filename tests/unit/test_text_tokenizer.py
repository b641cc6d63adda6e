"""The text vocabulary: round trips, special ids, reproducible training, and what a user may do wrong."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import sentencepiece
import torch

from vilg.errors import UserError
from vilg.tokens import text as text_tokens
from vilg.tokens.text import TextTokenizer, normalise, read_captions, train_text_tokenizer

ANIMALS = {"马": "horse", "大象": "elephant", "乌龟": "turtle", "蝴蝶": "butterfly", "章鱼": "octopus", "狐狸": "fox"}
COLORS = {"白色": "white", "红色": "red", "蓝色": "blue", "绿色": "green"}
CAPTIONS = [
    caption
    for zh, en in ANIMALS.items()
    for color_zh, color_en in COLORS.items()
    for caption in (f"{color_zh}背景上的{zh}", f"a {en} on a {color_en} background")
]
HOSTILE = [
    "<s></s><pad><unk><0x41> <0xE4>",
    "，。！？「」",
    "①Ⅷｆｕｌｌ　ｗｉｄｔｈ",
    "👨\u200d👩\u200d👧 ☂\ufe0f",
    "日本語と한국어",
    "\U0010ffff\ufdd0",
    "007 2026",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.model"
    train_text_tokenizer(CAPTIONS, path, vocab_size=800)
    return TextTokenizer.load(path)


@pytest.mark.parametrize("text", [*CAPTIONS[:4], *HOSTILE])
def test_decode_inverts_encode_up_to_normalisation(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == normalise(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_user_text_never_yields_special_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids and min(ids) >= text_tokens.NUM_SPECIAL and max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("text", ["", "  ", "\u3000\n\t", "\x00\u200b", "\ud800"])
def test_text_without_characters_gives_no_tokens(tokenizer, text):
    assert tokenizer.encode(text) == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("  two\t\n words ", "two words"),
        ("全角　空格", "全角 空格"),
        ("，。！「」", "，。！「」"),
        ("e\u0301", "\u00e9"),
        ("a\u2581b", "a b"),
        ("bell\x07 soft\u00adhyphen \ufeffmark\u202e", "bell softhyphen mark"),
        ("\u200d", "\u200d"),
        ("bad\udc80pair", "badpair"),
    ],
)
def test_normalise(text, wanted):
    assert normalise(text) == wanted
    assert normalise(wanted) == wanted


def test_words_of_a_small_corpus_are_whole_pieces(tokenizer):
    assert len(tokenizer.encode("a horse on a white background")) == 6


def test_decode_passes_over_special_ids_and_takes_tensors(tokenizer):
    ids = tokenizer.encode("白色背景上的马")
    assert tokenizer.decode(torch.tensor([1, *ids, 2, 3, 3, 0])) == "白色背景上的马"
    assert tokenizer.decode(np.array(ids, np.uint16)) == "白色背景上的马"


def test_pieces_spell_the_text(tokenizer):
    ids = tokenizer.encode("a horse")
    assert "".join(tokenizer.piece(i) for i in ids) == "\u2581a\u2581horse"
    assert not any(tokenizer.is_byte(i) for i in ids)
    assert all(tokenizer.is_byte(i) for i in tokenizer.encode("한")[1:])  # the first is the space before every text


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_decode_refuses_ids_outside_the_vocabulary(tokenizer, bad):
    with pytest.raises(ValueError, match=f"{bad} is outside the vocabulary"):
        tokenizer.decode([5, bad])


def test_same_captions_give_same_bytes(tokenizer, tmp_path):
    again = train_text_tokenizer(iter(CAPTIONS), tmp_path / "elsewhere" / "other.model", vocab_size=800)
    assert again.hash == tokenizer.hash
    assert (tmp_path / "elsewhere" / "other.model").read_bytes() == tokenizer.path.read_bytes()


def test_a_larger_corpus_is_sampled_reproducibly_and_from_everywhere():
    numbers = [str(i) for i in range(5000)]
    sample = text_tokens._seeded_sample(numbers, 500, seed=3)
    assert (
        sample == text_tokens._seeded_sample(numbers, 500, seed=3) != text_tokens._seeded_sample(numbers, 500, seed=4)
    )
    assert len(set(sample)) == 500
    assert 2200 < np.mean([int(i) for i in sample]) < 2800


def test_pickled_tokenizer_is_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.hash, copy.vocab_size, copy.path) == (tokenizer.hash, tokenizer.vocab_size, tokenizer.path)
    assert copy.encode(CAPTIONS[0]) == tokenizer.encode(CAPTIONS[0])


def test_saved_copy_has_the_same_bytes(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy.model")
    assert TextTokenizer.load(tmp_path / "copy.model").hash == tokenizer.hash


def test_statistics_count_the_tokens_of_the_captions(tokenizer, tmp_path):
    captions = ["horse", "horse horse horse", "  "]
    statistics = train_text_tokenizer(captions, tmp_path / "t.model", vocab_size=600)
    lengths = [len(TextTokenizer.load(tmp_path / "t.model").encode(c)) for c in captions[:2]]
    assert (statistics.num_captions, statistics.max_tokens, statistics.mean_tokens) == (
        2,
        max(lengths),
        np.mean(lengths),
    )
    assert json.loads((tmp_path / "t.json").read_text())["hash"] == statistics.hash
    assert statistics.byte_share == 0
    assert tokenizer.byte_share(tokenizer.encode("한국어")) > 0.8


def test_rare_characters_are_spelt_in_bytes_under_lower_coverage(tmp_path):
    captions = ["a horse on a white background"] * 200 + ["龘"]
    statistics = train_text_tokenizer(captions, tmp_path / "t.model", vocab_size=600, character_coverage=0.999)
    assert 0 < statistics.byte_share < 0.01
    tokenizer = TextTokenizer.load(tmp_path / "t.model")
    assert tokenizer.decode(tokenizer.encode("龘")) == "龘"


@pytest.mark.parametrize(
    "captions, options, message",
    [
        ([], {}, "no captions"),
        (["  ", "\x00"], {}, "no captions"),
        (CAPTIONS, {"vocab_size": 280}, "raise --vocab-size"),
        (CAPTIONS, {"character_coverage": 0.5}, "outside 0.98..1"),
    ],
)
def test_training_refuses(captions, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_text_tokenizer(captions, tmp_path / "t.model", **{"vocab_size": 800, **options})
    assert not list(tmp_path.iterdir())


def test_load_refuses_a_missing_file_and_other_content(tmp_path):
    with pytest.raises(UserError, match="absent.model: cannot read"):
        TextTokenizer.load(tmp_path / "absent.model")
    (tmp_path / "junk.model").write_bytes(b"junk" * 100)
    with pytest.raises(UserError, match="junk.model: not a SentencePiece model"):
        TextTokenizer.load(tmp_path / "junk.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(UserError, match="empty.model: not a SentencePiece model"):
        TextTokenizer.load(tmp_path / "empty.model")


@pytest.mark.parametrize("settings, message", [({}, "ids of unknown"), ({"pad_id": 3}, "no byte pieces")])
def test_load_refuses_models_trained_otherwise(settings, message, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    (tmp_path / "other.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=message):
        TextTokenizer.load(tmp_path / "other.model")


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_captions_are_read_from_shards_and_from_lines(tmp_path):
    shards = tmp_path / "raw"
    shards.mkdir()
    write_shard(shards / "00001.tar", [("2.txt", "第二".encode()), ("2.json", b"{}"), ("3.jpg", b"no caption")])
    write_shard(shards / "00000.tar", [("0.png", b""), ("0.txt", b"first"), ("1.txt", b"")])
    assert list(read_captions(shards)) == ["first", "", "第二"]
    assert list(read_captions(shards / "00001.tar")) == ["第二"]
    (tmp_path / "lines.txt").write_bytes("\ufeffone\r\n二\n".encode())
    assert [normalise(line) for line in read_captions(tmp_path / "lines.txt")] == ["one", "二"]


def test_bad_captions_are_named(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"lines.txt:2: not UTF-8"):
        list(read_captions(tmp_path / "lines.txt"))
    write_shard(tmp_path / "0.tar", [("a.txt", b"\xff")])
    with pytest.raises(UserError, match=r"0.tar: a.txt is not UTF-8"):
        list(read_captions(tmp_path))
    with pytest.raises(UserError, match="absent"):
        list(read_captions(tmp_path / "absent"))


def test_command_writes_the_model_and_says_how_many_slots_are_needed(tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    out = tmp_path / "text.model"
    arguments = ["--captions", str(tmp_path / "captions.txt"), "--vocab-size", "500", "--out", str(out)]
    assert text_tokens.main(arguments) == 0
    longest = json.loads(out.with_suffix(".json").read_text())["max_tokens"]
    assert f"tokens.text_slots >= {longest + 1}" in capsys.readouterr().out
    assert TextTokenizer.load(out).encode(CAPTIONS[0])
