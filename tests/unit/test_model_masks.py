"""Who influences whom through the whole model: every input slot is changed, and every logit that moves is listed."""

import pytest
import torch

from kernels.patterns import dense_mask
from tests.model_support import SPEC, mixed_batch, tiny_config, tiny_model
from vilg.model.attention import layer_patterns

T, S = SPEC.text_slots, SPEC.num_slots
CONFIGS = {
    "row only": tiny_config(num_layers=2, conv_size=1),  # row, then a conv window that sees only itself
    "schedule": tiny_config(),
    "wrap": tiny_config(row_style="wrap"),
    "dense": tiny_config(attention="dense", num_layers=2),
    "qk_norm": tiny_config(qk_norm=True, norm="rmsnorm"),
}


def influence(config) -> torch.Tensor:
    """Bool [B, S, S]: changing the input at slot k (last axis) moves the logits at slot j, in fp64 to the last bit."""
    model, batch = tiny_model(config, dtype=torch.float64), mixed_batch()

    def logits(text_input, image_input):
        with torch.no_grad():
            text, image = model(text_input, image_input, batch.text_len, batch.text_prefix, batch.image_is_target)
        return text, image

    base = logits(batch.text_input, batch.image_input)
    columns = []
    for slot in range(S):
        text_input, image_input = batch.text_input.clone(), batch.image_input.clone()
        if slot < T:
            text_input[:, slot] = (text_input[:, slot] + 1) % SPEC.text_vocab_size
        else:
            image_input[:, slot - T] = (image_input[:, slot - T] + 1) % SPEC.image_vocab_size
        moved = [(a != b).any(-1) for a, b in zip(logits(text_input, image_input), base)]
        columns.append(torch.cat(moved, 1))
    return torch.stack(columns, -1)


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def case(request):
    return request.param, mixed_batch(), influence(request.param)


def test_no_target_slot_is_influenced_by_a_later_one(case):
    _, batch, moved = case
    for sample, (prefix, length, image_is_target) in enumerate(
        zip(batch.text_prefix.tolist(), batch.text_len.tolist(), batch.image_is_target.tolist())
    ):
        targets = range(T, S) if image_is_target else range(prefix, length)
        for slot in targets:
            later = [k for k in targets if k > slot]
            assert not moved[sample, slot, later].any(), f"sample {sample}: target slot {slot} depends on a later one"


def test_no_source_slot_is_influenced_by_a_target(case):
    _, batch, moved = case
    for sample, (prefix, length, image_is_target) in enumerate(
        zip(batch.text_prefix.tolist(), batch.text_len.tolist(), batch.image_is_target.tolist())
    ):
        text_source = list(range(prefix))
        sources = text_source if image_is_target else [*text_source, *range(T, S)]
        targets = list(range(T, S)) if image_is_target else list(range(prefix, length))
        assert not moved[sample][sources][:, targets].any(), f"sample {sample}: a source depends on a target"


def test_padding_influences_nothing_but_itself(case):
    _, batch, moved = case
    for sample, length in enumerate(batch.text_len.tolist()):
        for slot in range(length, T):
            assert moved[sample, :, slot].nonzero().flatten().tolist() == [slot]


def test_influence_is_exactly_what_the_layers_masks_compose_to(case):
    config, batch, moved = case
    reach = torch.eye(S, dtype=torch.bool).expand(len(batch), S, S)
    for pattern in layer_patterns(config):
        mask = dense_mask(
            pattern, SPEC.grid, T, batch.text_len, batch.text_prefix, batch.image_is_target, conv_size=config.conv_size
        )
        step = (mask | torch.eye(S, dtype=torch.bool)).float()
        reach = (step @ reach.float()) > 0
    assert torch.equal(moved, reach)


def test_whole_prompt_reaches_every_image_target_and_whole_image_reaches_every_text_target(case):
    _, batch, moved = case
    for sample, (prefix, length, image_is_target) in enumerate(
        zip(batch.text_prefix.tolist(), batch.text_len.tolist(), batch.image_is_target.tolist())
    ):
        if image_is_target:
            assert moved[sample, T:, :prefix].all()
        else:
            assert moved[sample, prefix:length, T:].all()
