"""Caption metrics against pycocoevalcap and sacrebleu; unsegmented Chinese cannot reach them."""

import json
import shutil

import pytest
import sacrebleu

from vilg.__main__ import main as vilg
from vilg.evaluate.captions import score_captions, score_tokens
from vilg.evaluate.segment import characters, words

java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java here: METEOR and the PTB tokenizer need it")

CAPTIONS = {"1.jpg": "A dog isn't running, on the grass.", "2.jpg": "two cats sit on a sofa", "3.jpg": "a red bus"}
REFERENCES = {
    "1.jpg": ["A dog runs on green grass.", "the dog is running on the grass"],
    "2.jpg": ["Two cats are sitting on a sofa", "cats on a couch"],
    "3.jpg": ["a red bus drives down the street", "a bus that is red"],
}
ZH_CAPTIONS = {"1.jpg": "一只狗在草地上奔跑。", "2.jpg": "两只猫坐在沙发上"}
ZH_REFERENCES = {"1.jpg": ["一只狗在绿色的草地上跑", "小狗在草地上奔跑"], "2.jpg": ["两只猫在沙发上坐着", "沙发上有猫"]}


def package(captions, references, cut):
    """The package's own figures on texts that `cut` has split."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    found = {name: [cut(text)] for name, text in captions.items()}
    wanted = {name: [cut(text) for text in texts] for name, texts in references.items()}
    bleu = Bleu(4).compute_score(wanted, found, verbose=0)[0]
    return {f"bleu_{n}": value for n, value in enumerate(bleu, 1)} | {
        "rouge_l": Rouge().compute_score(wanted, found)[0],
        "cider": Cider().compute_score(wanted, found)[0],
    }


@pytest.mark.parametrize("unit, cut", [("words", words), ("characters", characters)])
@pytest.mark.parametrize("captions, references", [(CAPTIONS, REFERENCES), (ZH_CAPTIONS, ZH_REFERENCES)])
def test_figures_are_those_of_the_package_and_of_sacrebleu_on_the_same_tokens(captions, references, unit, cut):
    def one(text):
        [tokens] = cut([text]) if cut is characters else cut([text], ptb=False)
        return " ".join(tokens)

    found = score_captions(captions, references, ptb=False, meteor=False)
    if unit not in found:
        assert captions is CAPTIONS  # with spaces there are only words
        return
    assert found[unit] == pytest.approx(package(captions, references, one), abs=1e-9)
    streams = [[one(texts[i]) for texts in references.values()] for i in range(2)]
    bleu = sacrebleu.corpus_bleu([one(text) for text in captions.values()], streams, tokenize="none", smooth_method="none")
    if bleu.score:
        assert found[unit]["bleu_4"] == pytest.approx(bleu.score / 100, abs=1e-6)
    assert 0.3 < found[unit]["bleu_1"] < 1


def test_chinese_is_cut_whatever_it_is_compared_on():
    scores = score_captions(ZH_CAPTIONS, ZH_REFERENCES, ptb=False, meteor=False)
    assert scores["words"]["bleu_1"] > 0.5 and scores["characters"]["bleu_4"] > 0.2
    assert characters(["两只cat，坐在 Sofa上！"]) == [["两", "只", "cat", "坐", "在", "sofa", "上"]]
    assert words(["两只猫坐在沙发上。", "A cat's sofa."], ptb=False) == [["两只", "猫", "坐在", "沙发", "上"], ["a", "cat", "s", "sofa"]]


def test_a_caption_without_tokens_scores_zero_and_stops_nothing():
    scores = score_tokens([["a", "cat"], []], [[["a", "cat"]], [["a", "dog"]]], meteor=False)
    assert 0 < scores["bleu_1"] < 1 and 0 < scores["rouge_l"] <= 0.5
    with pytest.raises(ValueError, match="none may be empty"):
        score_tokens([["a"]], [[]], meteor=False)


@java
def test_java_reads_chinese_as_chinese_and_no_line_is_lost(monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")  # where Java 17 would make a row of equal question marks of either caption
    assert score_tokens(characters(["两台车"]), [characters(["一只狗"])])["meteor"] == 0
    assert words([CAPTIONS["1.jpg"], "  ", "a bus"], ptb=True) == [
        ["a", "dog", "is", "n't", "running", "on", "the", "grass"], [], ["a", "bus"],
    ]  # fmt: skip


def test_a_chinese_word_is_one_ascii_word_for_meteor_and_english_stays(monkeypatch):
    meteor = pytest.importorskip("pycocoevalcap.meteor.meteor")
    seen = []

    class Noted:
        def compute_score(self, wanted, found):
            seen.append((wanted, found))
            return 0.5, []

    monkeypatch.setattr(meteor, "Meteor", Noted)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    captions, references = [["两只", "猫", "on", "zqaq"], ["猫"], []], [[["两", "猫"], ["cats", "on"]], [["zqbq"]], [["猫", "猫"]]]
    assert score_tokens(captions, references)["meteor"] == 0.5
    [(wanted, found)] = seen
    lines = [line for part in (wanted, found) for each in part.values() for line in each]
    assert all(line.isascii() for line in lines)
    two, cat, *rest = found[0][0].split()
    assert rest == ["on", "zqaq"] and len({two, cat, "zqaq", "zqbq"}) == 4
    assert found[1] == [cat] and found[2] == ["vilgnothing"]
    assert wanted[0][0].split()[1] == cat and wanted[0][0].split()[0] not in (two, cat)
    assert wanted[0][1] == "cats on" and wanted[1] == ["zqbq"] and wanted[2] == [f"{cat} {cat}"]


@java
@pytest.mark.slow  # METEOR reads its tables for seconds at every start
def test_meteor_is_the_packages():
    from pycocoevalcap.meteor.meteor import Meteor

    cut = {name: [" ".join(words([text], ptb=True)[0])] for name, text in CAPTIONS.items()}
    wanted = {name: [" ".join(tokens) for tokens in words(texts, ptb=True)] for name, texts in REFERENCES.items()}
    meteor = score_captions(CAPTIONS, REFERENCES)["words"]["meteor"]
    assert meteor == pytest.approx(Meteor().compute_score(wanted, cut)[0], abs=1e-6)
    characters_figure = score_captions(ZH_CAPTIONS, ZH_REFERENCES)["characters"]["meteor"]
    assert characters_figure > 0.3
    assert score_tokens([["两只", "猫"]], [[["两", "只", "猫"]]])["meteor"] < 0.5  # 1 if it cut the first word


@pytest.fixture
def files(tmp_path):
    """What `vilg caption` prints, and COCO's references."""
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"image": f"pictures/{n}", "caption": c}) + "\n" for n, c in ZH_CAPTIONS.items()))
    coco = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(ZH_REFERENCES)],
        "annotations": [{"image_id": i, "caption": c} for i, texts in enumerate(ZH_REFERENCES.values()) for c in texts],
    }
    references = tmp_path / "references.json"
    references.write_text(json.dumps(coco))
    return captions, references


