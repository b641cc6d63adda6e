"""The step of drawing whose slot is a tensor, guidance that moves, and what only a GPU can show: graphs."""

import numpy as np
import pytest
import torch

from vilg.config.schema import ModelConfig
from vilg.errors import UserError
from vilg.inference.drawing import Drawing
from vilg.inference.generate import generate_codes
from vilg.inference.image_decoder import ImageDecoder
from vilg.inference.sampling import SamplingConfig, candidate_uniforms, guidance_by_slot, guided, sample_tokens
from vilg.model.vilg import Vilg
from vilg.tokens.sequence import SequenceSpec, collate, text_to_image

SPEC = SequenceSpec(text_slots=6, grid=(4, 5), text_vocab_size=23, image_vocab_size=17)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
SEEDS = [3, 4]
ALL_SHAPES = pytest.mark.parametrize(
    "changes", [{}, {"row_style": "wrap"}, {"attention": "dense"}], ids=["row", "wrap", "dense"]
)
SAMPLINGS = [
    SamplingConfig(temperature=0.0),
    SamplingConfig(temperature=0.9, top_k=5),
    SamplingConfig(guidance=3.0, guidance_start=1.0, top_p=0.9),
]


def model_of(**changes) -> Vilg:
    """Heads of 32 channels, which the Triton kernels take."""
    model = Vilg(ModelConfig(num_layers=6, hidden_size=64, num_heads=2, conv_size=3, init_std=0.3, **changes), SPEC)
    model.reset_parameters(1)
    return model.eval()


def drawing_of(model: Vilg, sampling: SamplingConfig, *, num: int) -> Drawing:
    """The replayable drawing that `generate_codes` makes on a GPU."""
    device = next(model.parameters()).device
    conditions = [*PROMPTS, [], []] if sampling.is_guided else PROMPTS
    uniforms = np.stack([candidate_uniforms(seed, i, SPEC.image_slots) for seed in SEEDS for i in range(num)])
    decoder = ImageDecoder(model, SPEC, conditions, candidates=num)
    return Drawing(
        decoder, torch.from_numpy(uniforms).to(device), sampling, begin=SPEC.begin_of_image, replayable=True
    )


@ALL_SHAPES
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "top_k", "guided"])
@torch.inference_mode()
def test_a_step_whose_slot_is_a_tensor_draws_the_same_tokens(changes, sampling):
    model = model_of(**changes)
    expected = generate_codes(model, SPEC, PROMPTS, num=3, seeds=SEEDS, sampling=sampling)
    assert torch.equal(drawing_of(model, sampling, num=3).draw(graph=False), expected.flatten(0, 1))


def test_guidance_moves_in_a_straight_line_from_its_start_to_its_end():
    assert guidance_by_slot(SamplingConfig(guidance=2.5), 4).tolist() == [2.5] * 4
    assert guidance_by_slot(SamplingConfig(guidance=3.0, guidance_start=0.0), 4).tolist() == [0, 1, 2, 3]
    assert not SamplingConfig().is_guided and not SamplingConfig(guidance_start=1.0).is_guided
    assert SamplingConfig(guidance_start=2.0).is_guided
    with pytest.raises(UserError, match="guidance_start=-1: must be at least 0"):
        SamplingConfig(guidance_start=-1)


@torch.inference_mode()
def test_each_slot_is_drawn_with_its_own_guidance():
    model, sampling = model_of(), SamplingConfig(temperature=0.0, guidance=4.0, guidance_start=0.0)
    codes = generate_codes(model, SPEC, PROMPTS[:1], num=1, seeds=[0], sampling=sampling)[0]
    logits = [model(*collate([text_to_image(SPEC, text, codes[0].numpy())]).inputs())[1][0] for text in (PROMPTS[0], [])]
    for slot, scale in enumerate(np.linspace(0, 4, SPEC.image_slots)):
        row = guided(logits[0][slot], logits[1][slot], float(scale))[None]
        assert sample_tokens(row, torch.zeros(1, dtype=torch.float64), sampling) == codes[0, slot]


@pytest.mark.gpu
@ALL_SHAPES
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "top_k", "guided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replayed_graph_draws_the_same_tokens_as_the_step_run_each_time(changes, sampling, dtype):
    model = model_of(**changes).to("cuda", dtype)
    call = dict(num=3, seeds=SEEDS, sampling=sampling)
    replayed = generate_codes(model, SPEC, PROMPTS, **call)
    assert torch.equal(replayed, generate_codes(model, SPEC, PROMPTS, graph=False, **call))
    assert len(replayed.unique()) > 1


@pytest.mark.gpu
@ALL_SHAPES
@torch.inference_mode()
def test_logits_on_the_gpu_are_those_of_the_uncached_model(changes):
    model = model_of(**changes).to("cuda")
    codes = np.random.default_rng(0).integers(0, SPEC.image_vocab_size, (2, SPEC.image_slots))
    batch = collate([text_to_image(SPEC, p, c) for p, c in zip(PROMPTS, codes, strict=True)]).to("cuda")
    _, expected = model(*batch.inputs())
    decoder = ImageDecoder(model, SPEC, PROMPTS, candidates=1)
    for slot in range(SPEC.image_slots):
        slots = torch.full((2,), slot, dtype=torch.int32, device="cuda")
        found = decoder.step_at(slots, batch.image_input[:, slot])
        torch.testing.assert_close(found, expected[:, slot], rtol=1e-3, atol=1e-3)
