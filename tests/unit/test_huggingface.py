"""An export opened by `transformers`, offline, against our own model: masks, logits, decoding, tokenizers.

`transformers` is imported inside the tests: it takes seconds, which other tests should not pay.
"""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.export_support import write_export
from tests.model_support import tiny_config
from vilg.checkpoint.card import USE_WITH_TRANSFORMERS
from vilg.config.schema import ModelConfig
from vilg.inference.caption import caption_codes
from vilg.inference.generate import generate_codes
from vilg.inference.load import load_model
from vilg.inference.sampling import SamplingConfig
from vilg.tokens.sequence import BEGIN_OF_TEXT, PAD, answer, collate, text_to_image
from vilg.tokens.text import TextTokenizer

GREEDY = SamplingConfig(temperature=0.0)
SHAPES = {
    "row, column, conv": tiny_config(),
    "row_wrap, rmsnorm, qk and sandwich norm": tiny_config(
        row_style="wrap", norm="rmsnorm", qk_norm=True, sandwich_norm=True
    ),
    "dense": tiny_config(attention="dense", num_layers=2),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("export"))


def opened(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def codes_of(bundle, count: int) -> torch.Tensor:
    drawn = np.random.default_rng(1).integers(0, bundle.spec.image_vocab_size, (count, bundle.spec.image_slots))
    return torch.from_numpy(drawn)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_our_model_in_both_directions(tmp_path, shape):
    bundle = load_model(write_export(tmp_path, config=SHAPES[shape]))
    model = opened(tmp_path)
    spec, text_vocab = bundle.spec, bundle.spec.text_vocab_size
    codes, (source, target) = codes_of(bundle, 2), ([5, 9, 7], [11, 6])
    samples = [text_to_image(spec, source, codes[0].numpy()), answer(spec, source, target, codes[1].numpy())]
    ours = bundle.model(*collate(samples).inputs())
    begin_of_image = text_vocab + spec.image_vocab_size
    drawn = [*source, begin_of_image, *(codes[0, :-1] + text_vocab)]
    asked = [*(codes[1] + text_vocab), *source, BEGIN_OF_TEXT, *target]
    width = max(len(drawn), len(asked))
    ids = torch.tensor([[PAD] * (width - len(row)) + [int(i) for i in row] for row in (drawn, asked)])
    theirs = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
    images = slice(text_vocab, begin_of_image)
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs[0, -spec.image_slots :, images], ours[1][0], **close)
    torch.testing.assert_close(theirs[1, -spec.text_slots :, :text_vocab], ours[0][1], **close)
    torch.testing.assert_close(theirs[1, -spec.num_slots : -spec.text_slots, images], ours[1][1], **close)
    assert theirs[1, -1, text_vocab:].max() < -1e30


@pytest.mark.parametrize("shape", SHAPES)
def test_generate_draws_and_writes_what_we_do_token_for_token(tmp_path, shape):
    bundle = load_model(write_export(tmp_path, config=SHAPES[shape], sampling=GREEDY))
    from transformers import AutoTokenizer

    model, tokenizer = opened(tmp_path), AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    prompts = ["a cat", "一只猫", "red"]
    ids = [bundle.encode_prompt(prompt) for prompt in prompts]
    ours = generate_codes(bundle.model, bundle.spec, ids, num=1, seeds=[0] * 3, sampling=GREEDY)[:, 0]
    inputs = model.draw_inputs(tokenizer, prompts)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        drawn = model.drawn_codes(model.generate(**inputs, **options))
        assert torch.equal(drawn.flatten(1), ours), options
    guided = SamplingConfig(temperature=0.0, guidance=3.0)
    ours = generate_codes(bundle.model, bundle.spec, ids, num=1, seeds=[0] * 3, sampling=guided)[:, 0]
    assert torch.equal(model.drawn_codes(model.generate(**inputs, guidance_scale=3.0)).flatten(1), ours)

    codes = codes_of(bundle, 4)
    ours = caption_codes(bundle.model, bundle.spec, bundle.text, codes)
    inputs = model.caption_inputs(codes)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        rows = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        # Our decoder on their ids: random bytes, as a random model writes, the two decoders render differently.
        assert [bundle.text.decode(row) for row in rows] == ours, options


def test_beams_sampling_and_questions_run_and_keep_to_the_layout(folder):
    bundle = load_model(folder)
    from transformers import AutoTokenizer

    model, tokenizer = opened(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    codes = codes_of(bundle, 2)
    asked = model.caption_inputs(codes, tokenizer, ["a cat", "red"])
    assert len(model.written_texts(tokenizer, model.generate(**asked, num_beams=3))) == 2
    drawn = model.drawn_codes(model.generate(**model.draw_inputs(tokenizer, ["", "a cat"]), num_return_sequences=2))
    assert drawn.shape == (4, 4, 4) and 0 <= drawn.min() and drawn.max() < 16


def test_every_setting_of_a_model_is_known_to_the_shipped_file(folder):
    from vilg.checkpoint.huggingface.modeling_vilg import SETTINGS, VilgConfig

    assert set(ModelConfig.model_fields) == SETTINGS
    with pytest.raises(ValueError, match="model holds rotary, which this modeling file does not know"):
        VilgConfig(model={**tiny_config().model_dump(), "rotary": True})


def test_pictures_and_codes_are_those_of_our_image_tokenizer(tmp_path):
    for lookup in ("euclidean", "cosine"):
        bundle = load_model(write_export(tmp_path, lookup=lookup))
        theirs = opened(tmp_path).image_tokenizer
        codes = codes_of(bundle, 3)
        pictures = theirs.decode(codes.view(3, 4, 4))
        assert np.array_equal(pictures.numpy(), bundle.decode_images(codes))
        assert torch.equal(theirs.encode(pictures).flatten(1), bundle.encode_images(pictures.numpy()))


def test_rows_that_ask_for_nothing_or_too_much_are_refused(folder):
    model = opened(folder)
    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    asked = model.caption_inputs(codes)
    with pytest.raises(ValueError, match="exactly 16 codes"):
        model.generate(**model.caption_inputs(codes[:, :3]))
    with pytest.raises(ValueError, match="end with the begin token"):
        model.generate(input_ids=torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="only 6 ids can follow"):
        model.generate(**asked, max_new_tokens=7)
    with pytest.raises(ValueError, match="attention_mask must be 0 where"):
        model(asked["input_ids"], attention_mask=torch.zeros_like(asked["input_ids"]))


def test_the_tokenizer_files_give_our_ids(folder):
    from transformers import AutoTokenizer

    ours = TextTokenizer.load(folder / "text.model")
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    draw = random.Random(0)
    letters = list("a cat red horse  一只猫，。！é\u0301\u200b\u200d\u2581\t\n\x07\x1c\u3000🐎<>0xE4pad") + ["<0xE4>", "</s>"]
    texts = ["", " ", "a cat", "一只猫", "<s><pad></s><unk>", "<end text><text padding>", "a\u200b \u200b b"]
    texts += ["".join(draw.choices(letters, k=draw.randrange(1, 30))) for _ in range(300)]
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids), repr(text)


def test_the_folder_needs_nothing_of_vilg(folder):
    # The lines of the model card.
    code = "import sys\nsys.modules['vilg'] = sys.modules['kernels'] = None\n"
    code += USE_WITH_TRANSFORMERS.replace("THIS_FOLDER", str(folder)) + "print(pictures.shape)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['") and done.stdout.endswith("torch.Size([1, 16, 16, 3])\n")
