"""Similarity by CLIP and Chinese-CLIP folders, tiny ones with random weights, against the model's own features.

`transformers` is imported inside the tests: it takes seconds, which other tests should not pay.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.data_support import make_raw
from vilg.data.filters.similarity import ClipScorer
from vilg.data.ingest import main
from vilg.errors import UserError

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
VISION = SMALL | {"image_size": 32, "patch_size": 16}


def save_chinese_clip(folder: Path) -> list[str]:
    """A model whose tokenizer knows three characters; captions for it."""
    from transformers import BertTokenizer, ChineseCLIPConfig, ChineseCLIPImageProcessorPil, ChineseCLIPModel

    text = SMALL | {"vocab_size": 8, "max_position_embeddings": 12}
    config = ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    ChineseCLIPModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n一\n匹\n马", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    ChineseCLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    return ["一匹马", "马" * 40, "一"]


def save_clip(folder: Path) -> list[str]:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    text = SMALL | {"vocab_size": 6, "max_position_embeddings": 12}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).save_pretrained(folder)
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "c": 3, "t</w>": 4, "a": 5}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return ["a cat", "a " * 40, "cat"]


@pytest.mark.parametrize("save", [save_clip, save_chinese_clip])
def test_score_is_the_cosine_of_the_models_features_whatever_the_batch(tmp_path, save, capsys):
    torch.manual_seed(0)
    captions = save(tmp_path / "clip")
    scorer = ClipScorer(tmp_path / "clip", device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, scorer.image_size, scorer.image_size, 3), np.uint8)
    scores = scorer.score(images, captions)
    alone = [scorer.score(images[i : i + 1], captions[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(scores, alone, atol=1e-6)
    np.testing.assert_allclose(scores[0], features_cosine(tmp_path / "clip", images[0], captions[0]), atol=1e-6)
    assert len({round(float(score), 4) for score in scores}) == 3

    raw, above = make_raw(tmp_path / "raw", [2]), "--similarity.above=0.999"
    command = [str(raw), "--out", str(tmp_path / "out"), f"--similarity.model={tmp_path / 'clip'}"]
    with pytest.raises(UserError, match="none of 2 samples can be used: 2 x not similar"):
        main([*command, above])
    assert main([*command, "--similarity.above=-1", "--similarity.device=cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 2


def features_cosine(folder: Path, image: np.ndarray, caption: str) -> float:
    """The same by the model's two towers; the normalisation written out."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = (image / 255 - settings["image_mean"]) / settings["image_std"]
    with torch.no_grad():
        seen = model.get_image_features(torch.tensor(pixels).permute(2, 0, 1)[None].float())
        read = model.get_text_features(**AutoTokenizer.from_pretrained(folder)([caption], return_tensors="pt"))
    seen, read = (getattr(found, "pooler_output", found) for found in (seen, read))
    return torch.cosine_similarity(seen, read).item()


def test_a_folder_without_a_model_and_another_kind_of_model_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match="similarity.model: .*nowhere is no folder"):
        ClipScorer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no CLIP model that can be loaded"):
        ClipScorer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model_type is 'bert', supported are clip and chinese_clip"):
        ClipScorer(tmp_path)


def test_weights_in_a_pickle_are_refused(tmp_path):
    save_chinese_clip(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no CLIP model that can be loaded: .*safetensors"):
        ClipScorer(tmp_path)


def test_without_transformers_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="similarity.model needs transformers .*: pip install transformers"):
        ClipScorer(tmp_path)
