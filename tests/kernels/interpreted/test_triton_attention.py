"""Forward and backward kernels against the dense reference in fp64: output and every gradient, memory poisoned."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import PATTERNS, runtime
from kernels.attention import triton_op
from kernels.attention.reference import reference_attention
from kernels.patterns import dense_mask, window
from tests.kernels.cases import assert_matches_reference, output_and_gradients, qkv, sample_tensors, samples
from tests.kernels.interpreted.kernel_calls import run

DIRECTIONS = ["text_to_image", "image_to_text", "question", "mixed"]


def batch_for(direction, grid, text_slots, heads=1, channels=16):
    batch = samples(direction, text_slots)
    return qkv(len(batch), heads, text_slots + grid[0] * grid[1], channels), sample_tensors(batch)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernels_match_reference_in_every_direction(pattern, direction):
    inputs, tensors = batch_for(direction, (3, 5), 5, heads=2 if direction == "mixed" else 1)
    call = dict(grid=(3, 5), pattern=pattern, conv_size=3, **tensors)
    assert_matches_reference(run, inputs, torch.float64, 1e-12, **call)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernels_match_reference_over_several_tiles(pattern):
    inputs, tensors = batch_for("mixed", (9, 13), 77)
    assert_matches_reference(run, inputs, torch.float64, 1e-12, grid=(9, 13), pattern=pattern, conv_size=5, **tensors)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid, text_slots", [((1, 1), 0), ((1, 1), 1), ((8, 8), 0)])
def test_kernels_match_reference_at_degenerate_sizes(pattern, grid, text_slots):
    inputs, tensors = batch_for("mixed", grid, text_slots)
    assert_matches_reference(run, inputs, torch.float64, 1e-12, grid=grid, pattern=pattern, **tensors)


@pytest.mark.parametrize("scale", [2.0, 0.0, -0.3])
@pytest.mark.parametrize("pattern", ["row", "conv"])
def test_any_factor_of_the_scores_is_taken(pattern, scale):
    inputs, tensors = batch_for("mixed", (3, 5), 5)
    call = dict(grid=(3, 5), pattern=pattern, conv_size=3, scale=scale, **tensors)
    assert_matches_reference(run, inputs, torch.float64, 1e-12, **call)


@pytest.mark.parametrize("channels", [32, 80])
def test_fp32_stays_within_1e_5(channels):
    inputs, tensors = batch_for("mixed", (5, 9), 9, channels=channels)
    assert_matches_reference(run, inputs, torch.float32, 1e-5, grid=(5, 9), pattern="conv", conv_size=3, **tensors)


@pytest.mark.parametrize("pattern, channels", [("row", 64), ("conv", 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_little_more_than_dense_torch_attention(pattern, channels, dtype):
    inputs, tensors = batch_for("mixed", (8, 8), 13, channels=channels)
    half = [t.to(dtype) for t in inputs]
    call = dict(grid=(8, 8), pattern=pattern, conv_size=5, **tensors)
    mask = dense_mask(pattern, (8, 8), 13, **tensors, conv_size=5)[:, None]

    def torch_attention(q, k, v, **_):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~mask.any(-1, keepdim=True))
        return out.masked_fill(~mask.any(-1, keepdim=True), 0)

    exact = output_and_gradients(reference_attention, *(t.double() for t in half), **call)
    ours = output_and_gradients(run, *half, **call)
    theirs = output_and_gradients(torch_attention, *half, **call)
    for name, want, a, b in zip(("out", "dq", "dk", "dv"), exact, ours, theirs):
        our_error, their_error = ((x.double() - want).norm() for x in (a, b))
        assert our_error <= 2 * their_error, f"{name}: {our_error:.2e} against {their_error:.2e}"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_are_exactly_zero_outside_the_mask(pattern):
    (q, k, v, grad), tensors = batch_for("mixed", (4, 5), 6)
    mask = dense_mask(pattern, (4, 5), 6, **tensors, conv_size=3)
    for query in (1, 4, 6, 17, 25):
        only = torch.zeros_like(grad)
        only[:, :, query] = grad[:, :, query]
        _, dq, dk, dv = output_and_gradients(run, q, k, v, only, grid=(4, 5), pattern=pattern, conv_size=3, **tensors)
        unseen = ~mask[:, query]
        for gradient in (dk, dv):
            assert (gradient.transpose(1, 2)[unseen] == 0).all()
        assert (dv.transpose(1, 2)[~unseen] != 0).all()
        assert (dq[:, :, [s for s in range(q.shape[2]) if s != query]] == 0).all()


def test_text_gradients_summed_over_chunks_match_reference(monkeypatch):
    monkeypatch.setattr(triton_op, "CHUNK_SLOTS", 32)
    inputs, tensors = batch_for("mixed", (9, 9), 5)
    assert_matches_reference(run, inputs, torch.float64, 1e-12, grid=(9, 9), pattern="row", **tensors)


@pytest.mark.parametrize("pattern", ["row", "conv"])
def test_wide_heads_on_ampere_match_reference(pattern, monkeypatch):
    """There neither closed tiles nor split ranges fit the registers: the kernels take their other form."""
    monkeypatch.setattr(runtime, "device_capability", lambda device: 80)
    inputs, tensors = batch_for("mixed", (7, 8), 70, channels=80)
    assert_matches_reference(run, inputs, torch.float64, 1e-12, grid=(7, 8), pattern=pattern, conv_size=5, **tensors)


def test_custom_ops_keep_torchs_contract():
    (q, k, v, grad), tensors = batch_for("mixed", (3, 5), 5)
    view = window("row", (3, 5))
    arguments = (*tensors.values(), [view.rows, view.cols, view.reach_rows, view.reach_cols], 0.25)
    leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(triton_op.attention_forward, (*leaves, *arguments), test_utils=utilities)
    out, lse = triton_op.attention_forward(q, k, v, *arguments)
    torch.library.opcheck(triton_op.attention_backward, (grad, q, k, v, out, lse, *arguments), test_utils=utilities)


def test_compiled_and_checkpointed_calls_give_the_same_gradients():
    inputs, tensors = batch_for("mixed", (3, 5), 5)
    call = dict(grid=(3, 5), pattern="column", **tensors)

    def checkpointed(q, k, v):
        return checkpoint(lambda *x: run(*x, **call) * 2, q, k, v, use_reentrant=False)

    def plain(q, k, v):
        return run(q, k, v, **call) * 2

    want = output_and_gradients(plain, *inputs)
    for function in (checkpointed, torch.compile(plain, backend="aot_eager", fullgraph=True)):
        for a, b in zip(output_and_gradients(function, *inputs), want):
            assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("text_slots", [0, 1, 5, 77, 128])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 8), (16, 16), (13, 32), (32, 32)])
def test_kernels_match_reference_over_the_whole_matrix(pattern, grid, text_slots):
    for direction in DIRECTIONS:
        inputs, tensors = batch_for(direction, grid, text_slots)
        assert_matches_reference(run, inputs, torch.float64, 1e-12, grid=grid, pattern=pattern, **tensors)


def test_integers_of_samples_may_be_strided():
    inputs, tensors = batch_for("mixed", (3, 5), 5)
    strided = {name: torch.stack([value, torch.full_like(value, 99)], 1)[:, 0] for name, value in tensors.items()}
    assert all(not value.is_contiguous() for value in strided.values())
    assert_matches_reference(run, inputs, torch.float64, 1e-12, grid=(3, 5), pattern="row", **strided)


@pytest.mark.parametrize("wrong", [dict(text_prefix=-5), dict(text_len=-3), dict(text_len=-3, text_prefix=-5), dict(text_len=99)])
def test_integers_that_cannot_be_read_nothing_out_of_bounds(wrong):
    inputs, tensors = batch_for("mixed", (3, 5), 5)
    around = []
    for x in inputs:
        wide = x.new_full((*x.shape[:2], x.shape[2] + 128, x.shape[3]), float("nan"))
        wide[:, :, 64:-64] = x
        around.append(wide[:, :, 64:-64])
    samples = tensors | {name: torch.full_like(tensors[name], value) for name, value in wrong.items()}
    assert all(x.isfinite().all() for x in output_and_gradients(run, *around, grid=(3, 5), pattern="column", **samples))
