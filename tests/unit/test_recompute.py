"""Recomputed activations: less is kept, and every number stays the same."""

import pytest
import torch

from tests.model_support import mixed_batch, tiny_config, tiny_model
from vilg.config.schema import ParallelConfig
from vilg.model.block import set_recompute
from vilg.model.loss import direction_losses
from vilg.parallel.rng import sequence_seeds

MODES = {
    "none": {},
    "selective": {"recompute": "selective"},
    "every second layer": {"recompute": "full", "recompute_every": 2},
    "full": {"recompute": "full"},
}


@pytest.fixture(scope="module")
def runs():
    """Mode -> numbers that the graph keeps for the backward, loss, gradients, of a model with dropout."""
    found = {}
    for mode, options in MODES.items():
        model, batch = tiny_model(tiny_config(dropout=0.2)), mixed_batch()
        set_recompute(model, ParallelConfig(**options))
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(*batch.inputs(), dropout_seeds=sequence_seeds(0, step=1, first=0, count=len(batch)))
            loss = sum(direction_losses(*logits, batch.text_target, batch.image_target))
        size = sum(kept.values())
        loss.backward()
        found[mode] = size, loss.detach(), [p.grad for p in model.parameters()]
    return found


def test_each_mode_keeps_less_than_the_one_before(runs):
    sizes = [runs[mode][0] for mode in MODES]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert sizes[-1] < 0.5 * sizes[0]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_loss_and_gradients_stay_the_same_in_every_bit(runs, mode):
    assert torch.equal(runs[mode][1], runs["none"][1])
    assert all(map(torch.equal, runs[mode][2], runs["none"][2]))
