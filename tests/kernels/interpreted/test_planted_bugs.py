"""Bugs planted into copies of the kernels' source: the comparison with the reference must notice every one."""

import importlib.util
from pathlib import Path

import pytest
import torch

from kernels.attention import triton_backward, triton_forward, triton_op
from tests.kernels.cases import assert_matches_reference, qkv, sample_tensors
from tests.kernels.interpreted.kernel_calls import run

BUGS = {
    "image causality off by one": (triton_forward, "(key[None, :] <= slot[:, None]))\n", "(key[None, :] < slot[:, None]))\n"),
    "text causality off by one": (triton_forward, "& (key[None, :] <= slot[:, None])\n", "& (key[None, :] < slot[:, None])\n"),
    "text range ends at the tile": (triton_forward, "tl.maximum(prefix, tl.minimum(", "tl.minimum(prefix, tl.minimum("),
    "image range one chunk short": (triton_forward, "range(0, count, BLOCK_N)", "range(0, count - BLOCK_N, BLOCK_N)"),
    "missing rescale": (triton_forward, "acc * rescale[:, None] + dot", "acc + dot"),
    "padding row not zero": (triton_forward, "seen = valid[:, None] & (index", "seen = (index"),
    "delta forgotten": (triton_backward, " - delta[None, :])", ")"),
    "transposed causality off by one": (triton_backward, "slot[:, None] <= query[None, :]))", "slot[:, None] < query[None, :]))"),
    "target text reads all text": (triton_backward, "| (slot < prefix)[:, None] | past", "| (slot < length)[:, None] | past"),
    "text keys without image queries": (triton_backward, "tl.where(holds_source,", "tl.where(is_text == 0,"),
    "key gradient unscaled": (triton_backward, "dk *= SCALE", "dk *= 1"),
    "query gradient one chunk short": (triton_backward, "range(0, count, BLOCK_N)", "range(0, count - BLOCK_N, BLOCK_N)"),
}  # fmt: skip


def compare() -> None:
    batch = [(70, 70, 1), (68, 20, 0)]
    inputs = qkv(len(batch), 1, 70 + 63, 16)
    assert_matches_reference(run, inputs, torch.float64, 1e-12, grid=(7, 9), pattern="conv", **sample_tensors(batch))


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, tmp_path, monkeypatch):
    module, right, wrong = BUGS[bug]
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1, "the line to break has changed"
    path = tmp_path / "broken.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("broken", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    for name in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"):
        if hasattr(broken, name):
            monkeypatch.setattr(triton_op, name, getattr(broken, name))
    with pytest.raises(AssertionError, match="error"):
        compare()


def test_the_comparison_passes_without_a_bug():
    compare()
