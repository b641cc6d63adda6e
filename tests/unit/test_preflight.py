"""Preflight's comparison of nodes with planted figures, and the whole report on two processes."""

import errno
import json
import os

import pytest
import torch

from tests.distributed.helpers import run_distributed
from tests.golden.make import DEBUG_RECIPE, ROOT, make_data
from vilg.__main__ import main as vilg
from vilg.checkpoint.state import source_commit
from vilg.errors import TRY_AGAIN
from vilg.tools import bandwidth, storage
from vilg.tools.bandwidth import partners
from vilg.tools.findings import Report, Row
from vilg.tools.machines import check_machines, versions_row
from vilg.tools.peers import find_different, find_slow
from vilg.tools.preflight import examine, verdict

NODES = [f"node{i}" for i in range(1, 5) for _ in range(2)]
EVEN = [100.0, 101.0, 99.0, 100.5, 100.0, 99.5, 101.0, 100.0]


def with_values(**changes: float | None) -> list[float | None]:
    return [changes.get(f"r{rank}", value) for rank, value in enumerate(EVEN)]


def test_a_node_far_below_its_peers_is_named_with_its_worst_rank():
    assert find_slow("matmul", EVEN, NODES) == []
    (slow,) = find_slow("matmul", with_values(r4=70.0, r5=80.0), NODES)
    assert (slow.node, slow.rank, slow.value) == ("node3", 4, 70.0)
    assert str(slow) == "node3 (rank 4): matmul 30% below its peers"


def test_less_than_ten_percent_or_within_the_spread_is_not_slow():
    assert find_slow("matmul", with_values(r4=91.0), NODES) == []
    noisy = [100.0, 60.0, 140.0, 80.0, 70.0, 120.0, 50.0, 110.0]
    assert find_slow("matmul", noisy, NODES) == []


def test_two_slow_nodes_do_not_hide_each_other():
    assert {s.node for s in find_slow("p2p", with_values(r0=50.0, r6=40.0, r7=40.0), NODES)} == {"node1", "node4"}


def test_a_slow_gpu_of_a_single_node_is_named_and_two_processes_are_no_peers():
    assert [s.rank for s in find_slow("matmul", with_values(r3=10.0), ["here"] * 8)] == [3]
    assert find_slow("matmul", [100.0, 10.0], ["node1", "node2"]) == []
    assert find_slow("p2p", [100.0, None, 99.0, 100.0, 10.0], list("aabbc")) and not find_slow("p", [None] * 8, NODES)


def test_the_node_that_differs_from_most_is_named():
    usual, other = {"torch": "2.13.0", "numpy": "2.4.6"}, {"torch": "2.12.0", "numpy": "2.4.6"}
    assert find_different([usual, usual, other], ["a", "b", "c"]) == {"c": ["torch 2.12.0 instead of 2.13.0"]}
    assert list(find_different([usual, other], ["a", "b"])) == ["b"]
    assert find_different([usual] * 3, ["a", "b", "c"]) == {}


def test_partners_are_pairs_inside_a_node_and_across_two():
    inside, across = partners(["a", "a", "b", "b", "c"])
    assert inside == [1, 0, 3, 2, None] and across == [2, 3, 0, 1, None]


def test_versions_and_commits_must_be_equal_and_an_unknown_commit_is_no_difference():
    facts = {"torch": "2.13.0", "triton": "3.6.0", "NCCL": "2.27.5", "driver": "570.1"}
    commit, report = "0123456789abcdef", Report(nodes=["a", "a", "b", "c"])
    row = versions_row([facts] * 4, [commit, "", commit, ""], report)
    assert row.status == "ok" and report.bad_nodes == []
    assert row.detail == "equal on 3 node(s): torch 2.13.0, triton 3.6.0, NCCL 2.27.5, driver 570.1, commit 0123456789ab"
    row = versions_row([facts] * 3 + [facts | {"NCCL": "2.18.1"}], [commit, "", commit + "+", ""], report)
    assert row.status == "bad" and report.bad_nodes == ["b", "c"]
    assert "c: NCCL 2.18.1 instead of 2.27.5" in row.detail
    assert f"b: vilg's commit {commit}+ instead of {commit}" in row.detail


