"""Bugs planted into copies of the kernels' source: the comparison with the reference must notice every one."""

import pytest
import torch

from kernels.attention import triton_common, triton_forward, triton_key_gradient, triton_op, triton_query_gradient
from tests.kernels.cases import assert_matches_reference, qkv, sample_tensors
from tests.kernels.interpreted.kernel_calls import run
from tests.kernels.interpreted.planted import plant

PADDING = """acc = tl.where(valid[:, None], acc, 0.0)  # padding sees nothing
        running_sum = tl.where(valid, running_sum, 0.0)"""

BUGS = {
    "row causality off by one": (triton_common, "tl.minimum(high, high_row", "tl.minimum(high + 1, high_row"),
    "row's share one slot short": (triton_common, "high_row * width + high_col)", "high_row * width + high_col - 1)"),
    "columns read as rows": (triton_common, "row * ROW_STEP + col * COL_STEP", "row * COLS + col"),
    "conv causality off by one": (triton_common, "high_col * 2**8 + high * 2**16", "high_col * 2**8 + (high - 1) * 2**16"),
    "conv without a bound of columns": (triton_common, "& GUARDS) == GUARDS", "& (GUARDS - 2**15)) == GUARDS - 2**15"),
    "long rows without causality": (triton_common, "tl.where(causal, first_col, COLS)", "tl.where(causal, first_col + BLOCK, COLS)"),
    "text causality off by one": (triton_forward, "& (key[None, :] <= slot[:, None])\n", "& (key[None, :] < slot[:, None])\n"),
    "source text unread": (triton_forward, "tl.where(any_valid, prefix, 0)", "tl.where(any_valid, 0, 0)"),
    "image range one chunk short": (triton_forward, "range(whole, count, BLOCK_N)", "range(whole, count - BLOCK_N, BLOCK_N)"),
    "tail of a range unread": (triton_forward, "if whole < num_keys:", "if num_keys < whole:"),
    "missing rescale": (triton_forward, "acc * rescale[:, None] + dot", "acc + dot"),
    "padding row not zero": (triton_forward, PADDING, "running_sum = running_sum"),
    "closed tile reads what follows": (triton_forward, "seen & exists[None, :]", "(row[:, None] == row[None, :]) & exists[None, :]"),
    "delta forgotten": (triton_key_gradient, " - delta[None, :])", ")"),
    "transposed conv causality off by one": (triton_common, "low_col * 2**8 + low * 2**16", "low_col * 2**8 + (low + 1) * 2**16"),
    "transposed row causality forgotten": (triton_common, "low, high = tl.where(causal, own, 0), ", "low, high = tl.zeros_like(own), "),
    "target text reads all text": (triton_key_gradient, "tl.where(slot < prefix, 0, slot)", "tl.where(slot < length, 0, slot)"),
    "target text read by the image": (triton_key_gradient, "tl.where(is_source, dk, 0.0), tl", "dk, tl"),
    "text keys without image queries": (triton_key_gradient, "tl.where(holds_source, tl", "tl.where(holds_source == 0, tl"),
    "long rows without causality, transposed": (triton_key_gradient, "tl.where(causal, tl.minimum(TILE_COLS, count), 0)", "0 * count"),
    "query gradient one chunk short": (triton_query_gradient, "range(whole, count, BLOCK_N)", "range(whole, count - BLOCK_N, BLOCK_N)"),
    "closed gradient reads what follows": (triton_query_gradient, "seen = seen & exists[None, :]", "seen = (row[:, None] == row[None, :]) & exists[None, :]"),
    "closed tile without text queries": (triton_query_gradient, "tl.where(causal, 0, length)", "tl.where(causal, 0, 0)"),
    "closed tile's keys unscaled": (triton_query_gradient, "exists, dk * SCALE", "exists, dk"),
}  # fmt: skip


def compare() -> None:
    """Closed tiles and others, and every form of a mask."""
    batch = [(70, 70, 1), (68, 20, 0)]
    for pattern, grid in (("conv", (7, 9)), ("row", (7, 8)), ("row_wrap", (9, 8)), ("column", (9, 8)), ("dense", (9, 8))):
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
        for name in ("box_chunk", "box_mask", "image_tile", "seen_by_all"):
            if hasattr(module, name) and BUGS[bug][0] is triton_common:
                monkeypatch.setattr(module, name, getattr(broken, name))
    with pytest.raises(AssertionError, match="error"):
        compare()


def test_the_comparison_passes_without_a_bug():
    compare()
