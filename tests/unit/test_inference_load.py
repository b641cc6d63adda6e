"""Opening an export folder: what is not as it should be is named, file by file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.export_support import SHARD, write_export
from vilg.errors import UserError
from vilg.inference.draw_command import generate_main
from vilg.inference.load import load_model
from vilg.inference.write_command import caption_main


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_export(tmp_path)


def test_a_whole_folder_opens_and_draws_with_its_settings(folder):
    bundle = load_model(folder)
    assert (bundle.name, bundle.image_size, bundle.sampling.temperature) == ("tiny", (16, 16), 1.0)
    assert not bundle.model.training and next(bundle.model.parameters()).dtype == torch.float32


def drop(key: str) -> Callable[[dict], object]:
    return lambda content: content.pop(key)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c.update(format_version=99), "config.json: format_version 99"),
        ("config.json", drop("sequence"), "config.json: 'sequence' is missing"),
        ("config.json", lambda c: c.update(dtype="int8"), "config.json: 'int8' is missing or unknown"),
        ("config.json", lambda c: c["model"].update(surprise=1), "config.json: .*surprise"),
        ("config.json", lambda c: c["sequence"].update(grid=[4]), "config.json: .*grid"),
        ("config.json", lambda c: c["sequence"].update(image_vocab_size=17), "weights do not fit .*image_table"),
        ("config.json", lambda c: c["text_tokenizer"].update(hash="0" * 64), "text.model: hash .* names 000000000000"),
        ("generation_config.json", drop("format_version"), "generation_config.json: format_version None"),
        ("generation_config.json", lambda c: c.update(surprise=1), "generation_config.json: .*surprise"),
        ("generation_config.json", lambda c: c.update(guidance_scale=-1), "generation_config.json: guidance=-1"),
        ("generation_config.json", drop("top_k"), "generation_config.json: 'top_k' is missing"),
        ("model.safetensors.index.json", drop("weight_map"), "index.json: is no index"),
        (
            "model.safetensors.index.json",
            lambda c: c["weight_map"].update({"layers.0.segment": "../elsewhere.safetensors"}),
            "outside its folder",
        ),
    ],
)
def test_a_folder_that_is_not_as_it_should_be_is_named(folder, file, change, message):
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    change(content)
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_model(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json", SHARD])
def test_a_missing_or_cut_file_is_named(folder, file):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=file):
        load_model(folder)
    (folder / file).unlink()
    with pytest.raises(UserError, match=file):
        load_model(folder)


def test_generate_and_caption_work_from_the_folder(folder, capsys):
    out = folder / "drawn"
    generate_main(["--model", str(folder), "--prompt", "a cat", "--num", "3", "--best", "2", "--out", str(out)])
    wanted = ["0000_00.png", "0000_01.png", "grid.png", "scores.jsonl", "settings.json"]
    assert sorted(path.name for path in out.iterdir()) == wanted
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["file"] for line in scores] == ["0000_00.png", "0000_01.png", None]
    with Image.open(out / "0000_00.png") as picture:
        assert picture.size == (16, 16) and picture.text["prompt"] == "a cat"
    capsys.readouterr()
    caption_main(["--model", str(folder), str(out / "0000_00.png"), "--language", "zh"])
    assert set(json.loads(capsys.readouterr().out)) == {"image", "caption"}
