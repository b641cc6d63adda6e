"""Preflight's row about the kernels: right ones pass in every precision, wrong ones are named with node and rank."""

import pytest
import torch

from tests.distributed.helpers import run_distributed
from tests.golden.make import DEBUG_RECIPE, ROOT
from vilg.config import load_recipe
from vilg.model.attention import SparseAttend
from vilg.parallel.ranks import Ranks
from vilg.tools import kernel_check
from vilg.tools.findings import Report

CPU = torch.device("cpu")


def recipe(*overrides):
    small = ["model.num_layers=4", "model.qk_norm=true", "tokens.grid=[6,5]", "tokens.text_slots=7", *overrides]
    return load_recipe(DEBUG_RECIPE, small, cross_checks=False)


def row_of(recipe, ranks=Ranks()):
    report = Report.begin(ranks)
    kernel_check.check_kernels(report, recipe, ranks, CPU)
    return report.rows[-1], report.bad_nodes


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_right_kernels_pass_in_every_precision(precision, attention):
    row, bad = row_of(recipe(f"precision={precision}", f"model.attention={attention}"))
    assert row.status == "ok" and not bad, row
    patterns = "row, column, conv" if attention == "sparse" else "dense"
    assert row.detail.startswith(f"{patterns} ({precision}, 7 + 6 x 5 slots, plain torch): outputs and gradients within ")


def test_the_norm_of_queries_and_keys_is_checked_where_it_has_a_kernel(monkeypatch):
    monkeypatch.setattr(kernel_check, "has_kernel", lambda *_: True)
    row, _ = row_of(recipe())
    assert row.status == "ok" and "row, column, conv, query-key norm (" in row.detail
    right = kernel_check.split_heads

    def wrong(qkv, q_weight, k_weight, **options):
        return right(qkv, q_weight, k_weight.detach() * 2 - k_weight, **options)

    monkeypatch.setattr(kernel_check, "split_heads", wrong)  # right forward, its weight's gradient has the wrong sign
    row, _ = row_of(recipe())
    assert row.status == "bad" and "query-key norm: gradient of the keys' weight" in row.detail


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_single_wrong_slot_of_one_pattern_is_seen(monkeypatch, precision, value):
    right = SparseAttend.__call__

    def wrong(self, q, k, v, pattern):
        out = right(self, q, k, v, pattern)
        if pattern == "column":
            out = out.clone()
            out[0, 1, 20] = value
        return out

    monkeypatch.setattr(SparseAttend, "__call__", wrong)
    row, _ = row_of(recipe(f"precision={precision}"))
    assert row.status == "bad" and "(rank 0): column: output " in row.detail and "plain torch's in fp64" in row.detail


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_10b_models_kernels_are_right_on_this_gpu(precision):
    large = load_recipe(ROOT / "launch" / "recipes" / "10b.yaml", [f"precision={precision}"], cross_checks=False)
    errors = list(kernel_check.kernel_errors(large, torch.device("cuda")))
    assert "query-key norm" in {name for name, *_ in errors}
    assert max(error for *_, error in errors) <= kernel_check.ALLOWED[precision], errors


def one_rank_cannot_compile(rank, world_size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURMD_NODENAME", f"node{rank}")
        if rank == 1:
            error = RuntimeError("PTXAS error: `ptxas` failed\nand a page of assembly")
            patch.setattr(SparseAttend, "__call__", lambda *_: (_ for _ in ()).throw(error))
        return row_of(recipe(), Ranks(rank, world_size, rank, torch.distributed.group.WORLD))


def test_a_kernel_that_does_not_compile_on_one_node_is_its_nodes_fault():
    (row, bad), other = run_distributed(2, one_rank_cannot_compile)
    assert (row, bad) == other and bad == ["node1"]
    assert (row.status, row.detail) == ("bad", "node1 (rank 1): RuntimeError: PTXAS error: `ptxas` failed")
