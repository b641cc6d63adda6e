"""`vilg generate`, `caption` and `answer` from an export folder, with what users give them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.export_support import write_export
from tests.unit.test_data_similarity import save_clip
from vilg.__main__ import main as vilg
from vilg.data.filters.similarity import ClipScorer
from vilg.inference.load import load_model
from vilg.inference.rerank import clip_scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)


def run(capsys, *argv) -> list[dict]:
    """The lines of JSON that a command that succeeds prints."""
    capsys.readouterr()
    assert vilg([str(a) for a in argv]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def error_of(capsys, *argv) -> str:
    """What a command that fails over a user's mistake says."""
    capsys.readouterr()
    assert vilg([str(a) for a in argv]) == 2
    return capsys.readouterr().err


def test_answers_come_from_the_command_line_or_a_file_in_the_shape_that_eval_vqa_reads(folder, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (16, 16), name == "a" and "red" or "blue").save(tmp_path / "pictures" / f"{name}.png")
    first, second = (tmp_path / "pictures" / f"{name}.png" for name in "ab")
    found = run(capsys, "answer", "--model", folder, first, second, "--question", "a cat", "--question", "猫")
    assert [(line["image"], line["question"]) for line in found] == [
        (str(first), "a cat"), (str(first), "猫"), (str(second), "a cat"), (str(second), "猫")
    ]  # fmt: skip
    asked = [{"image": "pictures/b.png", "question": "猫"}, {"image": "pictures/a.png", "question": "a cat"}]
    (tmp_path / "asked.jsonl").write_text("\ufeff" + "".join(json.dumps(line) + "\n" for line in asked))
    listed = run(capsys, "answer", "--model", folder, "--questions", tmp_path / "asked.jsonl", "--beams", 3)
    assert [{key: line[key] for key in ("image", "question")} for line in listed] == asked
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(line) + "\n" for line in listed))
    references = [line | {"answer": listed[0]["answer"] or "x"} for line in asked]
    (tmp_path / "references.jsonl").write_text("".join(json.dumps(line) + "\n" for line in references))
    assert vilg(["eval", "vqa", str(tmp_path / "given.jsonl"), "--references", str(tmp_path / "references.jsonl")]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{image}"], "give both IMAGE and --question"),
        (["--question", "a cat"], "give both IMAGE and --question"),
        ([], "no question"),
        (["{image}", "--question", " "], "question ' ' is empty"),
        (["{image}", "--question", "a red horse on a blue wall"], "tokens, but the text segment has room for 4"),
        (["{image}", "--question", "cat", "--beams", "0"], "beams=0: must be at least 1"),
        (["--questions", "{image}.none"], "expected a UTF-8 file with one JSON object a line"),
        (["{image}", "--question", "cat", "--beams", "17"], "num_beams=17: must be at least 1 and at most 16"),
        (["{image}", "--question", "cat", "--top-p", "0.5"], "top_p=0.5: limits what is sampled, but temperature=0"),
        (["{image}", "--question", "cat", "--length-penalty", "3"], "length_penalty=3.0: compares the texts of a beam search"),
        (["{image}", "--question", "cat", "--beams", "3", "--top-p", "0.5"], "num_beams=3 and top_p=0.5: beam search does"),
        (["--questions", "{lines}"], "lines.jsonl:2: expected a JSON object with image and question"),
    ],
)
def test_questions_that_cannot_be_asked_are_named(folder, tmp_path, capsys, options, message):
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    (tmp_path / "lines.jsonl").write_text('{"image": "image.png", "question": "cat"}\n{"image": "image.png"}\n')
    given = [option.format(image=tmp_path / "image.png", lines=tmp_path / "lines.jsonl") for option in options]
    assert message in error_of(capsys, "answer", "--model", folder, *given)


def test_long_texts_are_an_error_that_names_the_limit_or_are_cut_on_request(folder, tmp_path, capsys):
    long = "a red horse on a blue wall"
    draw = ["generate", "--model", folder, "--prompt", long, "--num", 1, "--out", tmp_path / "drawn"]
    count = len(load_model(folder).text.encode(long))
    assert f"has {count} tokens, but the text segment has room for 6; shorten it" in error_of(capsys, *draw)
    assert not (tmp_path / "drawn").exists()
    assert vilg([str(a) for a in [*draw, "--truncate"]]) == 0
    ask = ["answer", "--model", folder, tmp_path / "drawn" / "0000_00.png", "--question", long]
    assert f"has {count} tokens, but the text segment has room for 4" in error_of(capsys, *ask)
    assert vilg([str(a) for a in [*ask, "--truncate"]]) == 0
    said = capsys.readouterr()
    line = json.loads(said.out)
    assert line["question"] == long and line["truncated"] is True and long.startswith(line["asked_text"])
    assert "1 of 1 questions cut (--truncate)" in said.err and repr(line["asked_text"]) in said.err