def test_the_command_matches_files_prints_both_units_and_keeps_the_settings(files, tmp_path, capsys):
    captions, references = files
    out = tmp_path / "scores.json"
    command = ["eval", "caption", str(captions), "--references", str(references), "--no-meteor", "--tokenizer", "plain"]
    assert vilg([*command, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["scores"] == score_captions(ZH_CAPTIONS, ZH_REFERENCES, ptb=False, meteor=False)
    assert result["images"] == 2 and result["references_per_image"] == 2 and "jieba" in result["tokenizer"]["without_spaces"]
    printed = capsys.readouterr().out
    assert "on words" in printed and "on characters" in printed and "bleu_4" in printed


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"image": "9.jpg", "caption": "x"}'], "9.jpg has no references"),
        (['{"image": "1.jpg", "caption": "x"}'], "1 of 2 images"),
        (['{"image": "1.jpg", "caption": []}'], "1.jpg has no captions"),
        (['{"image": "1.jpg", "caption": ["x", "y"]}'], "1.jpg has 2 captions; one of each image is scored"),
        (['{"image": "1.jpg", "caption": "x"}'] * 2, "1.jpg has 2 captions"),
        (['{"image": "%s.jpg", "caption": "x"}' % n for n in "121"], "1.jpg has 2 captions"),
        (['{"image": "a/1.jpg", "caption": "x"}', '{"image": "b/1.jpg", "caption": "x"}'], "two captions for 1.jpg"),
        ([], "holds no captions"),
        (["x"], "no JSON"),
    ],
)
def test_files_that_do_not_fit_are_explained(files, capsys, lines, message):
    captions, references = files
    captions.write_text("\n".join(lines))
    assert vilg(["eval", "caption", str(captions), "--references", str(references), "--no-meteor"]) == 2
    assert message in capsys.readouterr().err


def scored(captions, references, lines, tmp_path) -> dict:
    captions.write_text("".join(json.dumps({"image": name, "caption": text}) + "\n" for name, text in lines.items()))
    command = ["eval", "caption", str(captions), "--references", str(references), "--no-meteor", "--tokenizer", "plain"]
    assert vilg([*command, "--out", str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())


def test_an_empty_caption_of_a_model_counts_as_nothing_said(files, tmp_path, capsys):
    whole = scored(*files, ZH_CAPTIONS, tmp_path)
    assert whole["empty_captions"] == 0 and "empty" not in capsys.readouterr().out
    half = scored(*files, ZH_CAPTIONS | {"2.jpg": " "}, tmp_path)
    assert half["images"] == 2 and half["empty_captions"] == 1
    assert 0 < half["scores"]["words"]["rouge_l"] < whole["scores"]["words"]["rouge_l"]
    assert "1 captions are empty" in capsys.readouterr().out


def test_captions_in_another_script_than_their_references_are_warned_of(files, tmp_path, capsys):
    assert scored(*files, ZH_CAPTIONS, tmp_path)["captions_in_another_script"] == 0
    assert "warning" not in capsys.readouterr().err
    result = scored(*files, {"1.jpg": "a dog on grass", "2.jpg": "two cats"}, tmp_path)
    assert result["captions_in_another_script"] == 2 and result["scores"]["words"]["bleu_1"] < 1e-6
    assert "2 of 2 captions are in another script than all their references, the first is that of 1.jpg" in capsys.readouterr().err


def test_a_missing_file_is_said_to_be_missing(files, capsys):
    captions, references = files
    captions.unlink()
    assert vilg(["eval", "caption", str(captions), "--references", str(references), "--no-meteor"]) == 2
    assert f"{captions}: there is no such file" in capsys.readouterr().err
