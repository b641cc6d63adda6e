"""The planner's activations and operations against what torch keeps and counts on a small model."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.model_support import SPEC, tiny_config, tiny_model
from vilg.config.schema import ParallelConfig
from vilg.model import size
from vilg.model.block import set_recompute
from vilg.tools.plan.memory import activation_bytes, block_activations

SEQUENCES = 3
MODES = [("none", 1), ("selective", 1), ("full", 1), ("full", 2), ("selective", 3)]
each_mode = pytest.mark.parametrize(("recompute", "every"), MODES)
# Without rmsnorm: a CPU composes it of several operations that keep more than a GPU's one kernel.
CONFIGS = {
    "layernorm": {},
    "qk_norm": dict(qk_norm=True),
    "sandwich": dict(sandwich_norm=True),
    "wide": dict(ffn_multiple=6, qk_norm=True),
}


class _LikeTheKernel(torch.autograd.Function):
    """Attention over all slots that keeps what the GPU kernel keeps (kernels/attention/triton_op.py): q, k, v, the
    result, one fp32 number per query and head."""

    @staticmethod
    def forward(ctx, q, k, v):
        scores = q @ k.transpose(2, 3)
        out = scores.softmax(-1) @ v
        ctx.save_for_backward(q, k, v, out, scores.logsumexp(-1).float())
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors[:3])
        with torch.enable_grad():
            return torch.autograd.grad((q @ k.transpose(2, 3)).softmax(-1) @ v, (q, k, v), grad)


def _attend(q, k, v, pattern):
    return _LikeTheKernel.apply(q, k, v)


def _blocks(config, recompute, every):
    model = tiny_model(config)
    set_recompute(model, ParallelConfig(recompute=recompute, recompute_every=every))
    return model.blocks


@each_mode
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_activations_are_what_torch_keeps(changes, recompute, every):
    config = tiny_config(hidden_size=64, num_heads=2, **changes)
    blocks = _blocks(config, recompute, every)
    own = {p.untyped_storage().data_ptr() for block in blocks for p in block.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    hidden = torch.randn(SEQUENCES, SPEC.num_slots, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for block in blocks:
            hidden = block(hidden, _attend)
    counted = sum(nbytes for nbytes, _ in kept.values())
    place = dict(slots=SEQUENCES * SPEC.num_slots, width=4, tensor=1, sequence=False)
    chosen = config.num_layers // every
    said = chosen * block_activations(config, recompute).bytes(**place)
    said += (config.num_layers - chosen) * block_activations(config, "none").bytes(**place)
    assert said == pytest.approx(counted, rel=0.03)


def test_activations_shrink_with_tensor_ranks_and_grow_with_micro_batches_in_flight():
    config = tiny_config(hidden_size=64)
    place = dict(blocks=range(5), sequences=2, width=2, recompute="none", recompute_every=1)
    alone = activation_bytes(config, SPEC, in_flight=1, tensor=1, sequence=False, **place)
    split = activation_bytes(config, SPEC, in_flight=1, tensor=4, sequence=False, **place)
    slots = activation_bytes(config, SPEC, in_flight=1, tensor=4, sequence=True, **place)
    assert slots < split < alone and alone / 4 < slots
    assert activation_bytes(config, SPEC, in_flight=4, tensor=1, sequence=False, **place) > 3.5 * alone


@each_mode
@pytest.mark.parametrize("changes", [{}, dict(sandwich_norm=True)], ids=["plain", "sandwich"])
def test_operations_with_what_is_computed_again_are_what_torch_counts(changes, recompute, every):
    # Dense and without a mask: the counter sees all pairs of slots, where size.py counts those that are visible.
    # (Sparse patterns on a CPU multiply bands that hold masked pairs too, so their counts differ by design.)
    config = tiny_config(attention="dense", hidden_size=32, **changes)
    blocks = _blocks(config, recompute, every)
    hidden = torch.randn(1, SPEC.num_slots, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        for block in blocks:
            hidden = block(hidden, lambda q, k, v, pattern: (q @ k.transpose(2, 3)).softmax(-1) @ v)
        hidden.sum().backward()
    parallel = ParallelConfig(recompute=recompute, recompute_every=every)
    again = size.recomputed_costs(config, SPEC, parallel)
    hidden_pairs = 4 * 32 * (SPEC.num_slots**2 - size.visible_pairs("dense", SPEC, image_is_target=True))
    passes = 3 * config.num_layers + sum(1 for cost in again if cost)
    said = 3 * sum(size.layer_costs(config, SPEC)[1:-1]) + sum(again) + passes * hidden_pairs
    assert counter.get_total_flops() == said


def test_nothing_is_computed_again_without_recomputation():
    config = tiny_config()
    assert not any(size.recomputed_costs(config, SPEC, ParallelConfig()))
    assert isinstance(_blocks(config, "none", 1)[0], nn.Module)
