"""Rating sheets: what raters see and must not see, and a tally against values worked out by hand."""

import asyncio
import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.browser import chromium_page, find_chromium, needs_chromium
from vilg.__main__ import main as vilg
from vilg.evaluate.rating.agreement import equal_pairs, krippendorff_alpha, mean_interval
from vilg.evaluate.rating.kinds import KINDS
from vilg.evaluate.rating.tally import tally
from vilg.inference.pictures import png_bytes

PROMPTS = {"a cat": "animals", "一匹马": "animals", "red & <blue>": None}


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def drawn(folder, value: int, prompts=PROMPTS):
    """A folder as `vilg generate` leaves it: two kept pictures a prompt, and one that was not kept."""
    folder.mkdir()
    lines = []
    for row, prompt in enumerate(prompts):
        for rank in range(3):
            name = f"{row:04d}_{rank:02d}.png" if rank < 2 else None
            if name:
                image = np.full((8, 8, 3), value + 10 * row + rank, np.uint8)
                (folder / name).write_bytes(png_bytes(image, {"prompt": prompt, "model": folder.name}))
            lines.append({"prompt": prompt, "file": name})
    write_lines(folder / "scores.jsonl", lines)
    return folder


@pytest.fixture
def sheets(tmp_path):
    """Two systems, two raters, one prompt of three without a category."""
    ours, theirs = drawn(tmp_path / "ours", 0), drawn(tmp_path / "theirs", 100)
    items = write_lines(tmp_path / "items.jsonl", [{"prompt": p, "category": c} for p, c in PROMPTS.items()])
    command = ["eval", "rating-sheet", "pictures", "--system", f"ours={ours}", "--system", f"theirs={theirs}"]
    assert vilg([*command, "--items", str(items), "--raters", "2", "--seed", "4", "--out", str(tmp_path / "sheets")]) == 0
    return tmp_path / "sheets"


def data_of(page) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_raters_see_the_same_items_in_other_orders_and_nothing_that_names_a_system(sheets):
    key = json.loads((sheets / "key.json").read_text(encoding="utf-8"))
    one, two = (data_of(sheets / f"sheet_{n}.html") for n in (1, 2))
    ids = [[item["id"] for item in page["items"]] for page in (one, two)]
    assert ids[0] != ids[1] and sorted(ids[0]) == sorted(ids[1]) == sorted(key["items"]) and len(ids[0]) == 6
    assert key["kind"] == "pictures" and one["sheet"] == two["sheet"] == key["sheet"]
    for entry in key["items"].values():
        assert entry["category"] == PROMPTS[entry["prompt"]]
    for page in sheets.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "ours" not in text.replace("yours", "") and "theirs" not in text and "http" not in text


def test_the_best_picture_of_each_prompt_is_shown_without_metadata(sheets):
    key, page = json.loads((sheets / "key.json").read_text(encoding="utf-8")), data_of(sheets / "sheet_1.html")
    for item in page["items"]:
        about = key["items"][item["id"]]
        with Image.open(io.BytesIO(base64.b64decode(page["pictures"][item["picture"]].partition(",")[2]))) as image:
            expected = 100 * (about["system"] == "theirs") + 10 * list(PROMPTS).index(about["prompt"])
            assert np.asarray(image.convert("RGB")).tolist() == np.full((8, 8, 3), expected).tolist()
            assert not image.info.get("exif") and "prompt" not in image.info
        assert item["texts"] == [["prompt", about["prompt"]]]


def test_the_same_seed_writes_the_same_sheets_and_pictures_can_lie_beside(sheets, tmp_path):
    base = ["eval", "rating-sheet", "pictures", "--system", f"ours={tmp_path / 'ours'}", "--system", f"theirs={tmp_path / 'theirs'}"]
    base += ["--items", str(tmp_path / "items.jsonl")]
    assert vilg([*base, "--seed", "4", "--beside", "--out", str(tmp_path / "again")]) == 0
    again, first = data_of(tmp_path / "again" / "sheet_1.html"), data_of(sheets / "sheet_1.html")
    assert again["items"] == first["items"] and again["pictures"] == {}
    assert {path.stem for path in (tmp_path / "again" / "pictures").iterdir()} == set(first["pictures"])
    assert vilg([*base, "--seed", "5", "--out", str(tmp_path / "other")]) == 0
    assert not {i["id"] for i in data_of(tmp_path / "other" / "sheet_1.html")["items"]} & {i["id"] for i in first["items"]}


def ratings_file(sheets, rater: str, values: dict[tuple[str, str], tuple[int, int, int]]):
    """What a page saves, from (system, prompt) -> clarity, texture, relevance."""
    key = json.loads((sheets / "key.json").read_text(encoding="utf-8"))
    names = {(item["system"], item["prompt"]): entry for entry, item in key["items"].items()}
    rows = [{"item": names[what], **dict(zip(("clarity", "texture", "relevance"), given, strict=True))} for what, given in values.items()]
    content = {"format_version": 1, "sheet": key["sheet"], "kind": "pictures", "rater": rater, "ratings": rows}
    path = sheets / f"ratings_{rater}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


