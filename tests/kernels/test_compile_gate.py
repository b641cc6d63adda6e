"""Kernels compile ahead of time for A100 and H100 without spills, within shared memory, with tensor cores."""

import os
import subprocess
import sys

import pytest
import torch

from kernels import compile_gate


def run_gate(repository, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile_gate", *arguments]
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)


def test_the_10b_models_kernels_pass_the_compile_gate(repository):
    result = run_gate(repository, "--variants", "row,layernorm", "--channels", "64")
    assert result.returncode == 0 and "16 kernels compiled, 0 with problems" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("variant, heads", [("row", (1, 3, 2)), ("conv", (1, 3, 2)), ("layernorm", (16, 16, 16))])
def test_any_number_of_text_slots_and_heads_runs_the_kernels_that_are_gated(variant, heads):
    gated, *others = (
        [compile_gate.source(launch).hash() for launch in compile_gate.record(variant, torch.bfloat16, 64, 90, **sizes)]
        for sizes in ({}, *(dict(text_slots=slots, heads=n) for slots, n in zip((1, 77, 64), heads)))
    )
    assert len(set(gated)) == len(gated) and all(found == gated for found in others)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, channels", [
    ("bfloat16", "32,64"), ("bfloat16", "80,128"), ("float16", "32,64"), ("float16", "80,128"),
    ("float32", "32,64"), ("float32", "80,128"),
])  # fmt: skip
def test_every_kernel_passes_the_compile_gate(repository, dtype, channels):
    result = run_gate(repository, "--dtypes", dtype, "--channels", channels)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("grids, dtypes", [
    ("64x64,96x96,128x128", "bfloat16,float16"), ("48x48,16x16,13x32,8x8", "bfloat16"), ("7x9,3x5,2x2,5x1,1x7,1x1", "bfloat16"),
])  # fmt: skip
def test_kernels_of_other_grids_pass_the_compile_gate(repository, grids, dtypes):
    """ptxas spilled, and crashed, on some of these under the register limits of the first four."""
    variants = "row,row_wrap,column,conv,dense"
    result = run_gate(repository, "--channels", "64", "--dtypes", dtypes, "--variants", variants, "--grids", grids)
    assert result.returncode == 0, result.stdout + result.stderr
