"""Kernels compile ahead of time for A100 and H100 without spills, within shared memory, with tensor cores."""

import os
import subprocess
import sys

import pytest


def run_gate(repository, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile_gate", *arguments]
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)


def test_the_10b_models_kernels_pass_the_compile_gate(repository):
    result = run_gate(repository, "--variants", "row,layernorm", "--channels", "64")
    assert result.returncode == 0 and "12 kernels compiled, 0 with problems" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype, channels", [
    ("bfloat16", "32,64"), ("bfloat16", "80,128"), ("float16", "32,64"), ("float16", "80,128"),
    ("float32", "32,64"), ("float32", "80,128"),
])  # fmt: skip
def test_every_kernel_passes_the_compile_gate(repository, dtype, channels):
    result = run_gate(repository, "--dtypes", dtype, "--channels", channels)
    assert result.returncode == 0, result.stdout + result.stderr
