"""Sheets set Chinese and English, enlarge without smoothing and never fail on a character they lack."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vilg.demo.glyphs import load_glyphs
from vilg.demo.scenes import BACKGROUNDS, LANGUAGES, SceneConfig, caption_for, make_scene, render
from vilg.errors import UserError
from vilg.pictures.sheet import RIGHT, WRONG, Cell, Picture, Section, grid_sheet, sample_sheet
from vilg.pictures.text import Face

CONFIG = SceneConfig()


@pytest.fixture(scope="module")
def face() -> Face:
    return Face(16)


def cell(index: int, right: bool | None = None) -> Cell:
    scene = make_scene(CONFIG, "seen", index)
    image = render(CONFIG, scene)
    return Cell([Picture(image), Picture(image, label="好"), Picture(image, right=right)], [scene.caption("zh")])


def test_font_has_every_character_of_every_caption(face):
    everything = {
        character
        for language in LANGUAGES
        for glyph in range(len(load_glyphs()))
        for character in caption_for((glyph, 0), glyph % len(BACKGROUNDS), language)
    }
    everything |= {character for background in BACKGROUNDS for character in background.zh + background.en}
    assert not [character for character in sorted(everything) if face.lacks(character)]


def test_lacking_characters_become_boxes_with_their_code_points(face):
    assert face.lacks("魑") and face.lacks("🐎") and not face.lacks("马") and not face.lacks(" ")

    def ink(text: str) -> np.ndarray:
        canvas = Image.new("RGB", (40, 24), (255, 255, 255))
        face.draw(ImageDraw.Draw(canvas), (2, 2), text, (0, 0, 0))
        return np.asarray(canvas)

    assert (ink("魑") < 128).any()
    assert not np.array_equal(ink("魑"), ink("魅"))  # U+9B51 and U+9B45
    assert face.width("魑马") == pytest.approx(2 * face.size)


def test_lines_break_between_words_and_chinese_characters_but_not_before_punctuation(face):
    assert face.wrap("a horse on a white background", 140) == ["a horse on a white", "background"]
    lines = face.wrap("左边是猫，右边是狗，白色背景", 16 * 4)
    assert "".join(lines) == "左边是猫，右边是狗，白色背景"
    assert not any(line.startswith("，") for line in lines)
    cut = face.wrap("word " * 60 + "x" * 400, 100, max_lines=3)
    assert len(cut) == 3 and cut[-1].endswith("…")
    assert all(face.width(line) <= 100 for line in cut)
    assert face.wrap("", 100) == []


def test_sheet_shows_every_picture_enlarged_without_smoothing(tmp_path):
    cells = [cell(index) for index in range(3)]
    path = sample_sheet(
        [Section("Seen 见过", cells[:2], "memorisation", labels=("real", "重建")), Section("Held-out", cells[2:])],
        tmp_path / "new" / "samples.png",
        title="示例",
        scale=2,
    )
    assert [file.name for file in path.parent.iterdir()] == ["samples.png"]
    page = np.asarray(Image.open(path))
    for one in cells:
        enlarged = one.pictures[0].image.repeat(2, axis=0).repeat(2, axis=1)
        corners = np.argwhere((page[:-63, :-63] == enlarged[0, 0]).all(axis=2))
        found = sum(np.array_equal(page[y : y + 64, x : x + 64], enlarged) for y, x in corners)
        assert found == 3


def test_right_and_wrong_are_framed_in_their_colours(tmp_path):
    def has(color, right):
        page = np.asarray(Image.open(sample_sheet([Section("", [cell(0, right)])], tmp_path / "sheet.png")))
        return bool((page == color).all(axis=2).any())

    assert has(RIGHT, True) and not has(WRONG, True)
    assert has(WRONG, False) and not has(RIGHT, False)
    assert not has(RIGHT, None) and not has(WRONG, None)


def test_grid_takes_one_caption_or_several_lines_and_any_characters(tmp_path):
    images = [render(CONFIG, make_scene(CONFIG, "seen", index)) for index in range(3)]
    path = grid_sheet(images, ["白色背景上的马", ("魑魅🐎", "no such character"), ""], tmp_path / "grid.png", title="step 20")
    assert Image.open(path).width > 3 * 32 * 3


def test_the_same_sheet_gives_the_same_bytes(tmp_path):
    first, second = (sample_sheet([Section("x", [cell(1)])], tmp_path / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without a picture"):
        sample_sheet([Section("empty", [])], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\]"):
        grid_sheet([np.zeros((3, 32, 32), dtype=np.float32)], ["x"], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="2 images for 1 captions"):
        grid_sheet([np.zeros((8, 8, 3), dtype=np.uint8)] * 2, ["x"], tmp_path / "sheet.png")
    (tmp_path / "bad.otf").write_text("no font")
    with pytest.raises(UserError, match="bad.otf: cannot be read"):
        grid_sheet([np.zeros((8, 8, 3), dtype=np.uint8)], ["x"], tmp_path / "sheet.png", font=tmp_path / "bad.otf")
