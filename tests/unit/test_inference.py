"""Cached decoding against the whole model without a cache, for every pattern and both directions."""

import numpy as np
import pytest
import torch

from vilg.config.schema import ModelConfig
from vilg.errors import UserError
from vilg.inference.draw_command import generate_main
from vilg.inference.generate import generate_codes
from vilg.inference.image_decoder import ImageDecoder
from vilg.inference.likelihood import text_log_likelihood
from vilg.inference.sampling import SamplingConfig, candidate_uniforms, guided, sample_tokens
from vilg.inference.text_decoder import TextDecoder
from vilg.model.vilg import Vilg
from vilg.tokens.sequence import SequenceSpec, collate, image_to_text, text_to_image

GRID = (4, 5)
SPEC = SequenceSpec(text_slots=6, grid=GRID, text_vocab_size=23, image_vocab_size=17)
PROMPTS = [[5, 6, 7], [8], [], [4, 5, 6, 7, 8, 9]]


def tiny_model(**changes) -> Vilg:
    config = ModelConfig(num_layers=6, hidden_size=32, num_heads=2, conv_size=3, init_std=0.3, **changes)
    model = Vilg(config, SPEC)
    model.reset_parameters(1)
    return model.eval()


def random_codes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SPEC.image_vocab_size, (count, SPEC.image_slots))


@pytest.mark.parametrize("changes", [{}, {"row_style": "wrap"}, {"attention": "dense"}, {"qk_norm": True}])
@torch.inference_mode()
def test_cached_image_logits_equal_the_uncached_model(changes):
    model = tiny_model(**changes)
    codes = random_codes(2 * len(PROMPTS))
    decoder = ImageDecoder(model, SPEC, PROMPTS, candidates=2)
    prompts_of_rows = [prompt for prompt in PROMPTS for _ in range(2)]
    batch = collate([text_to_image(SPEC, p, c) for p, c in zip(prompts_of_rows, codes, strict=True)])
    _, expected = model(*batch.inputs())
    for slot in range(SPEC.image_slots):
        found = decoder.step(slot, batch.image_input[:, slot])
        torch.testing.assert_close(found, expected[:, slot], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"row_style": "wrap"}, {"attention": "dense"}])
@torch.inference_mode()
def test_cached_text_logits_equal_the_uncached_model(changes):
    model = tiny_model(**changes)
    codes = random_codes(3)
    captions = [[5, 6, 7], [8, 9, 10], [4, 5, 6]]
    batch = collate([image_to_text(SPEC, t, c) for t, c in zip(captions, codes, strict=True)])
    expected, _ = model(*batch.inputs())
    decoder = TextDecoder(model, SPEC, torch.from_numpy(codes))
    for slot in range(4):
        found = decoder.step(slot, batch.text_input[:, slot])
        torch.testing.assert_close(found, expected[:, slot], rtol=1e-4, atol=1e-4)


def uncached_codes(model, prompt, uniforms, sampling):
    """The same draw without any cache: the whole sequence again for every slot."""
    codes = np.zeros(SPEC.image_slots, np.int64)
    for slot in range(SPEC.image_slots):
        logits = [
            model(*collate([text_to_image(SPEC, text, codes)]).inputs())[1][:, slot].float() for text in (prompt, [])
        ]
        mixed = guided(logits[0], logits[1], sampling.guidance)
        codes[slot] = int(sample_tokens(mixed, torch.from_numpy(uniforms[slot : slot + 1]), sampling))
    return codes


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(temperature=0),
        SamplingConfig(temperature=0.9, top_k=5),
        SamplingConfig(guidance=3.0, temperature=1.0, top_p=0.9),
    ],
    ids=["greedy", "top_k", "guided_top_p"],
)
@torch.inference_mode()
def test_cached_generation_draws_the_same_tokens_as_uncached(sampling):
    model = tiny_model()
    codes = generate_codes(model, SPEC, PROMPTS[:2], num=2, seeds=[11, 12], sampling=sampling)
    for row, (prompt, seed) in enumerate(zip(PROMPTS[:2], [11, 12], strict=True)):
        for candidate in range(2):
            uniforms = candidate_uniforms(seed, candidate, SPEC.image_slots)
            assert codes[row, candidate].tolist() == uncached_codes(model, prompt, uniforms, sampling).tolist()