def report_of(rank: int, world_size: int, overrides: list[str]) -> Report:
    from vilg.parallel.ranks import Ranks

    ranks, device = Ranks(rank, world_size, rank, torch.distributed.group.WORLD), torch.device("cpu")
    return examine(DEBUG_RECIPE, overrides, ranks, device)


def wrong_sum(rank: int, world_size: int) -> Report:
    """Rank 1's node is another one, and adds wrongly."""
    from vilg.parallel.ranks import Ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURMD_NODENAME", f"node{rank}")
        if rank == 1:
            patch.setattr(bandwidth, "_check", lambda data, n: (_ for _ in ()).throw(bandwidth.WrongSum("wrong")))
        ranks = Ranks(rank, world_size, rank, torch.distributed.group.WORLD)
        report = Report.begin(ranks)
        check_machines(report, ranks, torch.device("cpu"))
        return report


def test_the_report_of_two_processes_on_a_cpu(tmp_path):
    overrides = [f"{key}={value}" for key, value in (make_data(tmp_path) | {"run_dir": tmp_path / "run"}).items()]
    report, other = run_distributed(2, report_of, (overrides,))
    assert report == other
    status = {row.check: row.status for row in report.rows}
    assert set(status.values()) == {"ok", "absent"}, report.rows
    assert [name for name, value in status.items() if value == "absent"] == [
        "GPUs", "GPU health", "GPU free memory", "GPU matmul", "GPU memory", "p2p across nodes",
    ]  # fmt: skip
    assert {"disk speed", "shards", "CPU matmul", "all-reduce", "reduce-scatter", "p2p in a node"} < set(status)
    assert all(len(values) == 2 for values in report.figures.values()) and json.dumps(report.figures)


def test_the_verdict_is_in_the_json_as_the_batch_script_looks_for_it(tmp_path):
    found = make_data(tmp_path) | {"run_dir": tmp_path / "run"}
    command = ["preflight", str(DEBUG_RECIPE), "--json", str(tmp_path / "found.json")]
    command += [f"--{key}={value}" for key, value in found.items()]
    assert vilg(command) == 0 and '"passed": true' in (tmp_path / "found.json").read_text()
    (tmp_path / "text.model").write_text("damaged")
    assert vilg(command) == 1
    assert '"passed": false' in (tmp_path / "found.json").read_text()
    assert """grep -qs '"passed": false' "$VERDICT" """ in (ROOT / "launch" / "train.sbatch").read_text()


def test_what_may_be_over_at_the_next_start_is_no_verdict(tmp_path, monkeypatch):
    found = make_data(tmp_path) | {"run_dir": tmp_path / "run"}
    command = ["preflight", str(DEBUG_RECIPE), "--json", str(tmp_path / "found.json")]
    command += [f"--{key}={value}" for key, value in found.items()]

    def stale(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "00000.tar")

    monkeypatch.setattr(storage, "open_data", stale)
    assert vilg(command) == TRY_AGAIN
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["passed"] is None and [row["check"] for row in report["rows"] if row["again"]] == ["shards"]
    (tmp_path / "text.model").write_text("damaged")  # and what will not be over
    assert vilg(command) == 1 and json.loads((tmp_path / "found.json").read_text())["passed"] is False


def test_nodes_that_can_be_left_out_are_a_verdict():
    report = Report(rows=[Row("disk speed", "ok", ""), Row("shards", "bad", "node2: stale", again=True)], bad_nodes=["node2"])
    assert verdict(report, exclude_bad=False) is None and verdict(report, exclude_bad=True) is False
    report.rows = [Row("all-reduce", "slow", "")]
    assert verdict(report, exclude_bad=False) is True and verdict(report, exclude_bad=True) is False


def test_a_rank_that_adds_wrongly_is_bad_and_its_node_is_named():
    report = run_distributed(2, wrong_sum)[0]
    bad = [row for row in report.rows if row.status == "bad"]
    assert "commit" in report.rows[0].detail or not source_commit()
    assert [row.check for row in bad] == ["all-reduce", "reduce-scatter"] and report.bad_nodes == ["node1"]
    assert {row.check: row.status for row in report.rows}["p2p across nodes"] == "ok"
