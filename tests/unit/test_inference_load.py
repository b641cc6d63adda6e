"""Opening an export folder: what is not as it should be is named, file by file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.model_support import tiny_config, tiny_model
from vilg.errors import UserError
from vilg.inference.commands import caption_main, generate_main
from vilg.inference.load import load_model
from vilg.tokens.sequence import SequenceSpec
from vilg.tokens.text import train_text_tokenizer
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.config import ImageTokenizerConfig

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole export of a tiny model, written by hand."""
    text = train_text_tokenizer(["a cat", "一只猫"], tmp_path / "text.model", vocab_size=300)
    image = ImageTokenizer(ImageTokenizerConfig(image_size=16, num_codes=16, encoder_width=8, decoder_width=8))
    image.save(tmp_path / "image_tokenizer")
    spec = SequenceSpec(text_slots=6, grid=(4, 4), text_vocab_size=text.vocab_size, image_vocab_size=16)
    weights = tiny_model(spec=spec).state_dict()
    save_file(weights, tmp_path / SHARD)
    config = {
        "format_version": 1,
        "name": "tiny",
        "dtype": "float32",
        "model": tiny_config().model_dump(mode="json"),
        "sequence": {"text_slots": 6, "grid": [4, 4], "text_vocab_size": text.vocab_size, "image_vocab_size": 16},
        "text_tokenizer": {"file": "text.model", "hash": text.hash},
        "image_tokenizer": {"folder": "image_tokenizer", "hash": image.hash},
    }
    generation = {"format_version": 1, "guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(weights, SHARD)}
    for name, content in (("config", config), ("generation_config", generation), ("model.safetensors.index", index)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


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
        ("generation_config.json", lambda c: c.update(guidance=-1), "generation_config.json: guidance=-1"),
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
    assert sorted(path.name for path in out.iterdir()) == ["0000_00.png", "0000_01.png", "grid.png", "scores.jsonl"]
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["file"] for line in scores] == ["0000_00.png", "0000_01.png", None]
    with Image.open(out / "0000_00.png") as picture:
        assert picture.size == (16, 16) and picture.text["prompt"] == "a cat"
    capsys.readouterr()
    caption_main(["--model", str(folder), str(out / "0000_00.png"), "--language", "zh"])
    assert set(json.loads(capsys.readouterr().out)) == {"image", "caption"}
