"""`vilg generate` writes as it goes, goes on where it was stopped, and keeps out of other runs' folders."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.export_support import write_export
from vilg.__main__ import main as vilg
from vilg.evaluate.fid import pictures_in
from vilg.inference import decode, draw_command, drawn_folder, likelihood

PROMPTS = ["a cat", "一只猫", "red", "a wall", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"))


def draw(folder: Path, out: Path, *options, prompts=PROMPTS) -> int:
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    given = ["generate", "--model", folder, "--num", 2, "--best", 1, "--batch", 4, "--device", "cpu", "--out", out]
    return vilg([str(part) for part in [*given, *asked, *options]])


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.parametrize("stopped_at", [1, 2, 3])  # in the midst of two prompts, between them, behind them
def test_a_run_that_is_stopped_leaves_what_it_finished_and_goes_on_to_the_same_files(
    folder, tmp_path, monkeypatch, capsys, stopped_at
):
    assert draw(folder, tmp_path / "whole") == 0
    add = drawn_folder.DrawnFolder.add

    def dies(self, row, *rest):
        if row == stopped_at:
            raise KeyboardInterrupt
        add(self, row, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(drawn_folder.DrawnFolder, "add", dies)
        assert draw(folder, tmp_path / "out") != 0
    lines = (tmp_path / "out" / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [p for p in PROMPTS[:stopped_at] for _ in range(2)]
    with open(tmp_path / "out" / "scores.jsonl", "a") as file:
        file.write('{"prompt": "half a li')
    drawn = []
    original = draw_command.draw_images

    def noted(bundle, part, **how):
        drawn.append(part)
        return original(bundle, part, **how)

    monkeypatch.setattr(draw_command, "draw_images", noted)
    capsys.readouterr()
    assert draw(folder, tmp_path / "out") == 0
    begun = stopped_at // 2 * 2  # two prompts a batch, which are drawn together as before
    assert drawn == [PROMPTS[start : start + 2] for start in range(begun, 5, 2)]
    said = capsys.readouterr().err
    assert (f"{begun} of 5 prompts were drawn before" in said) == (begun > 0) and "10.0/10" in said
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert draw(folder, tmp_path / "out") == 0 and len(drawn) == len(range(begun, 5, 2))  # nothing is left to draw
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "prompts", "named"),
    [
        (["--guidance", "2"], PROMPTS, "guidance 1.0 there, 2.0 now"),
        (["--seed", "1"], PROMPTS, "seed 0 there, 1 now"),
        (["--best", "2"], PROMPTS, "keep 1 there, 2 now"),
        ([], PROMPTS[:2], "prompts 5 there, 2 now"),
        ([], [*PROMPTS[:4], "wall"], "prompts_hash"),
    ],
)
def test_a_folder_with_another_runs_results_is_refused_until_they_may_go(
    folder, tmp_path, capsys, monkeypatch, options, prompts, named
):
    out = tmp_path / "out"
    assert draw(folder, out) == 0
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(draw_command, "opened", None)  # it is said before the model is read
        assert draw(folder, out, *options, prompts=prompts) == 2
    said = capsys.readouterr().err
    assert f"--out {out}: holds another run's results ({named}" in said and "another folder, or say --overwrite" in said
    assert contents(out) == before
    assert draw(folder, out, *options, "--overwrite", prompts=prompts) == 0
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [path.name for path in pictures_in(out)] == sorted(line["file"] for line in lines if line["file"])


def test_results_of_another_model_or_without_settings_and_pictures_of_others_are_not_mixed_in(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert draw(folder, out) == 0
    (tmp_path / "other").mkdir()
    assert draw(write_export(tmp_path / "other"), out) == 2 and "model_files" in capsys.readouterr().err
    (out / "settings.json").write_text("{")
    assert draw(folder, out) == 2 and "settings.json cannot be read" in capsys.readouterr().err
    (out / "settings.json").unlink()
    assert draw(folder, out) == 2 and "holds an earlier run's results" in capsys.readouterr().err
    (out / "holiday.jpg").touch()
    assert draw(folder, out, "--overwrite") == 2
    assert "holds pictures that `vilg generate` did not draw (holiday.jpg)" in capsys.readouterr().err
    assert (out / "0000_00.png").exists()
    (out / "holiday.jpg").rename(out / "notes.txt")
    assert draw(folder, out, "--overwrite") == 0 and (out / "notes.txt").exists()


def test_a_folder_that_cannot_be_made_is_said_before_the_model_is_read(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(draw_command, "opened", None)
    assert draw(folder, tmp_path / "file" / "x") == 2
    assert f"--out {tmp_path / 'file' / 'x'}: cannot make this folder (Not a directory)" in capsys.readouterr().err


def test_the_grid_holds_the_first_prompts_and_a_line_says_so(folder, tmp_path, capsys, monkeypatch):
    pages, original = [], drawn_folder.sample_sheet

    def noted(sections, path):
        pages.append([[len(cell.pictures), *cell.captions] for cell in sections[0].cells])
        return original(sections, path)

    monkeypatch.setattr(drawn_folder, "sample_sheet", noted)
    assert draw(folder, tmp_path / "all") == 0
    assert "(the first" not in capsys.readouterr().out
    monkeypatch.setattr(drawn_folder, "GRID_PICTURES", 2)
    assert draw(folder, tmp_path / "few") == 0
    assert "grid.png (the first 2 prompts)" in capsys.readouterr().out
    assert pages == [[[1, prompt] for prompt in PROMPTS], [[1, prompt] for prompt in PROMPTS[:2]]]
    assert draw(folder, tmp_path / "many", "--num", 3, "--best", 3, prompts=PROMPTS[:1]) == 0
    assert "(the best 2 of each)" in capsys.readouterr().out


def test_no_more_than_a_batch_is_judged_and_decoded_together(folder, tmp_path, monkeypatch):
    sizes = {"judged": [], "decoded": []}
    original, pixels = likelihood.collate, decode.Bundle.decode_images

    def collate(samples):
        sizes["judged"].append(len(samples))
        return original(samples)

    def decode_images(self, codes, *, batch=64):
        sizes["decoded"].append(batch)
        return pixels(self, codes, batch=batch)

    monkeypatch.setattr(likelihood, "collate", collate)
    monkeypatch.setattr(decode.Bundle, "decode_images", decode_images)
    assert draw(folder, tmp_path / "out", "--num", 5, "--best", 0, "--batch", 3, prompts=PROMPTS[:2]) == 0
    assert sizes == {"judged": [3, 2, 3, 2], "decoded": [3, 3]}


def test_a_cut_prompt_is_noted_and_files_say_what_was_drawn(folder, tmp_path, capsys):
    long = "a red horse on a blue wall"
    assert draw(folder, tmp_path / "out", "--truncate", prompts=["a cat", long]) == 0
    said = capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "truncated" not in lines[0] and lines[2]["truncated"] is True and lines[2]["prompt"] == long
    assert long.startswith(lines[2]["drawn_text"]) and len(lines[2]["drawn_text"]) < len(long)
    assert "1 of 2 prompts cut (--truncate); the first from " in said and repr(lines[2]["drawn_text"]) in said
    with Image.open(tmp_path / "out" / "0001_00.png") as picture:
        assert picture.text["drawn_text"] == lines[2]["drawn_text"] and picture.text["truncated"] == "True"


def test_a_prompt_that_is_too_long_is_said_before_the_model_is_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(draw_command, "opened", None)
    assert draw(folder, tmp_path / "out", prompts=["a red horse on a blue wall"]) == 2
    said = capsys.readouterr().err
    assert "the text segment has room for 6; shorten it, or have it cut: --truncate" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "inf"], "guidance=inf: must be at least 0 and at most 100"),
        (["--guidance", "nan"], "guidance=nan: must be"),
        (["--guidance", "1e308"], "guidance=1e+308: must be"),
        (["--guidance-start", "1e39"], "guidance_start=1e+39: must be"),
        (["--temperature", "1e-320"], "must be 0 (greedy), or at least 0.001 and at most 1000"),
        (["--temperature", "inf"], "temperature=inf: must be 0 (greedy)"),
        (["--top-p", "nan"], "top_p=nan: must be above 0"),
        (["--temperature", "0", "--top-k", "5"], "top_k=5: limits what is sampled, but temperature=0 is greedy"),
        (["--clip", "nowhere"], "--clip: nowhere is no folder"),
        (["--device", "meta"], "--device meta: cannot be used here"),
    ],
)
def test_values_that_would_draw_junk_are_named_and_nothing_is_written(folder, tmp_path, capsys, options, message):
    assert draw(folder, tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "out").exists()


def test_a_prompt_file_may_begin_with_the_mark_of_windows_editors(folder, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\n".encode())
    assert draw(folder, tmp_path / "out", "--prompts", tmp_path / "prompts.txt", prompts=[]) == 0
    assert json.loads((tmp_path / "out" / "scores.jsonl").read_text().splitlines()[0])["prompt"] == "a cat"
