"""The decode kernel against the torch formulation, whose own test is slot by slot against the forward pass."""

import pytest
import torch

from kernels import PATTERNS, patterns
from kernels.attention.decode import torch_decode
from kernels.attention.triton_decode import decode
from tests.kernels.cases import qkv


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_decode_kernel_matches_torch_for_sequences_at_different_slots(pattern, group):
    grid, samples, heads, text_slots, channels = (6, 7), 2, 2, 37, 20
    view = patterns.window(pattern, grid, 5)
    capacity = patterns.cache_capacity(pattern, grid, conv_size=5)
    q, image_k, image_v, _ = qkv(samples * group, heads, capacity, channels)
    _, text_k, text_v, _ = qkv(samples, heads, text_slots, channels, seed=1)
    slots = torch.arange(samples * group, dtype=torch.int32) * 41 // (samples * group - 1)
    prefix = torch.tensor([text_slots, 0], dtype=torch.int32)
    call = (q[:, :, 0], text_k, text_v, image_k, image_v, prefix, slots)
    want = torch_decode(*call, view, 0.3)
    got = decode(*call, [view.rows, view.cols, view.reach_rows, view.reach_cols], 0.3)
    assert got.shape == want.shape and (got - want).abs().max() < 1e-12
    half = [t.bfloat16() if t.is_floating_point() else t for t in call]
    got = decode(*half, [view.rows, view.cols, view.reach_rows, view.reach_cols], 0.3)
    assert got.dtype == torch.bfloat16 and (got.double() - want).abs().max() < 3e-2


def test_decode_kernel_takes_a_slot_that_all_sequences_share():
    q, image_k, image_v, _ = qkv(4, 2, patterns.cache_capacity("row", (6, 7)), 20)
    _, text_k, text_v, _ = qkv(2, 2, 9, 20, seed=1)
    view = patterns.window("row", (6, 7))
    slots = torch.tensor([17], dtype=torch.int32).expand(4)
    call = (q[:, :, 0], text_k, text_v, image_k, image_v, torch.tensor([9, 4], dtype=torch.int32), slots)
    got = decode(*call, [view.rows, view.cols, view.reach_rows, view.reach_cols], 0.3)
    assert (got - torch_decode(*call, view, 0.3)).abs().max() < 1e-12
