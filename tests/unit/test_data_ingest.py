"""Ingest: tars and image folders become raw shards; what cannot be used is counted by reason."""

import json
from pathlib import Path

import pytest

from tests.unit.data_support import make_raw, picture
from vilg.config import IngestRecipe
from vilg.data.ingest import ingest, main
from vilg.data.shards import RAW_FIELDS, ShardReader, index_shard
from vilg.errors import UserError


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    result = {}
    for shard in sorted(out.glob("*.tar")):
        with ShardReader(shard, index_shard(shard, RAW_FIELDS)) as reader:
            result |= {reader.key(i): reader.read(i) for i in range(len(reader))}
    return result


def image_folder(folder: Path) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "horse.1.jpg").write_bytes(picture(1, format="JPEG"))
    (folder / "horse.1.txt").write_text("一匹马\n", encoding="utf-8")
    (folder / "deep" / "cat.png").write_bytes(picture(2, size=(5, 9)))
    (folder / "deep" / "cat.txt").write_text("a cat", encoding="utf-8")
    (folder / "deep" / "cat.json").write_text('{"licence": "CC0"}', encoding="utf-8")
    (folder / "alone.png").write_bytes(picture(3))
    return folder


def test_folder_and_tars_become_one_set_of_shards(tmp_path):
    raw = make_raw(tmp_path / "raw", [3], lambda n, f: f | {"png": b"broken"} if n == 1 else f)
    recipe = IngestRecipe(samples_per_shard=3)
    report = ingest([image_folder(tmp_path / "images"), raw], tmp_path / "out", recipe=recipe)
    assert (report["seen"], report["kept"]) == (6, 4)
    assert report["dropped"] == {"no caption": 1, "bad image": 1}
    assert report["examples"]["bad image"][0]["key"] == "000000001"
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report
    found = samples(tmp_path / "out")
    assert list(found) == ["000000000", "000000001", "000000002", "000010000"]
    cat, horse, first, _ = found.values()
    assert horse["jpg"] == picture(1, format="JPEG") and horse["txt"].decode() == "一匹马"
    meta = json.loads(cat["json"])
    assert (meta["licence"], meta["width"], meta["height"], meta["caption"]) == ("CC0", 5, 9, "a cat")
    assert meta["ingested_from"] == {"shard": "images", "key": "deep/cat.png"}
    assert json.loads(first["json"])["url"] == "https://example.org/0"
    assert json.loads(first["json"])["ingested_from"] == {"shard": "raw/00000.tar", "key": "000000000"}


def test_the_same_sources_give_the_same_bytes_also_after_an_interruption(tmp_path, monkeypatch):
    raw = make_raw(tmp_path / "raw", [5])
    ingest([raw], tmp_path / "one", recipe=IngestRecipe(samples_per_shard=2))

    def interrupted(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vilg.data.ingest_report.write_json", interrupted)
        ingest([raw], tmp_path / "two", recipe=IngestRecipe(samples_per_shard=3))
    ingest([raw], tmp_path / "two", recipe=IngestRecipe(samples_per_shard=2))
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}


def test_command_prints_counts_as_json(tmp_path, capsys):
    raw = make_raw(tmp_path / "raw", [3])
    assert main([str(raw / "00000.tar"), "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out) == {"seen": 3, "kept": 3, "dropped": {}}


def test_mistakes_are_clear_errors_and_overwrite_nothing(tmp_path):
    raw = make_raw(tmp_path / "raw", [3])
    with pytest.raises(UserError, match="expected a folder of img2dataset shards"):
        ingest([tmp_path / "nothing"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither .tar shards nor images"):
        ingest([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(UserError, match="is one of the sources"):
        ingest([raw], raw)
    assert (raw / "00000.tar").exists()
    ingest([raw], tmp_path / "out")
    with pytest.raises(UserError, match="already holds a finished ingest"):
        ingest([raw], tmp_path / "out")
    blank = make_raw(tmp_path / "blank", [2], lambda _, f: f | {"txt": b""})
    with pytest.raises(UserError, match="none of 2 samples can be used: 2 x empty caption"):
        ingest([blank], tmp_path / "none")


def test_shards_that_no_ingest_began_are_never_deleted(tmp_path):
    download = make_raw(tmp_path / "download", [2])
    before = (download / "00000.tar").read_bytes()
    with pytest.raises(UserError, match=r"holds other data \(00000.tar\)"):
        ingest([image_folder(tmp_path / "images")], download)
    assert (download / "00000.tar").read_bytes() == before


def test_a_table_of_questions_keeps_those_that_pass_the_filters(tmp_path):
    rows = [("cat", "what is it?", "a cat"), ("cat", "who sat where on which mat?", "that one on this mat"), ("dog", "x", "y")]
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.png").write_bytes(picture(len(name)))
    lines = [json.dumps({"image": f"{image}.png", "question": q, "answer": a}) for image, q, a in rows]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    recipe = IngestRecipe(**{"words": {"enabled": True, "below": 8, "at_least": 3}})
    report = ingest([tmp_path / "asked.jsonl"], tmp_path / "out", recipe=recipe)
    assert (report["kept"], report["dropped"]) == (1, {"too few words": 1})
    [kept] = samples(tmp_path / "out").values()
    assert json.loads(kept["json"])["questions"] == [{"question": "what is it?", "answer": "a cat"}]
    assert kept["txt"] == b"what is it? a cat"
