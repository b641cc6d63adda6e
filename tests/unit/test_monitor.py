"""`vilg monitor`: what the page says about a run, and that its charts are there."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.golden.make import DEBUG_RECIPE
from vilg.config import dump_recipe, load_recipe
from vilg.errors import UserError
from vilg.pictures.plots import smoothed
from vilg.tools.monitor import main, read_run, summary, write_page

NOW = 1_800_000_000.0


def make_run(folder, *, name="mine", state="training", age=5.0, steps=40):
    """A run folder as the trainer leaves it, with a skipped step, a rollback and a save; `age`: of its heartbeat."""
    logs = folder / "logs"
    logs.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_recipe(load_recipe(DEBUG_RECIPE, [f"name={name}"], cross_checks=False)))
    rows = [
        dict(step=s, loss=9.0 - s / 10, text_loss=3.0, image_loss=6.0 - s / 10, grad_norm=2.0, lr=1e-3, skipped=False)
        for s in range(1, steps + 1)
    ]
    for row in rows[19::20]:
        row |= dict(val_loss=row["loss"] + 0.5, val_text_loss=3.2, val_image_loss=row["image_loss"] + 0.3)
    rows[11] |= dict(loss=None, text_loss=None, image_loss=None, grad_norm=None, skipped=True)
    for row in rows[9::10]:
        row |= dict(seconds_per_step=0.5, tokens_per_second=4e4, data_wait=0.01, memory=2**31, eta_seconds=600.0)
        row["time"] = NOW - 100 + row["step"]
    events = [
        dict(event="start", step=0, text="starting: step 0 of 50"),
        dict(event="nonfinite", step=12, text="step 12: <b>non-finite</b> loss"),
        dict(event="save", step=20, text="saved step_00000020", seconds=1.0),
        dict(event="rollback", step=30, text="back from step 30", to_step=20),
    ]
    for index, event in enumerate(events):
        event["time"] = NOW - 90 + 10 * index
    (logs / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (logs / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    heartbeat = dict(format_version=1, time=NOW - age, state=state, step=steps)
    (logs / "heartbeat.json").write_text(json.dumps(heartbeat))
    return folder


def test_the_page_holds_charts_events_and_figures_and_escapes_what_it_shows(tmp_path):
    page = write_page([read_run(make_run(tmp_path / "run"))], tmp_path / "out", now=NOW).read_text()
    assert page.count("data:image/png;base64,") == 7 and "throughput" in page  # no MFU where no peak is known
    assert "&lt;b&gt;non-finite&lt;/b&gt;" in page and "<b>non-finite" not in page
    assert "held out" in page and "nats at step 40" in page and "5.500" in page
    assert "back from step 30" in page and "saved step_00000020" not in page
    with Image.open(tmp_path / "out" / "loss.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 5
    assert not (tmp_path / "out" / "mfu.png").exists()


def test_several_runs_share_the_charts_and_are_told_apart_by_folder(tmp_path):
    runs = [read_run(make_run(tmp_path / name)) for name in ("one", "two")]
    page = write_page(runs, tmp_path / "out", now=NOW).read_text()
    assert "mine (one)" in page and "mine (two)" in page and page.count('class="card run"') == 2


@pytest.mark.parametrize(
    "state, age, expected, tone",
    [
        ("training", 5.0, "training", "good"),
        ("training", 7200.0, "no sign of life for 2h00m", "bad"),
        ("finished", 7200.0, "finished", "still"),
        ("failed", 5.0, "failed", "bad"),
    ],
)
def test_the_card_tells_a_living_run_from_a_silent_one(tmp_path, state, age, expected, tone):
    found = summary(read_run(make_run(tmp_path / "run", state=state, age=age)), now=NOW)
    assert (found["state"], found["tone"]) == (expected, tone)
    assert found["percent"] == 80.0 and found["troubles"] == ["1 non-finite", "1 rollback"]
    shown = {figure["name"]: figure["value"] for figure in found["figures"]}
    assert shown["loss"] == "5.000" and shown["throughput"] == "40,000" and shown["last checkpoint"] == "20"


def test_a_folder_without_a_run_is_refused_with_its_name(tmp_path):
    with pytest.raises(UserError, match="no config.yaml there"):
        main([str(tmp_path), "--out", str(tmp_path / "out")])


def test_smoothing_keeps_a_gap_that_is_wider_than_its_window():
    values = np.array([1.0, np.nan, 3.0])
    assert np.array_equal(smoothed(values), values, equal_nan=True)
