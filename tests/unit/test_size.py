"""Counts from the config alone against the built model and against brute force."""

from itertools import combinations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.patterns import PATTERNS, dense_mask
from tests.model_support import SPEC, mixed_batch, tiny_config, tiny_model
from vilg.config.schema import ModelConfig
from vilg.model import size
from vilg.model.loss import loss_sums
from vilg.model.vilg import Vilg
from vilg.tokens.sequence import SequenceSpec

TEN_BILLION = ModelConfig(num_layers=48, hidden_size=4096, num_heads=64)
TEN_BILLION_SPEC = SequenceSpec(text_slots=64, grid=(32, 32), text_vocab_size=32768, image_vocab_size=8192)
CONFIGS = {
    "tiny": (tiny_config(), SPEC),
    "rmsnorm, qk_norm": (tiny_config(norm="rmsnorm", qk_norm=True, ffn_multiple=3), SPEC),
    "layernorm, qk_norm, sandwich, odd grid": (tiny_config(qk_norm=True, sandwich_norm=True), SequenceSpec(5, (3, 7), 24, 16)),
    "10b": (TEN_BILLION, TEN_BILLION_SPEC),
}
each_config = pytest.mark.parametrize(("config", "spec"), CONFIGS.values(), ids=CONFIGS)


@each_config
def test_parameters_equal_the_built_models_layer_by_layer(config, spec):
    model = Vilg(config, spec, device="meta")
    built = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    assert size.layer_parameters(config, spec) == built
    assert size.num_parameters(config, spec) == sum(built)


def test_ten_billion_shape_has_its_ten_billion():
    blocks = 48 * size.block_parameters(TEN_BILLION)
    assert blocks == pytest.approx(12 * 48 * 4096**2, rel=1e-3)
    assert 9.9e9 < size.num_parameters(TEN_BILLION, TEN_BILLION_SPEC) < 10.1e9


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 7), (8, 8), (13, 2)])
@pytest.mark.parametrize("image_is_target", [0, 1])
def test_visible_pairs_equal_a_count_of_the_mask(pattern, grid, image_is_target):
    spec = SequenceSpec(5, grid, 24, 16)
    length = torch.tensor([5], dtype=torch.int32)
    direction = torch.tensor([image_is_target], dtype=torch.int32)
    mask = dense_mask(pattern, grid, 5, length, length * image_is_target, direction, conv_size=5)
    counted = size.visible_pairs(pattern, spec, image_is_target=bool(image_is_target), conv_size=5)
    assert counted == int(mask.sum())


class _AttendToAll:
    """Stands in for `SparseAttend`: attention without a mask, so that the counter sees all S * S pairs."""

    def __init__(self, *arguments, **options):
        pass

    def __call__(self, q, k, v, pattern):
        return (q @ k.transpose(2, 3)).softmax(-1) @ v


@pytest.mark.parametrize(
    "changes", [{}, dict(qk_norm=True, sandwich_norm=True, ffn_multiple=3, dropout=0.1)], ids=["plain", "with all"]
)
def test_operations_of_the_whole_dense_model_equal_torchs_count(changes, monkeypatch):
    config = tiny_config(attention="dense", hidden_size=32, **changes)
    monkeypatch.setattr("vilg.model.vilg.SparseAttend", _AttendToAll)
    model, batch = tiny_model(config).train(), mixed_batch()
    hidden_pairs = 4 * 32 * (SPEC.num_slots**2 - size.visible_pairs("dense", SPEC, image_is_target=True))
    masked = len(batch) * config.num_layers * hidden_pairs
    with FlopCounterMode(display=False) as counter:
        logits = model(*batch.inputs(), dropout_seeds=torch.arange(len(batch)))
        assert counter.get_total_flops() == len(batch) * sum(size.layer_costs(config, SPEC)) + masked
        loss_sums(*logits, batch.text_target, batch.image_target, z_loss=True).sum().backward()
        assert counter.get_total_flops() == len(batch) * size.sequence_flops(config, SPEC) + 3 * masked
    assert all(p.grad is not None for p in model.parameters())


def test_operations_per_token_of_the_ten_billion_model_match_the_papers_arithmetic():
    # 6 P + 12 L h s per token with full attention (paper.md 1.7: 6.12e10 at s = 1088).
    dense = TEN_BILLION.model_copy(update={"attention": "dense"})
    per_token = size.sequence_flops(dense, TEN_BILLION_SPEC, image_is_target=False) / TEN_BILLION_SPEC.num_slots
    assert per_token == pytest.approx(6.12e10, rel=0.02)


def test_stage_cut_weighs_the_embedding_and_flops_do_not():
    config = ModelConfig(num_layers=12, hidden_size=1024, num_heads=16)
    spec = SequenceSpec(text_slots=64, grid=(16, 16), text_vocab_size=32768, image_vocab_size=8192)
    costs = size.stage_costs(config, spec)
    assert costs[0] / costs[1] == pytest.approx(0.15, abs=0.03)  # as measured, two sequences a micro-batch
    assert size.layer_costs(config, spec)[0] == 0
    # By operations alone Embed would have been put before three blocks.
    assert size.stage_bounds(costs, 6) == (0, 3, 6, 8, 10, 12, 14)


def test_stages_are_cut_where_the_dearest_is_cheapest():
    for costs in ([0, 4, 4, 4, 4, 1], [0, 3, 9, 2, 2, 7, 5], [5] * 6, [0, 1, 1, 1, 20]):
        for stages in range(1, len(costs) + 1):
            bounds = size.stage_bounds(costs, stages)
            assert bounds[0] == 0 and bounds[-1] == len(costs) and sorted(set(bounds)) == list(bounds)
            cuts = ((0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), stages - 1))
            dearest = [max(sum(costs[a:b]) for a, b in zip(cut, cut[1:])) for cut in cuts]
            assert max(sum(costs[a:b]) for a, b in zip(bounds, bounds[1:])) == min(dearest)
    with pytest.raises(ValueError, match="3 layers cannot fill 4 pipeline stages"):
        size.stage_bounds([1, 1, 1], 4)