CAT, HORSE, RED = PROMPTS
FIRST = {("ours", CAT): (5, 3, 1), ("ours", HORSE): (4, 3, 2), ("theirs", CAT): (1, 3, 3), ("theirs", HORSE): (3, 3, 4)}
SECOND = {("ours", CAT): (3, 3, 1), ("ours", HORSE): (4, 3, 2), ("theirs", CAT): (1, 3, 3), ("theirs", HORSE): (5, 3, 4)}


def test_the_tally_is_what_one_works_out_by_hand(sheets, tmp_path, capsys):
    files = [str(ratings_file(sheets, "anna", FIRST)), str(ratings_file(sheets, "bo", SECOND | {("ours", RED): (1, 1, 1)}))]
    out = tmp_path / "tally.json"
    assert vilg(["eval", "rating-tally", str(sheets / "key.json"), *files, "--partial", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    # clarity of ours: means over raters 4, 4, and 1 from bo alone; of theirs: 1 and 4.
    ours, theirs = (result["systems"][name] for name in ("ours", "theirs"))
    assert ours["clarity"] == {"mean": 3.0, "low": 1.0, "high": 4.0, "items": 3}
    assert ours["categories"]["animals"]["clarity"] == {"mean": 4.0, "low": 4.0, "high": 4.0, "items": 2}
    # Two values are resampled to 1 (one time in four), 2.5 and 4: the percentiles are the values themselves.
    assert theirs["clarity"] == {"mean": 2.5, "low": 1.0, "high": 4.0, "items": 2}
    # Item by item: 4 - 1 and 4 - 4; the third was rated of one system only.
    assert result["differences"]["ours - theirs"]["clarity"] == {"mean": 1.5, "low": 0.0, "high": 3.0, "items": 2}
    # Units (5, 3) (4, 4) (1, 1) (3, 5): observed 16 / 8; expected, over the pairs of 1 1 3 3 4 4 5 5, 280 / 56.
    assert result["agreement"]["clarity"] == {"alpha": pytest.approx(1 - 2 / 5), "level": "interval", "equal_pairs": 0.5}
    assert result["agreement"]["texture"]["alpha"] is None and result["agreement"]["relevance"]["alpha"] == 1
    assert (result["raters"], result["rated"]) == (["anna", "bo"], 9)
    table = capsys.readouterr().out
    assert "ours - theirs  1.500 [0.000, 3.000]" in table and "clarity 0.600, texture undefined, relevance 1.000" in table


def test_alpha_equals_krippendorffs_own_example():
    """Computing Krippendorff's Alpha-Reliability (2011), data of section C: 4 observers, 12 units, missing values."""
    observers = ("1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .")
    units = [[int(v) for v in unit if v != "."] for unit in zip(*(line.split() for line in observers), strict=True)]
    assert krippendorff_alpha(units, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, "interval") == pytest.approx(0.849, abs=5e-4)
    assert krippendorff_alpha([[1], [2]], "interval") is None and equal_pairs([[1], [2]]) is None


def test_the_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3, 1, 400)
    mean, low, high = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean()) and (low, high) == pytest.approx((mean - half, mean + half), abs=0.01)


def test_a_turing_test_counts_how_often_a_person_is_seen(tmp_path):
    image = tmp_path / "1.png"
    Image.new("RGB", (6, 4)).save(image)
    systems = []
    for name, answer in (("model", "猫"), ("people", "一只猫")):
        systems += ["--system", f"{name}={write_lines(tmp_path / name, [{'image': '1.png', 'question': '?', 'answer': answer}])}"]
    assert vilg(["eval", "rating-sheet", "answers", *systems, "--images", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    key = json.loads((tmp_path / "out" / "key.json").read_text(encoding="utf-8"))
    page = data_of(tmp_path / "out" / "sheet_1.html")
    assert sorted(item["texts"] for item in page["items"]) == [[["question", "?"], ["answer", a]] for a in ("一只猫", "猫")]
    assert len(page["pictures"]) == 1
    entry = {item["system"]: name for name, item in key["items"].items()}
    ratings = {
        rater: {entry["model"]: {"human": human, "quality": 1}, entry["people"]: {"human": 1, "quality": 2}}
        for rater, human in (("a", 1), ("b", 0), ("c", 0), ("d", 0))
    }
    result = tally(key, ratings)
    assert result["systems"]["model"]["human"]["mean"] == 0.25 and result["systems"]["people"]["human"]["mean"] == 1
    # Values 1 0 0 0 and 1 1 1 1: ordered pairs that differ 6 / 3 of 8, against 2 * 5 * 3 / (8 * 7) by chance.
    assert result["agreement"]["human"]["alpha"] == pytest.approx(1 - (6 / 3 / 8) / (30 / 56))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(sheet="x"), "rates sheet x, but the key is of"),
        (lambda c: c.update(rater=" "), "does not say who rated"),
        (lambda c: c.update(format_version=2), "format_version 2, this vilg reads 1"),
        (lambda c: c.pop("ratings"), "no ratings as the sheets save them"),
        (lambda c: c["ratings"].append({"item": "x"}), "item 'x' is not in the key"),
        (lambda c: c["ratings"].append(c["ratings"][0]), "is there twice"),
        (lambda c: c["ratings"][0].update(clarity=6), "clarity is 6, not from 1 to 5"),
        (lambda c: c["ratings"][0].update(clarity=1.5), "clarity is 1.5, not from 1 to 5"),
        (lambda c: c["ratings"][0].pop("texture"), "texture is None"),
        (lambda c: None, "2 of 6 are not rated; --partial"),
    ],
)
def test_ratings_that_do_not_fit_the_key_are_named(sheets, capsys, change, message):
    path = ratings_file(sheets, "anna", FIRST)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert vilg(["eval", "rating-tally", str(sheets / "key.json"), str(path)]) == 2
    found = capsys.readouterr().err
    assert message in found and path.name in found


