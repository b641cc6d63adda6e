"""Where the Triton kernels run, and the one place that launches them. Needs no Triton itself."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class LaunchConfig:
    """`chunk`: rows of one step of the kernel's loop. `registers`: a limit for ptxas, which lets more programs share a
    multiprocessor; None leaves it to ptxas."""

    num_warps: int
    num_stages: int
    chunk: int = 64
    registers: int | None = None

    def options(self) -> dict:
        """As Triton's launch and its ahead-of-time compiler take them."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


def start_kernel(kernel, grid: tuple[int, ...], args, constants: dict, config: LaunchConfig) -> None:
    """Launch; the compile gate records here what would be launched."""
    kernel[grid](*args, **constants, **config.options())


def device_capability(device: torch.device) -> int:
    """Whose launch settings a device takes: 90 for Hopper, 80 for all others, as Hopper's spill registers on Blackwell; 90 for
    the CPU, where the interpreter runs: the kernels in their fullest form."""
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
    return 90 if hopper else 80


@torch.compiler.assume_constant_result  # which a function that is itself cached would not be: torch.compile looks into it
def why_no_triton(device: torch.device) -> str | None:
    """Why no Triton kernel runs on this CUDA device; None if they do."""
    return look_for_triton(device)


@lru_cache(maxsize=64)
def look_for_triton(device: torch.device) -> str | None:
    """`why_no_triton`, remembered for each device."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; install it with pip install triton"
    if torch.version.hip is not None:
        return f"{device} is no NVIDIA device; the Triton kernels are launched with settings that others do not take"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{device} has compute capability {capability[0]}.{capability[1]}; the Triton kernels need 8.0 or more"
    return None


@lru_cache(maxsize=64)
def warn_once(operation: str, reason: str) -> None:
    """Say that `operation` takes the slow path, and why."""
    warnings.warn(f"{operation} runs in plain torch, slowly: {reason}", stacklevel=4)
