"""Cached decoding of a model that is split over tensor ranks, as training draws its sample sheets with one."""

import numpy as np
import torch

from tests.distributed.helpers import run_distributed
from tests.model_support import SPEC, tiny_config, tiny_model
from vilg.inference.generate import generate_codes
from vilg.inference.sampling import SamplingConfig
from vilg.inference.text_decoder import TextDecoder
from vilg.parallel.grid import Grid

PROMPTS = [[5, 6, 7], [8]]


def drawn(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes drawn for two prompts, and the first text logits under two pictures."""
    model = tiny_model(grid=Grid.build(tensor=size)).eval()
    sampling = SamplingConfig(guidance=2.0, temperature=0.9)
    codes = generate_codes(model, SPEC, PROMPTS, num=2, seeds=[1, 2], sampling=sampling)
    pictures = np.random.default_rng(0).integers(0, SPEC.image_vocab_size, (2, SPEC.image_slots))
    with torch.inference_mode():
        logits = TextDecoder(model, SPEC, torch.from_numpy(pictures)).step(0, torch.ones(2, dtype=torch.long))
    return codes.clone(), logits.clone()


def test_every_tensor_rank_draws_what_one_process_draws():
    wanted_codes, wanted_logits = drawn(0, 1)
    for codes, logits in run_distributed(2, drawn):
        assert torch.equal(codes, wanted_codes)
        torch.testing.assert_close(logits, wanted_logits, rtol=1e-4, atol=1e-5)


def drawn_with_each_pattern(rank: int, size: int) -> list[torch.Tensor]:
    """Sixty candidates of one prompt: row layers of both styles and dense ones, greedy and sampled, with and without
    guidance."""
    found = []
    for changes in ({}, {"row_style": "wrap"}, {"attention": "dense"}):
        model = tiny_model(tiny_config(**changes), grid=Grid.build(tensor=size)).eval()
        for sampling in (SamplingConfig(temperature=0), SamplingConfig(guidance=2.0, temperature=0.9)):
            codes = generate_codes(model, SPEC, PROMPTS[:1], num=60, seeds=[3], sampling=sampling)
            found.append(codes.clone())
    return found


def test_sixty_candidates_are_the_same_on_two_tensor_ranks_for_every_pattern():
    wanted = drawn_with_each_pattern(0, 1)
    for found in run_distributed(2, drawn_with_each_pattern):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
