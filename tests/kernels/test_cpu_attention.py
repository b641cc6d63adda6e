"""The CPU path behind the public call against the dense reference in fp64: output and every gradient."""

import pytest
import torch

from kernels import PATTERNS, attention_plan, sparse_attention
from kernels.attention import cpu
from tests.kernels.cases import assert_matches_reference, output_and_gradients, qkv, sample_tensors, samples

DIRECTIONS = ["text_to_image", "image_to_text", "question", "mixed"]


def batch_for(direction, grid, text_slots, heads=2, channels=8):
    batch = samples(direction, text_slots)
    return qkv(len(batch), heads, text_slots + grid[0] * grid[1], channels), sample_tensors(batch)


@pytest.fixture
def always_cut(monkeypatch):
    """Small shapes run through bands and lines as large ones do."""
    monkeypatch.setattr(cpu, "WHOLE_SLOTS", 0)
    monkeypatch.setattr(cpu, "BAND_QUERIES", 7)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cut_attention_matches_reference_at_odd_sizes(pattern, direction, always_cut):
    for grid, text_slots in [((1, 1), 0), ((1, 1), 1), ((3, 5), 5), ((6, 4), 1), ((4, 7), 0), ((5, 4), 13)]:
        inputs, tensors = batch_for(direction, grid, text_slots)
        call = dict(grid=grid, pattern=pattern, conv_size=3, **tensors)
        assert_matches_reference(sparse_attention, inputs, torch.float64, 1e-12, **call)
        assert_matches_reference(sparse_attention, inputs, torch.float32, 1e-5, **call)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_matches_reference_at_sizes_in_use(pattern):
    for grid, text_slots in [((8, 8), 16), ((16, 16), 77), ((13, 32), 128)]:
        inputs, tensors = batch_for("mixed", grid, text_slots, heads=1)
        assert_matches_reference(sparse_attention, inputs, torch.float32, 1e-5, grid=grid, pattern=pattern, **tensors)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_stays_near_reference(pattern, dtype, tolerance):
    inputs, tensors = batch_for("mixed", (8, 8), 16, channels=64)
    assert_matches_reference(sparse_attention, inputs, dtype, tolerance, grid=(8, 8), pattern=pattern, **tensors)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_gives_zeros_and_takes_no_gradient(pattern, always_cut):
    inputs, tensors = batch_for("mixed", (3, 5), 6)
    results = output_and_gradients(sparse_attention, *inputs, grid=(3, 5), pattern=pattern, **tensors)
    padding = torch.arange(6) >= tensors["text_len"][:, None]
    for result in results:
        assert padding.any() and (result[:, :, :6].transpose(1, 2)[padding] == 0).all()


def test_one_plan_serves_every_layer_of_a_batch():
    inputs, tensors = batch_for("mixed", (8, 8), 16)
    call = dict(grid=(8, 8), pattern="column", **tensors)
    plan = attention_plan(text_slots=16, dtype=torch.float64, **call)
    for with_plan, without in zip(
        output_and_gradients(sparse_attention, *inputs, plan=plan, **call),
        output_and_gradients(sparse_attention, *inputs, **call),
    ):
        assert torch.equal(with_plan, without)


@pytest.mark.parametrize("pattern", ["row", "conv"])
def test_autocast_changes_nothing_for_bf16_inputs(pattern, always_cut):
    inputs, tensors = batch_for("mixed", (3, 5), 6)
    half = [t.bfloat16() for t in inputs]
    call = dict(grid=(3, 5), pattern=pattern, **tensors)
    want = output_and_gradients(sparse_attention, *half, **call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = output_and_gradients(sparse_attention, *half, **call)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_plan_of_another_pattern_is_refused():
    inputs, tensors = batch_for("mixed", (3, 5), 6)
    plan = attention_plan(grid=(3, 5), pattern="row", text_slots=6, **tensors)
    with pytest.raises(ValueError, match="the plan is for .*'row'.*the call for .*'column'"):
        sparse_attention(*inputs[:3], grid=(3, 5), pattern="column", plan=plan, **tensors)


def broken(change):
    (q, k, v, _), tensors = batch_for("mixed", (3, 5), 6)
    call = dict(q=q, k=k, v=v, grid=(3, 5), pattern="row", **tensors)
    call.update(change(call))
    return sparse_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.parametrize("change, text", [
    (lambda c: {"pattern": "rows"}, "pattern='rows' is unknown"),
    (lambda c: {"pattern": "conv", "conv_size": 2}, "conv_size=2 must be an odd"),
    (lambda c: {"grid": (3, 9)}, "q has 21 slots, fewer than the 3x9 = 27 image slots"),
    (lambda c: {"grid": 15}, "grid=15 is not a pair"),
    (lambda c: {"q": c["q"][0]}, r"q has shape \(2, 21, 8\); expected \[B, H"),
    (lambda c: {"k": c["k"][:, :, :-1]}, "k is .*20.* but q is .*21"),
    (lambda c: {"v": c["v"].float()}, "v is .*float32.* but q is .*float64"),
    (lambda c: {"k": c["k"].mT.contiguous().mT}, r"k has stride \d+ in its last dimension; call k.contiguous"),
    (lambda c: {n: c[n].int() for n in "qkv"}, "q is torch.int32; use float32"),
    (lambda c: {"text_len": c["text_len"].long()}, "text_len is .*int64; expected an int32"),
    (lambda c: {"text_prefix": c["text_prefix"][:2]}, r"text_prefix is \(2,\) .* but text_len is \(4,\)"),
    (lambda c: {"text_prefix": c["text_len"] + 1}, "sample 0: text_prefix=7, text_len=6, T=6"),
    (lambda c: {"text_len": c["text_len"] + 1}, "sample 0: .*text_len=7, T=6"),
    (lambda c: {"image_is_target": c["text_len"]}, "image_is_target=6; needed: .* and 0 or 1"),
    (lambda c: {n: c[n][:1] for n in "qkv"}, "text_len has 4 samples on cpu, q has 1"),
])  # fmt: skip
def test_bad_input_is_refused_with_the_values(change, text):
    with pytest.raises(ValueError, match=text):
        broken(change)
