"""Bugs planted into copies of the kernels' source: the comparison with the reference must notice every one."""

import pytest
import torch

from kernels.attention import triton_common, triton_forward, triton_key_gradient, triton_op, triton_query_gradient
from tests.kernels.cases import assert_matches_reference, qkv, sample_tensors
from tests.kernels.interpreted.kernel_calls import run
from tests.kernels.interpreted.planted import plant

BUGS = {
    "row causality off by one": (triton_common, "    ahead_cols = tl.where(causal, 0, REACH_COLS)", "    ahead_cols = tl.where(causal, 1, REACH_COLS)"),
    "row's share one slot short": (triton_common, "tl.minimum(col + ahead_cols, COLS - 1)", "tl.minimum(col + ahead_cols, COLS - 2)"),
    "column causality off by one": (triton_common, "    ahead_rows = tl.where(causal, 0, REACH_ROWS)", "    ahead_rows = tl.where(causal, 1, REACH_ROWS)"),
    "columns of a tile mixed": (triton_common, "== (col - col_start)[:, None])", "<= (col - col_start)[:, None])"),
    "conv causality off by one": (triton_common, "box_place[None, :] <= tl.where", "box_place[None, :] < tl.where"),
    "text causality off by one": (triton_forward, "& (key[None, :] <= slot[:, None])\n", "& (key[None, :] < slot[:, None])\n"),
    "source text unread": (triton_forward, "tl.where(any_valid, prefix, 0)", "tl.where(any_valid, 0, 0)"),
    "image range one chunk short": (triton_forward, "range(0, count, BLOCK_N)", "range(0, count - BLOCK_N, BLOCK_N)"),
    "tail of a range unread": (triton_forward, "if whole < num_keys:", "if num_keys < whole:"),
    "missing rescale": (triton_forward, "acc * rescale[:, None] + dot", "acc + dot"),
    "padding row not zero": (triton_forward, "(running_sum == 0) | (valid == 0)", "running_sum == 0"),
    "delta forgotten": (triton_key_gradient, " - delta[None, :])", ")"),
    "transposed conv causality off by one": (triton_common, "box_place[None, :] >= tl.where", "box_place[None, :] > tl.where"),
    "transposed row causality forgotten": (triton_common, "back_cols = tl.where(causal, 0, REACH_COLS)", "back_cols = REACH_COLS"),
    "target text reads all text": (triton_key_gradient, "is_source | (slot[:, None] <= query[None, :])", "is_source | (slot[:, None] < length)"),
    "text keys without image queries": (triton_key_gradient, "tl.where(holds_source, tl", "tl.where(holds_source == 0, tl"),
    "query gradient one chunk short": (triton_query_gradient, "range(0, count, BLOCK_N)", "range(0, count - BLOCK_N, BLOCK_N)"),
    "closed tile reads what follows": (triton_query_gradient, "seen = seen & exists[None, :]", "seen = (row[:, None] == row[None, :]) & exists[None, :]"),
    "closed tile without text queries": (triton_query_gradient, "tl.where(causal, 0, length)", "tl.where(causal, 0, 0)"),
    "closed tile's keys unscaled": (triton_query_gradient, "exists, dk * SCALE", "exists, dk"),
}  # fmt: skip


def compare() -> None:
    """Closed tiles and others, and every form of a mask."""
    batch = [(70, 70, 1), (68, 20, 0)]
    for pattern, grid in (("conv", (7, 9)), ("row", (7, 8)), ("row_wrap", (9, 8)), ("column", (9, 8))):
        inputs = qkv(len(batch), 1, 70 + grid[0] * grid[1], 16)
        call = dict(grid=grid, pattern=pattern, conv_size=5, **sample_tensors(batch))
        assert_matches_reference(run, inputs, torch.float64, 1e-12, **call)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, tmp_path, monkeypatch):
    broken = plant(*BUGS[bug], tmp_path)
    for name in ("forward_kernel", "query_gradient_kernel", "text_key_gradient_kernel", "image_key_gradient_kernel"):
        if hasattr(broken, name):
            monkeypatch.setattr(triton_op, name, getattr(broken, name))
    for module in (triton_forward, triton_key_gradient, triton_query_gradient):
        for name in ("box_chunk", "box_mask"):
            if hasattr(module, name) and BUGS[bug][0] is triton_common:
                monkeypatch.setattr(module, name, getattr(broken, name))
    with pytest.raises(AssertionError, match="error"):
        compare()


def test_the_comparison_passes_without_a_bug():
    compare()
