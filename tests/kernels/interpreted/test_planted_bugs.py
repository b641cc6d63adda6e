"""Bugs planted into copies of the kernels' source: the comparison with the reference must notice every one."""

import pytest
import torch

from kernels.attention import triton_forward, triton_key_gradient, triton_op, triton_query_gradient
from tests.kernels.cases import assert_matches_reference, qkv, sample_tensors
from tests.kernels.interpreted.kernel_calls import run
from tests.kernels.interpreted.planted import plant

BUGS = {
    "image causality off by one": (triton_forward, "(key[None, :] <= last[:, None])", "(key[None, :] < last[:, None])"),
    "text causality off by one": (triton_forward, "& (key[None, :] <= slot[:, None])\n", "& (key[None, :] < slot[:, None])\n"),
    "source text unread": (triton_forward, "tl.where(any_valid, prefix, 0)", "tl.where(any_valid, 0, 0)"),
    "image range one chunk short": (triton_forward, "range(0, count, BLOCK_N)", "range(0, count - BLOCK_N, BLOCK_N)"),
    "tail of a range unread": (triton_forward, "if whole < num_keys:", "if num_keys < whole:"),
    "missing rescale": (triton_forward, "acc * rescale[:, None] + dot", "acc + dot"),
    "padding row not zero": (triton_forward, "(running_sum == 0) | (valid == 0)", "running_sum == 0"),
    "delta forgotten": (triton_key_gradient, " - delta[None, :])", ")"),
    "transposed causality off by one": (triton_key_gradient, "query[None, :] >= earliest[:, None]", "query[None, :] > earliest[:, None]"),
    "target text reads all text": (triton_key_gradient, "is_source | (slot[:, None] <= query[None, :])", "is_source | (slot[:, None] < length)"),
    "text keys without image queries": (triton_key_gradient, "tl.where(holds_source, tl", "tl.where(holds_source == 0, tl"),
    "query gradient one chunk short": (triton_query_gradient, "range(0, count, BLOCK_N)", "range(0, count - BLOCK_N, BLOCK_N)"),
    "closed tile reads what follows": (triton_query_gradient, "(slot[None, :] <= last[:, None])", "(slot[None, :] <= slots)"),
    "closed tile without text queries": (triton_query_gradient, "tl.where(causal, 0, length)", "tl.where(causal, 0, 0)"),
    "closed tile's keys unscaled": (triton_query_gradient, "exists, dk * SCALE", "exists, dk"),
}  # fmt: skip


def compare() -> None:
    """A pattern whose tiles are closed and one whose tiles are not."""
    batch = [(70, 70, 1), (68, 20, 0)]
    for pattern, grid in (("conv", (7, 9)), ("row", (7, 8))):
        inputs = qkv(len(batch), 1, 70 + grid[0] * grid[1], 16)
        call = dict(grid=grid, pattern=pattern, conv_size=5, **sample_tensors(batch))
        assert_matches_reference(run, inputs, torch.float64, 1e-12, **call)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, tmp_path, monkeypatch):
    broken = plant(*BUGS[bug], tmp_path)
    for name in ("forward_kernel", "query_gradient_kernel", "text_key_gradient_kernel", "image_key_gradient_kernel"):
        if hasattr(broken, name):
            monkeypatch.setattr(triton_op, name, getattr(broken, name))
    with pytest.raises(AssertionError, match="error"):
        compare()


def test_the_comparison_passes_without_a_bug():
    compare()