@pytest.mark.parametrize("changes", [{}, {"row_style": "wrap"}, {"attention": "dense"}], ids=["row", "wrap", "dense"])
@pytest.mark.parametrize("guidance", [1.0, 2.5], ids=["unguided", "guided"])
@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
@torch.inference_mode()
def test_sixty_candidates_of_a_prompt_are_the_tokens_drawn_without_a_cache(changes, guidance, temperature):
    """All 60 by teacher forcing: each token is drawn again from the logits of one pass over the whole sequence."""
    model, sampling = tiny_model(**changes), SamplingConfig(guidance=guidance, temperature=temperature, top_p=0.95)
    codes = generate_codes(model, SPEC, PROMPTS[:1], num=60, seeds=[7], sampling=sampling)[0]
    logits = [
        model(*collate([text_to_image(SPEC, text, code) for code in codes.numpy()]).inputs())[1].float()
        for text in (PROMPTS[0], [])
    ]
    mixed = guided(*logits, guidance)  # [60, N, V]
    uniforms = torch.from_numpy(np.stack([candidate_uniforms(7, i, SPEC.image_slots) for i in range(60)]))
    expected = sample_tokens(mixed.flatten(0, 1), uniforms.flatten(), sampling).view_as(codes)
    assert torch.equal(codes, expected)


def test_a_candidate_does_not_depend_on_the_batch_it_is_drawn_in():
    model, sampling = tiny_model(), SamplingConfig(guidance=2.0)
    seeds = [3, 4, 5, 6]
    together = generate_codes(model, SPEC, PROMPTS, num=5, seeds=seeds, sampling=sampling)
    for batch_rows in (1, 3, 10):
        apart = generate_codes(model, SPEC, PROMPTS, num=5, seeds=seeds, sampling=sampling, batch_rows=batch_rows)
        assert torch.equal(together, apart)
    fewer = generate_codes(model, SPEC, PROMPTS[1:2], num=2, seeds=seeds[1:2], sampling=sampling)
    assert torch.equal(fewer[0], together[1, :2])


def test_the_ring_cache_of_sparse_layers_is_smaller_than_a_dense_one():
    prompts = [[5, 6]]
    sparse = ImageDecoder(tiny_model(), SPEC, prompts, candidates=8).cache.num_bytes
    dense = ImageDecoder(tiny_model(attention="dense"), SPEC, prompts, candidates=8).cache.num_bytes
    assert sparse < 0.6 * dense


@torch.inference_mode()
def test_text_likelihood_is_the_mean_log_probability_of_the_caption():
    model = tiny_model()
    codes, texts = torch.from_numpy(random_codes(3)), [[5, 6, 7], [8], [4, 5]]
    found = text_log_likelihood(model, SPEC, codes, texts, batch=2)
    for row, text in enumerate(texts):
        logits, _ = model(*collate([image_to_text(SPEC, text, codes[row].numpy())]).inputs())
        log_probs = logits[0].log_softmax(-1)
        expected = sum(log_probs[i, token] for i, token in enumerate([*text, 2])) / (len(text) + 1)
        assert found[row] == pytest.approx(float(expected), rel=1e-4)


def test_sampling_follows_the_distribution_and_its_cuts():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniforms = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    logits = probs.log().expand(len(uniforms), -1)

    def shares(config):
        return torch.bincount(sample_tokens(logits, uniforms, config), minlength=4) / len(uniforms)

    torch.testing.assert_close(shares(SamplingConfig()), probs, atol=1e-3, rtol=0)
    torch.testing.assert_close(shares(SamplingConfig(top_k=2)), torch.tensor([0.625, 0.375, 0, 0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(shares(SamplingConfig(top_p=0.7)), torch.tensor([0.625, 0.375, 0, 0]), atol=1e-3, rtol=0)
    assert shares(SamplingConfig(temperature=0))[0] == 1
    squared = probs**2 / (probs**2).sum()
    torch.testing.assert_close(shares(SamplingConfig(temperature=0.5)), squared, atol=1e-3, rtol=0)


def test_forbidden_tokens_are_never_drawn_even_at_the_end_of_the_distribution():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for uniform in (0.0, 0.5, 1 - 1e-16):
        assert int(sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), SamplingConfig())) == 1


@pytest.mark.parametrize("bad", [{"guidance": -1}, {"temperature": -0.1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}])
def test_impossible_sampling_settings_name_the_field_and_what_would_work(bad):
    with pytest.raises(UserError, match=f"{next(iter(bad))}=.*must be"):
        SamplingConfig(**bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device abacus", "--device abacus: cannot be used here"),
        ("--out {file}", "is a file; name a folder"),
        ("--batch 0", "--batch 0"),
        ("--seed -1", "--seed -1"),
        ("--num 0", "--num 0: draw at least one"),
        ("--num 4 --best 5", "--best 5: keep between 1 and --num 4"),
    ],
)
def test_options_that_cannot_work_are_named_before_the_model_is_opened(tmp_path, options, message):
    (tmp_path / "file").touch()
    given = options.format(file=tmp_path / "file").split()
    with pytest.raises(UserError, match=message):
        generate_main(["--model", "no-model", "--prompt", "a cat", "--out", str(tmp_path / "out"), *given])
