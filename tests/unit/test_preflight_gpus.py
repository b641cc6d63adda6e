"""Preflight's rows about GPUs, against a stand-in for nvidia-smi."""

import os

import pytest

from vilg.tools import gpus
from vilg.tools.findings import Report
from vilg.tools.gpus import free_memory_row, gpu_health, health_row

# Answers a query as nvidia-smi does: one line of values, or an error for the first field that it does not know.
SMI = """#!/usr/bin/env bash
query=${1#--query-gpu=}
values=()
for field in ${query//,/ }; do
    case "$field" in
        %s
        *) echo "Field \\"$field\\" is not a valid field to query."; exit 2;;
    esac
done
(IFS=,; echo "${values[*]/#/ }")
"""
A100 = {
    "ecc.errors.uncorrected.volatile.total": "0",
    "retired_pages.pending": "[N/A]",
    "remapped_rows.pending": "No",
    "remapped_rows.failure": "No",
    "clocks_event_reasons.hw_slowdown": "Not Active",
    "clocks.max.sm": "1410",
    "driver_version": "570.86.15",
}


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a stand-in with these answers on the path."""

    def install(answers: dict[str, str]) -> None:
        cases = "\n        ".join(f'{field}) values+=("{value}");;' for field, value in answers.items())
        (tmp_path / "nvidia-smi").write_text(SMI % cases)
        (tmp_path / "nvidia-smi").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return install


def healthy(**changes: str) -> dict[str, str]:
    names = {name: A100[fields[0]] for name, fields in gpus._FIELDS.items()}
    return names | changes


def test_a_healthy_gpu_is_fine_and_its_driver_is_known(smi):
    smi(A100)
    found = gpu_health("1234")
    assert found == healthy() and found["driver"] == "570.86.15"
    report = Report(nodes=["a", "b"])
    row = health_row([found, found], report)
    assert (row.status, row.detail) == ("ok", "no memory faults, no throttling, maximum clock 1410 MHz")
    assert report.bad_nodes == []


def test_fields_that_nvidia_smi_does_not_know_leave_the_others_checked(smi):
    old = {name: value for name, value in A100.items() if not name.startswith(("remapped_rows", "clocks_event"))}
    smi(old | {"clocks_throttle_reasons.hw_slowdown": "Active", "ecc.errors.uncorrected.volatile.total": "3"})
    found = gpu_health("1234")
    assert found["slowed by hardware"] == "Active" and "rows to be remapped" not in found
    report = Report(nodes=["a"])
    row = health_row([found], report)
    assert row.status == "bad" and report.bad_nodes == ["a"] and "uncorrected ECC errors 3" in row.detail
    smi(old | {"clocks_throttle_reasons.hw_slowdown": "Not Active"})
    row = health_row([gpu_health("1234")], Report(nodes=["a"]))
    assert row.status == "ok"
    assert row.detail.endswith("this nvidia-smi does not tell rows to be remapped, rows that could not be remapped")


def test_an_nvidia_smi_that_hangs_is_not_asked_again(smi, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "_SECONDS", 0.3)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\nexec sleep 20\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert gpu_health("1234") == {} and (tmp_path / "asked").read_text() == "asked\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("uncorrected ECC errors", "2"),
        ("pages to be retired", "Yes"),
        ("rows to be remapped", "Yes"),
        ("rows that could not be remapped", "Yes"),
        ("slowed by hardware", "Active"),
    ],
)
def test_a_fault_blames_its_node(name, value):
    report = Report(nodes=["a", "b", "c"])
    row = health_row([healthy(), healthy(**{name: value}), healthy()], report)
    assert row.status == "bad" and report.bad_nodes == ["b"] and row.detail == f"b (rank 1): {name} {value}"


def test_another_maximum_clock_and_a_silent_nvidia_smi_blame_their_nodes():
    report = Report(nodes=["a", "b", "c", "d"])
    row = health_row([healthy(), healthy(), {}, healthy(**{"maximum clock (MHz)": "900"})], report)
    assert row.status == "bad" and report.bad_nodes == ["c", "d"]
    assert "c (rank 2): nvidia-smi does not answer" in row.detail
    assert "d: maximum clock (MHz) 900 instead of 1410" in row.detail
    assert health_row([{}, {}, {}, {}], Report(nodes=["a", "b", "c", "d"])).status == "absent"


def test_memory_that_another_process_holds_makes_its_node_bad_with_the_number():
    gib, report = 2**30, Report(nodes=["a", "b"])
    assert free_memory_row([(79 * gib, 80 * gib), (78 * gib, 80 * gib)], report).status == "ok"
    row = free_memory_row([(79 * gib, 80 * gib), (50 * gib, 80 * gib)], report)
    assert row.status == "bad" and report.bad_nodes == ["b"]
    assert "b (rank 1): 30.0 of 80.0 GiB are taken before the run starts" in row.detail
