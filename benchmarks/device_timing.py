"""Times of single operations on a GPU or a CPU, for the scripts that compare kernels."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_START = 6_000_000  # cycles (about 3 ms) that the device sleeps while the host launches what is timed


def measure(function, device: str, repeats: int) -> tuple[float, float, float]:
    """Median, 20 and 80 % quantile in milliseconds; on a GPU with a cold L2 cache."""
    times = []
    for _ in range(3):
        function()
    flush = torch.empty(64 << 20, dtype=torch.int32, device=device) if device == "cuda" else None
    for _ in range(repeats):
        if flush is None:
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        else:
            flush.zero_()
            torch.cuda._sleep(HEAD_START)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            function()
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
    cuts = statistics.quantiles(times, n=5)
    return statistics.median(times), cuts[0], cuts[3]


def device_rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measured matmul rate (FLOP/s) and copy bandwidth (bytes/s)."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    matmul = measure(lambda: a @ a, device, 10)[0]
    source = torch.empty((1 << 28) if device == "cuda" else (1 << 24), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, 10)[0]
    return 2 * size**3 / matmul * 1e3, 2 * source.numel() * 4 / copy * 1e3


def surroundings(device: str) -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        import triton

        versions |= {"triton": triton.__version__, "cuda": torch.version.cuda}
    return {"device": name, "threads": torch.get_num_threads(), "commit": commit.stdout.strip(), **versions}
