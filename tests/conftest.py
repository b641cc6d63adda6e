"""All tests: one thread per process, caches in a temporary folder, GPU tests skip with the reason elsewhere."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: several processes share few cores, and rank processes inherit it

import pytest

_SCRATCH = tempfile.mkdtemp(prefix="vilg-tests-")
for _variable, _folder in {
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",  # a stale lock file in the shared one would hang a run
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "MPLCONFIGDIR": "matplotlib",
}.items():
    os.environ[_variable] = os.path.join(_SCRATCH, _folder)


def pytest_unconfigure(config):
    shutil.rmtree(_SCRATCH, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in needs_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none here"))


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread for tests of modules that have loaded torch; `OMP_NUM_THREADS` alone leaves MKL's own count."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def session_tmp(tmp_path_factory) -> Path:
    """One folder for the whole session (per test process), for what is costly to make."""
    return tmp_path_factory.mktemp("session")
