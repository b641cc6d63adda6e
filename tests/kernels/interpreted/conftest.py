"""Tests that run the Triton kernels on CPU tensors in Triton's interpreter.

The interpreter must be chosen before anything imports Triton, which other tests may already have done: these files are
collected only where TRITON_INTERPRET=1 was set from outside, as `tests/kernels/test_interpreted.py` does.
"""

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN, so that outputs no kernel wrote are seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