def test_an_empty_prompt_and_characters_that_no_piece_has(folder, tmp_path, capsys):
    draw = ["generate", "--model", folder, "--num", 1, "--out", tmp_path / "drawn", "--prompt"]
    assert "prompt '' is empty; write what the picture should show" in error_of(capsys, *draw, "")
    assert "is empty" in error_of(capsys, *draw, " \t")
    text = load_model(folder).text
    ids = text.encode("🦖")
    assert len(ids) > 1 and 0 not in ids and text.decode(ids) == "🦖"
    assert vilg([str(a) for a in [*draw, "🦖"]]) == 0
    assert Image.open(tmp_path / "drawn" / "0000_00.png").text["prompt"] == "🦖"


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def odd_pictures(pixels: np.ndarray) -> dict[str, bytes]:
    """Files that a user may have, all of one picture 16 wide and 24 high (but for the two that are another size)."""
    picture = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    grey = pixels[..., 0].astype(np.uint16) * 257
    return {
        "plain": encoded(picture),
        "rotated": encoded(picture.transpose(Image.Transpose.ROTATE_90), exif=turned),
        "alpha": encoded(Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]))),
        "palette": encoded(picture.quantize(256)),
        "grey": encoded(Image.fromarray(pixels[..., 0])),
        "sixteen": encoded(Image.fromarray(grey)),
        "cmyk": encoded(picture.convert("CMYK"), "JPEG", quality=95),
        "one": encoded(Image.new("RGB", (1, 1), "red")),
        "wide": encoded(Image.new("RGB", (6000, 40), "red")),
    }


def test_pictures_of_every_kind_are_captioned_and_answered(folder, pixels, tmp_path, capsys):
    files = []
    for name, content in odd_pictures(pixels).items():
        files.append(tmp_path / name)
        files[-1].write_bytes(content)
    captions = {Path(line["image"]).name: line["caption"] for line in run(capsys, "caption", "--model", folder, *files)}
    answers = run(capsys, "answer", "--model", folder, *files, "--question", "a cat")
    answers = {Path(line["image"]).name: line["answer"] for line in answers}
    for found in (captions, answers):
        assert found["rotated"] == found["alpha"] == found["plain"]
        assert found["sixteen"] == found["grey"] and found["one"] == found["wide"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable JPEG, PNG or WebP image of at least one pixel: it is empty"),
        (b"a text, not a picture", "not a readable JPEG, PNG or WebP image of at least one pixel: it begins with b'a text, '"),
        ("GIF", "not a readable JPEG, PNG or WebP image of at least one pixel: it is a GIF\n"),
        ("TIFF", "not a readable JPEG, PNG or WebP image of at least one pixel: it is a TIFF\n"),
        ("BMP", "not a readable JPEG, PNG or WebP image of at least one pixel: it is a BMP\n"),
        ("cut", "not a readable JPEG, PNG or WebP image"),
        ("bomb", "not a readable JPEG, PNG or WebP image of at least one pixel: Image size"),
        (None, "No such file"),
    ],
    ids=["empty", "text", "GIF", "TIFF", "BMP", "cut", "huge", "missing"],
)
def test_what_is_no_picture_is_named_by_caption_and_answer(folder, pixels, tmp_path, capsys, content, message):
    path = tmp_path / "picture.png"
    if content == "cut":
        content = encoded(Image.fromarray(pixels))[:400]
    if content in ("GIF", "TIFF", "BMP"):
        content = encoded(Image.fromarray(pixels), content)
    if content == "bomb":  # 400 megapixels in a few kilobytes
        content = encoded(Image.new("1", (20_000, 20_000)))
    if content is not None:
        path.write_bytes(content)
    for command in (["caption"], ["answer", "--question", "a cat"]):
        said = error_of(capsys, *command, "--model", folder, path)
        assert f"{path}: {message}" in said


