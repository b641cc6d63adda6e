"""Preflight's rows about files: space for what is still to come, and nodes on which a file system is not mounted."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from tests.distributed.helpers import run_distributed
from tests.golden.make import DEBUG_RECIPE, make_data
from vilg.config import Recipe, load_recipe
from vilg.parallel.ranks import Ranks
from vilg.tools import storage
from vilg.tools.findings import Report
from vilg.tools.storage import check_storage, checkpoint_bytes, checkpoints_to_come

Usage = namedtuple("Usage", "free")


def recipe_of(folder: Path, **overrides: object) -> Recipe:
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    changes = {"run_dir": folder, "checkpoint.keep_last": 3, **changes}
    return load_recipe(DEBUG_RECIPE, [f"{key}={value}" for key, value in changes.items()])


def leave_checkpoints(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (folder / "LATEST").write_text(f"step_{steps[-1]:08d}\n")


def space_row(recipe: Recipe, free: float, monkeypatch) -> tuple[str, str]:
    """Status and text where so many checkpoints' bytes are free."""
    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "disk_usage", lambda _: Usage(int(free * checkpoint_bytes(recipe))))
        row = next(row for row in storage._disk(recipe) if row.check == "disk space")
    return row.status, row.detail


def test_a_run_that_holds_its_checkpoints_needs_space_for_one_more_only(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)
    assert space_row(recipe, 3.9, monkeypatch)[0] == "bad" and space_row(recipe, 4.1, monkeypatch)[0] == "ok"
    leave_checkpoints(tmp_path, 0, 10, 20)
    status, text = space_row(recipe, 1.1, monkeypatch)
    assert status == "ok" and text.endswith("3 + 1 checkpoints, of which 3 are there")
    assert space_row(recipe, 0.9, monkeypatch)[0] == "bad"


def test_checkpoints_that_are_kept_for_good_make_no_room_and_neither_do_later_ones(tmp_path):
    leave_checkpoints(tmp_path, 100, 110, 120)
    assert checkpoints_to_come(recipe_of(tmp_path)) == (1, 3)
    assert checkpoints_to_come(recipe_of(tmp_path, checkpoint__keep_every=20)) == (3, 1)  # 100 and 120 stay
    (tmp_path / "LATEST").write_text("step_00000110\n")  # somebody went back
    assert checkpoints_to_come(recipe_of(tmp_path)) == (2, 2)


def test_what_an_interrupted_save_left_counts_as_free(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)
    leave_checkpoints(tmp_path, 0, 10, 20)
    partial = tmp_path / "checkpoints" / ".step_00000030.partial"
    partial.mkdir()
    with open(partial / "weights", "wb") as stream:
        stream.truncate(checkpoint_bytes(recipe) // 2)
    assert space_row(recipe, 0.6, monkeypatch)[0] == "ok"


def reports_of(rank: int, world_size: int, cases: list[list[dict]]) -> list[Report]:
    """A report of every case. Every rank is a node of its own with its own recipe, as if paths led elsewhere there."""
    ranks, reports = Ranks(rank, world_size, rank, torch.distributed.group.WORLD), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURMD_NODENAME", f"node{rank + 1}")
        patch.setattr(storage, "_SETTLE_SECONDS", 0.5)
        for nodes in cases:
            overrides = [f"{key}={value}" for key, value in nodes[rank].items()]
            reports.append(Report.begin(ranks))
            check_storage(reports[-1], load_recipe(DEBUG_RECIPE, overrides, cross_checks=False), ranks)
    return reports


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def reports(folder) -> dict[str, Report]:
    """Reports of three nodes, the last of which finds other things where the others have theirs."""
    found = make_data(folder)
    damaged = Path(shutil.copytree(found["data.train"], folder / "damaged"))
    shutil.copy(__file__, damaged / "00000.tar")
    (folder / "local").mkdir()
    (folder / "two folders").mkdir()
    (folder / "two folders" / ".vilg-preflight-seen-node9").touch()  # of an earlier preflight that was killed
    missing = {"tokens.text_model": folder / "not" / "there.model", "data.train": folder / "not" / "there"}
    cases = {
        "equal": ({}, {}),
        "no folder": ({}, {"run_dir": folder / "unmounted" / "run"}),
        "two folders": ({}, {"run_dir": folder / "local"}),
        "no data": ({}, missing),
        "damaged shard": ({"data.train": damaged}, {}),
        "held out": ({"evaluation.every_steps": 5, "evaluation.pairs": 21}, {}),
        "few held out": ({"evaluation.every_steps": 5, "evaluation.pairs": 999}, {}),
    }
    nodes = []
    for name, (changes, on_the_last) in cases.items():
        here = {**found, "run_dir": folder / name, **changes}
        nodes.append([here, here, {**here, **on_the_last}])
    made = run_distributed(3, reports_of, (nodes,))
    assert made[0] == made[1] == made[2]
    return dict(zip(cases, made[0]))


def bad(report: Report) -> dict[str, str]:
    return {row.check: row.detail for row in report.rows if row.status == "bad"}


def test_nodes_that_see_the_same_are_fine_and_nothing_is_left_behind(reports, folder):
    report = reports["equal"]
    assert bad(report) == {} and report.bad_nodes == []
    assert [row.check for row in report.rows] == ["run folder", "disk space", "disk speed", "tokenizers", "shards"]
    assert not list((folder / "equal").iterdir())


def test_a_node_without_the_run_folder_is_blamed_and_makes_none(reports, folder):
    report = reports["no folder"]
    assert report.bad_nodes == ["node3"] and "is not there; is its file system mounted?" in bad(report)["run folder"]
    assert not (folder / "unmounted").exists()


def test_a_node_whose_run_folder_is_another_one_is_blamed(reports, folder):
    report = reports["two folders"]
    assert report.bad_nodes == ["node3"] and "with the files of 1 node(s) (node3)" in bad(report)["run folder"]
    assert not list((folder / "local").iterdir())


def test_a_node_that_cannot_read_tokenizer_or_shards_is_blamed(reports):
    report = reports["no data"]
    assert report.bad_nodes == ["node3"] and set(bad(report)) == {"tokenizers", "shards"}
    assert all(text.startswith("node3: ") for text in bad(report).values())


def test_held_out_pairs_have_a_row_and_must_be_enough(reports):
    (row,) = [row for row in reports["held out"].rows if row.check == "held out"]
    assert (row.status, row.detail) == ("ok", "1 shards, 21 of 40 samples")
    assert "evaluation.pairs=999, but" in bad(reports["few held out"])["shards"]


def test_a_damaged_shard_is_bad_and_no_nodes_fault(reports):
    report = reports["damaged shard"]
    assert list(bad(report)) == ["shards"] and report.bad_nodes == [] and "00000.tar" in bad(report)["shards"]
