"""parallel.compile: the same numbers, and one compilation for all blocks."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from tests.model_support import mixed_batch, tiny_config, tiny_model
from vilg.config.schema import ParallelConfig
from vilg.model.block import compile_blocks, set_recompute
from vilg.model.loss import direction_losses
from vilg.parallel.rng import sequence_seeds

OPTIONS = dict(dropout=0.2, qk_norm=True, sandwich_norm=True)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def loss_and_gradients(*, compiled: bool, recompute: str = "none"):
    """Of a model with every part that a block can have."""
    model, batch = tiny_model(tiny_config(**OPTIONS)), mixed_batch()
    set_recompute(model, ParallelConfig(recompute=recompute))
    if compiled:
        compile_blocks(model)
    logits = model(*batch.inputs(), dropout_seeds=sequence_seeds(0, step=1, first=0, count=len(batch)))
    loss = sum(direction_losses(*logits, batch.text_target, batch.image_target))
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_all_blocks_share_two_graphs_and_compute_the_same(recompute, monkeypatch):
    """Traced and run operation by operation, so every bit is the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    expected, gradients = loss_and_gradients(compiled=False, recompute=recompute)
    loss, found = loss_and_gradients(compiled=True, recompute=recompute)
    assert torch.equal(loss, expected)
    for ours, wanted in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.slow
def test_fused_code_computes_the_same():
    expected, gradients = loss_and_gradients(compiled=False)
    loss, found = loss_and_gradients(compiled=True)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, wanted in zip(found, gradients, strict=True):
        assert float((ours - wanted).norm() / wanted.norm()) < 1e-5
