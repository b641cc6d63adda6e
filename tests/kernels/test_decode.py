"""Decoding slot by slot through the ring cache equals the forward pass over the whole sequence."""

import pytest
import torch

from kernels import PATTERNS, decode_attention, patterns, sparse_attention
from tests.kernels.cases import qkv, sample_tensors


@pytest.mark.parametrize("grid", [(1, 1), (5, 4), (4, 7)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_decoding_equals_forward_slot_by_slot(pattern, grid):
    samples, group, heads, text_slots, channels = 2, 3, 2, 6, 8
    num_slots = grid[0] * grid[1]
    q, k, v, _ = qkv(samples * group, heads, text_slots + num_slots, channels)
    k, v = k.clone(), v.clone()
    for x in (k, v):  # candidates of a sample share its text
        x[:, :, :text_slots] = x[::group, :, :text_slots].repeat_interleave(group, 0)
    lengths = [text_slots, 2]
    tensors = sample_tensors([(n, n, 1) for n in lengths for _ in range(group)])
    want = sparse_attention(q, k, v, grid=grid, pattern=pattern, conv_size=3, **tensors)
    capacity = patterns.cache_capacity(pattern, grid, conv_size=3)
    ring_k, ring_v = (torch.full((samples * group, heads, capacity, channels), float("nan")).double() for _ in range(2))
    ring_k.zero_()  # keys of entries never written only have to be finite, values may be anything
    prefix = torch.tensor(lengths, dtype=torch.int32)
    for slot in range(num_slots):
        ring_k[:, :, slot % capacity] = k[:, :, text_slots + slot]
        ring_v[:, :, slot % capacity] = v[:, :, text_slots + slot]
        slots = torch.full((samples * group,), slot, dtype=torch.int32)
        text = (x[::group, :, :text_slots] for x in (k, v))
        out = decode_attention(
            q[:, :, text_slots + slot], *text, ring_k, ring_v,
            grid=grid, pattern=pattern, conv_size=3, text_prefix=prefix, image_slot=slots,
        )  # fmt: skip
        assert (out - want[:, :, text_slots + slot]).abs().max() < 1e-12, f"slot {slot}"


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_decoding_in_the_types_that_models_have_is_near_fp64(pattern, dtype, tolerance):
    """At a slot whose ring is full and whose box ends at the grid's border, and at the first."""
    samples, group, grid = 2, 3, (5, 4)
    capacity = patterns.cache_capacity(pattern, grid, conv_size=3)
    q, image_k, image_v, _ = (x.to(dtype) for x in qkv(samples * group, 2, capacity, 16))
    _, text_k, text_v, _ = (x.to(dtype) for x in qkv(samples, 2, 6, 16, seed=1))
    call = (q[:, :, 0], text_k, text_v, image_k, image_v)
    places = dict(text_prefix=torch.tensor([6, 2]).int(), image_slot=torch.tensor([19, 19, 7, 0, 12, 19]).int())
    out = decode_attention(*call, grid=grid, pattern=pattern, conv_size=3, **places)
    exact = decode_attention(*(x.double() for x in call), grid=grid, pattern=pattern, conv_size=3, **places)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() / exact.abs().max() < tolerance


@pytest.mark.parametrize("change, text", [
    (dict(image_k=torch.zeros(4, 2, 9, 8)), r"image_k is \(4, 2, 9, 8\) .*needed \(4, 2, 5, 8\)"),
    (dict(text_k=torch.zeros(3, 2, 6, 8)), "q has 4 sequences, text_k 3 samples"),
    (dict(q=torch.zeros(4, 2, 1, 8)), r"expected \[B, H, D\]"),
    (dict(image_slot=torch.full((4,), 20, dtype=torch.int32)), r"image_slot=\[20, 20, 20, 20\] leaves 0 .. 19"),
    (dict(text_prefix=torch.zeros(2)), "text_prefix is .*float32"),
])  # fmt: skip
def test_bad_decoding_input_is_refused_with_the_values(change, text):
    call = dict(
        q=torch.zeros(4, 2, 8), text_k=torch.zeros(2, 2, 6, 8), text_v=torch.zeros(2, 2, 6, 8),
        image_k=torch.zeros(4, 2, 5, 8), image_v=torch.zeros(4, 2, 5, 8),
        text_prefix=torch.zeros(2, dtype=torch.int32), image_slot=torch.zeros(4, dtype=torch.int32),
    )  # fmt: skip
    call.update(change)
    positional = [call.pop(name) for name in ("q", "text_k", "text_v", "image_k", "image_v")]
    with pytest.raises(ValueError, match=text):
        decode_attention(*positional, grid=(4, 5), pattern="row", **call)
