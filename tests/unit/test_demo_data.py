"""Raw shards of the demo: layout, determinism, refusals."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vilg.demo.generate_data import INDEX_NAME, load_scene_config, main, read_scenes, write_raw
from vilg.demo.scenes import SceneConfig, make_scene, render
from vilg.errors import UserError

CONFIG = SceneConfig(num_glyphs=12, num_train=25, num_seen=7, num_held_out=6)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "raw"
    write_raw(CONFIG, folder, samples_per_shard=10, progress=False)
    return folder


def test_shards_are_laid_out_as_img2dataset_lays_them_out(raw):
    assert sorted(path.name for path in (raw / "train").iterdir()) == [
        f"{shard:05d}{ending}" for shard in range(3) for ending in (".tar", "_stats.json")
    ]
    stats = json.loads((raw / "train" / "00002_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (5, 5, {"success": 5})
    assert not [path for path in raw.parent.iterdir() if path != raw], "temporary folder left behind"


def test_webdataset_reads_back_what_was_rendered(raw):
    samples = list(
        webdataset.WebDataset([str(raw / "train" / f"{shard:05d}.tar") for shard in range(3)], shardshuffle=False)
    )
    assert [sample["__key__"] for sample in samples] == [f"{i // 10:05d}{i % 10}" for i in range(25)]
    for index, sample in enumerate(samples):
        scene, meta = make_scene(CONFIG, "train", index), json.loads(sample["json"])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), render(CONFIG, scene))
        assert sample["txt"].decode() == scene.caption() == meta["caption"]
        assert meta["caption_zh"] == scene.caption("zh") and meta["caption_en"] == scene.caption("en")
        assert meta["key"] == sample["__key__"] and meta["status"] == "success"
        assert meta["sha256"] == hashlib.sha256(sample["png"]).hexdigest()
        assert meta["glyphs"] == list(scene.glyphs) and meta["background"] == scene.background
        assert (meta["width"], meta["height"], meta["original_width"]) == (32, 32, 32)


def test_the_same_configuration_gives_the_same_bytes(raw, tmp_path):
    write_raw(CONFIG, tmp_path / "again", samples_per_shard=10, progress=False)
    assert digests(tmp_path / "again") == digests(raw)


def test_finished_data_is_left_alone_and_other_data_refused(raw):
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
    write_raw(CONFIG, raw, samples_per_shard=10, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
    with pytest.raises(UserError, match="seed is 0, not 3"):
        write_raw(CONFIG.model_copy(update={"seed": 3}), raw, samples_per_shard=10, progress=False)


def test_a_folder_with_other_things_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not demo data"):
        write_raw(CONFIG, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_interrupted_write_leaves_no_data_and_the_next_one_is_whole(raw, tmp_path, monkeypatch):
    from vilg.demo import generate_data

    def interrupt(config, scene, key):
        if scene.index == 12:
            raise KeyboardInterrupt
        return original(config, scene, key)

    original = generate_data._sample
    monkeypatch.setattr(generate_data, "_sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_raw(CONFIG, tmp_path / "raw", samples_per_shard=10, progress=False)
    assert not (tmp_path / "raw").exists()
    monkeypatch.setattr(generate_data, "_sample", original)
    write_raw(CONFIG, tmp_path / "raw", samples_per_shard=10, progress=False)
    assert digests(tmp_path / "raw") == digests(raw)


def test_configuration_is_read_back_and_an_unknown_format_refused(raw, tmp_path):
    assert read_scenes(raw) == CONFIG
    index = json.loads((raw / INDEX_NAME).read_text())
    (tmp_path / INDEX_NAME).write_text(json.dumps({**index, "format_version": 99}))
    with pytest.raises(UserError, match="format_version 99 is unknown"):
        read_scenes(tmp_path)


def test_command_line_takes_a_file_and_overrides(tmp_path, capsys):
    file = tmp_path / "scenes.yaml"
    file.write_text("num_glyphs: 8\nnum_train: 4\nsizes: [16, 24]\n")
    arguments = ["--out", str(tmp_path / "raw"), "--config", str(file)]
    assert main([*arguments, "--set", "num_seen=2", "--set", "num_held_out=1"]) == 0
    assert read_scenes(tmp_path / "raw") == SceneConfig(
        num_glyphs=8, num_train=4, sizes=(16, 24), num_seen=2, num_held_out=1
    )
    assert "train 4, seen 2, held_out 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["num_glyph=5"], "--set num_glyph=5: unknown key 'num_glyph'; did you mean 'num_glyphs'"),
        (["num_glyphs"], "expected key=value"),
        (["tint=99"], "tint=99: .*less than or equal to 16"),
        (["sizes=[40]"], "a glyph is 8 to 32 pixels"),
        (["place_steps=[4, 4]"], "one for all or one for each of sizes"),
    ],
)
def test_wrong_settings_name_the_option_and_what_would_work(overrides, message):
    with pytest.raises(UserError, match=message):
        load_scene_config(None, overrides)


def test_a_broken_settings_file_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="bad.yaml: expected lines of `key: value`"):
        load_scene_config(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="nowhere.yaml: cannot be read"):
        load_scene_config(tmp_path / "nowhere.yaml")
