"""GPUs that plans are made for: peak, memory and links, from the data sheets; every figure can be overridden."""

from dataclasses import dataclass, replace

from vilg.errors import UserError
from vilg.train.metrics import PEAK_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU in its node. Rates are of one direction.

    peak_flops: dense bf16 or fp16, FLOP/s. sustained: the part of it that the best matrix product measured holds under
    load (ML Engineering, maximum achievable matmul FLOPS: A100 271 of 312, H100 about 794 of 989; an H200 is taken for
    an H100). memory: bytes that CUDA reports. hbm, nvlink, network: bytes/s; `network` is
    this GPU's share of the node's adapters (one of 200 Gb/s beside each A100 as in a DGX). node: GPUs joined by NVLink.
    """

    name: str
    peak_flops: float
    sustained: float
    memory: float
    hbm: float
    nvlink: float
    network: float
    node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", PEAK_FLOPS["A100"], 0.87, 39.4 * GIB, 1555e9, 300e9, 25e9),
        Gpu("a100-80g", PEAK_FLOPS["A100"], 0.87, 79.1 * GIB, 2039e9, 300e9, 25e9),
        Gpu("h100", PEAK_FLOPS["H100"], 0.80, 79.1 * GIB, 3350e9, 450e9, 50e9),
        Gpu("h200", PEAK_FLOPS["H200"], 0.80, 139.8 * GIB, 4800e9, 450e9, 50e9),
    )
}
DEFAULT_GPU = "a100-80g"


def gpu_named(name: str, **overrides: float | None) -> Gpu:
    """The table's GPU with fields replaced where an override is given. Raises UserError for an unknown name."""
    if name not in GPUS:
        raise UserError(
            f"--gpu {name} is not in the table; name the nearest of {', '.join(GPUS)}, and what differs with "
            "--peak-tflops, --memory-gib, --hbm-gbs, --nvlink-gbs, --network-gbs"
        )
    given = {key: value for key, value in overrides.items() if value is not None}
    for key, value in given.items():
        if not value > 0:
            raise UserError(f"--gpu {name}: {key}={value:g} must be positive")
    return replace(GPUS[name], **given)
