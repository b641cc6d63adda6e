"""Exact match of answers against a majority; similarity of drawn pictures to their prompts with a stand-in scorer."""

import json

import numpy as np
import pytest
from PIL import Image

from vilg.__main__ import main as vilg
from vilg.errors import UserError
from vilg.evaluate import clip
from vilg.evaluate.vqa import folded, score_answers


@pytest.mark.parametrize("given", ["A cat.", "the  CAT", "ｃａｔ"])
def test_folding_takes_away_what_does_not_matter(given):
    assert folded(given) == "cat"
    assert folded("红 色。") == "红色" and folded("red") != folded("bred")


def test_accuracy_stands_beside_the_most_usual_answer():
    references = {(str(i), "colour?"): ["red" if i < 3 else "blue"] for i in range(4)} | {("0", "left?"): ["猫", "小猫"]}
    answers = {key: "Blue!" for key in references} | {("0", "left?"): "小猫。"}
    total, by_question = score_answers(answers, references)
    assert (total.right, total.total, total.majority) == (2, 5, 4)
    assert by_question["colour?"].to_dict() == {"accuracy": 0.25, "majority": 0.75, "answers": 4}


def lines(path, entries):
    path.write_text("\ufeff" + "".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_the_command_wants_every_question_answered_once(tmp_path, capsys):
    asked = [{"image": "1", "question": "?", "answers": ["yes", "yeah"]}, {"image": "2", "question": "?", "answer": "no"}]
    references = lines(tmp_path / "references", asked)
    given = [{"image": i, "question": "?", "answer": "yes"} for i in "12"]
    command = ["eval", "vqa", lines(tmp_path / "answers", given), "--references", references]
    assert vilg([*command, "--out", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["accuracy"] == 0.5
    for wrong, message in (
        (given[:1], "1 of 2 questions are not answered"),
        ([*given, given[0]], "has 2 answers"),
        ([*given, {"image": "3", "question": "?", "answer": "x"}], "has no reference"),
        ([{"image": 1}], "answers:1: expected image, question and answer"),
        ([], "holds no answers"),
    ):
        lines(tmp_path / "answers", wrong)
        assert vilg(command) == 2 and message in capsys.readouterr().err


class Brightness:
    """A scorer that likes bright pictures for "bright"."""

    image_size = 8

    def score(self, images, captions):
        sign = np.array([1 if caption == "bright" else -1 for caption in captions])
        return (sign * images.mean((1, 2, 3)) / 255).astype(np.float32)


def test_pictures_meet_their_own_prompts(tmp_path):
    values = [("bright", 255), ("bright", 51), ("dark", 0)]
    for index, (_, value) in enumerate(values):
        Image.new("RGB", (10, 8), (value,) * 3).save(tmp_path / f"{index}.png")
    entries = [{"file": f"{i}.png", "prompt": prompt} for i, (prompt, _) in enumerate(values)]
    lines(tmp_path / "scores.jsonl", [*entries, {"file": None, "prompt": "bright"}])
    pairs = clip.drawn_pictures(tmp_path)
    assert clip.similarities(Brightness(), pairs, batch=2) == pytest.approx([1, 0.2, 0])
    lines(tmp_path / "scores.jsonl", [{"file": "x"}])
    with pytest.raises(UserError, match="scores.jsonl:1"):
        clip.drawn_pictures(tmp_path)


def test_a_folder_that_is_no_clip_model_is_named_with_its_option(tmp_path, capsys):
    lines(tmp_path / "scores.jsonl", [{"file": "x.png", "prompt": "x"}])
    assert vilg(["eval", "clip", str(tmp_path), "--clip", "nowhere", "--device", "cpu"]) == 2
    assert "--clip: nowhere is no folder" in capsys.readouterr().err