def test_one_rater_twice_and_a_changed_key_are_refused(sheets, capsys):
    path = str(ratings_file(sheets, "anna", FIRST))
    assert vilg(["eval", "rating-tally", str(sheets / "key.json"), path, path, "--partial"]) == 2
    assert "rater 'anna' has rated in another" in capsys.readouterr().err
    key = (sheets / "key.json").read_text(encoding="utf-8")
    (sheets / "key.json").write_text(key.replace('"theirs"', '"ours"', 1), encoding="utf-8")
    assert vilg(["eval", "rating-tally", str(sheets / "key.json"), path, "--partial"]) == 2
    assert "was changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--system ours", "give NAME=PATH"),
        ("--system a={ours} --system a={ours}", "each name once"),
        ("--system a=missing", "name a folder that `vilg generate` wrote"),
        ("--system a={ours} --system b={other}", "--system b: has nothing for a cat (2 of 3 missing)"),
        ("--system a={ours} --items {twice}", "twice.jsonl:2: a cat stands there twice"),
        ("--system a={ours} --items {number}", "number.jsonl:1: prompt should be texts"),
        ("--system a={ours} --items {ours}/scores.jsonl --raters 0", "--raters 0"),
        ("--system a={broken}", "0000_00.png: not a readable picture"),
    ],
)
def test_what_a_sheet_cannot_be_made_of_is_named(tmp_path, capsys, options, message):
    paths = {"ours": drawn(tmp_path / "ours", 0), "other": drawn(tmp_path / "other", 1, [RED]), "broken": drawn(tmp_path / "broken", 1)}
    (paths["broken"] / "0000_00.png").write_bytes(b"hello")
    paths["twice"] = write_lines(tmp_path / "twice.jsonl", [{"prompt": CAT}] * 2)
    paths["number"] = write_lines(tmp_path / "number.jsonl", [{"prompt": 5}])
    command = ["eval", "rating-sheet", "pictures", *options.format(**paths).split(), "--out", str(tmp_path / "out")]
    assert vilg(command) == 2
    assert message in capsys.readouterr().err


@needs_chromium
def test_a_rater_fills_in_a_sheet_and_comes_back_to_it(sheets, tmp_path, capsys):
    saved = {}

    async def scenario() -> None:
        profile = tmp_path / "profile"
        profile.mkdir()
        async with chromium_page(find_chromium(), profile) as page:
            for visit in range(2):  # the second time, what was rated before is still there
                await page.open((sheets / "sheet_1.html").as_uri())
                await page.evaluate("$('#rater').value = 'Anna \"A\"'; $('#start form').requestSubmit()")
                await page.wait_for("!$('#rate').hidden && $('figure img').naturalWidth === 8")
                assert await page.evaluate("place") == 3 * visit
                for _ in range(3):
                    assert await page.evaluate("$('#next').disabled")
                    for key in "524":
                        await page.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
                    await page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", text="\r")
            await page.wait_for("!$('#end').hidden")
            assert await page.evaluate("$('#done').textContent") == "All rated. Thank you!"
            saved.update(json=await page.evaluate("JSON.stringify(collected())"), csv=await page.evaluate("asCsv()"))
            assert page.errors == [] and all(each.startswith(("file:", "data:", "blob:")) for each in page.requests)

    asyncio.run(scenario())
    figures = []
    for suffix, text in saved.items():
        path = tmp_path / f"saved.{suffix}"
        path.write_text(text, encoding="utf-8", newline="")
        out = tmp_path / "tally.json"
        assert vilg(["eval", "rating-tally", str(sheets / "key.json"), str(path), "--out", str(out)]) == 0, capsys.readouterr().err
        figures.append(json.loads(out.read_text()))
    assert figures[0] == figures[1] and figures[0]["raters"] == ['Anna "A"']
    assert [figures[0]["systems"]["ours"][c.name]["mean"] for c in KINDS["pictures"].criteria] == [5, 2, 4]