def test_a_folder_of_another_format_version_is_refused_by_every_command(tmp_path, capsys):
    folder = write_export(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    for command in (
        ["generate", "--prompt", "a cat", "--out", tmp_path / "out"],
        ["caption", tmp_path / "x.png"],
        ["answer", tmp_path / "x.png", "--question", "a cat"],
    ):
        assert "config.json: format_version 99; this vilg reads" in error_of(capsys, *command, "--model", folder)


def test_writing_can_sample_and_seeds_repeat(folder, tmp_path, capsys):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "x.png")
    command = ["caption", "--model", folder, tmp_path / "x.png", "--temperature", 3, "--top-p", 0.99, "--seed"]
    texts = [run(capsys, *command, seed)[0]["caption"] for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) > 1


def drawn(folder: Path, out: Path, *options) -> list[dict]:
    """scores.jsonl of pictures drawn with these options."""
    assert vilg([str(a) for a in ["generate", "--model", folder, "--out", out, *options]]) == 0
    return [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


def test_pictures_and_scores_say_how_they_came_about_and_the_best_are_kept(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  一只猫 \n", encoding="utf-8")
    options = ["--prompts", tmp_path / "prompts.txt", "--prompt", "red", "--num", 4, "--best", 2, "--seed", 9]
    options += ["--guidance", 3, "--guidance-start", 1, "--top-k", 12]
    lines = drawn(folder, tmp_path / "out", *options)
    assert [line["prompt"] for line in lines[::4]] == ["red", "a cat", "一只猫"]
    for prompt in range(3):
        mine = lines[4 * prompt : 4 * prompt + 4]
        scores = [line["score"] for line in mine]
        assert scores == sorted(scores, reverse=True) and sorted(line["candidate"] for line in mine) == [0, 1, 2, 3]
        assert [line["file"] for line in mine] == [f"{prompt:04d}_00.png", f"{prompt:04d}_01.png", None, None]
    with Image.open(tmp_path / "out" / "0002_01.png") as picture:
        said = picture.text
    wanted = {"prompt": "一只猫", "seed": "9", "guidance": "3.0", "guidance_start": "1.0", "top_k": "12"}
    assert {key: said[key] for key in wanted} == wanted
    assert (said["score"], said["candidate"]) == (str(lines[9]["score"]), str(lines[9]["candidate"]))
    assert said["score_is"] == "log-probability per prompt token"
    bar = capsys.readouterr().err
    assert "12.0/12" in bar and "image/s" in bar


def test_the_same_candidate_comes_out_alone_in_another_batch_and_from_another_file(folder, tmp_path):
    first = drawn(folder, tmp_path / "a", "--prompt", "red", "--prompt", "a cat", "--num", 3)
    second = drawn(folder, tmp_path / "b", "--prompt", "a cat", "--num", 2, "--batch", 1)
    wanted = {line["candidate"]: line["file"] for line in first[3:]}
    for line in second:
        with Image.open(tmp_path / "b" / line["file"]) as one, Image.open(tmp_path / "a" / wanted[line["candidate"]]) as other:
            assert np.array_equal(np.array(one), np.array(other))


def test_a_clip_folder_can_score_instead(folder, tmp_path, capsys):
    save_clip(tmp_path / "clip")
    lines = drawn(folder, tmp_path / "out", "--prompt", "a cat", "--num", 3, "--clip", tmp_path / "clip")
    scores = [line["score"] for line in lines]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3 and max(map(abs, scores)) <= 1
    assert lines[0]["score_is"] == f"cosine by {tmp_path / 'clip'}"
    pictures = [np.array(Image.open(tmp_path / "out" / line["file"])) for line in lines]
    found = clip_scores(ClipScorer(tmp_path / "clip", device="cpu"), ["a cat"], np.stack(pictures)[None], batch=2)
    np.testing.assert_allclose(found[0], scores, atol=1e-5)
    command = ["generate", "--model", folder, "--prompt", "x", "--out", tmp_path / "none", "--clip", tmp_path / "nowhere"]
    assert "nowhere is no folder" in error_of(capsys, *command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "-1"], "guidance=-1.0: must be at least 0 and at most 100; 1 is no guidance"),
        (["--guidance-start", "-0.5"], "guidance_start=-0.5: must be at least 0"),
        (["--top-p", "0"], "top_p=0.0: must be above 0 and at most 1"),
        (["--num", "0"], "--num 0: draw at least one candidate"),
    ],
)
def test_settings_that_cannot_be_drawn_with_are_named_and_nothing_is_written(folder, tmp_path, capsys, options, message):
    command = ["generate", "--model", folder, "--prompt", "a cat", "--out", tmp_path / "out", *options]
    assert message in error_of(capsys, *command)
    assert not (tmp_path / "out").exists()
