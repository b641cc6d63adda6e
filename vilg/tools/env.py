"""`vilg env`: versions, devices and which optimized parts this machine offers; for people, or JSON for a report."""

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

from vilg import __version__
from vilg.tools.setup_checks import compiler

PACKAGES = (
    "torch",
    "triton",
    "deepspeed",
    "numpy",
    "safetensors",
    "sentencepiece",
    "vector-quantize-pytorch",
    "webdataset",
    "pydantic",
)


def environment() -> dict[str, Any]:
    """Versions, hardware and the backends that training would use here; plain values, ready for JSON."""
    import torch

    from vilg.config.schema import OptimizerConfig
    from vilg.train.optim import build_adamw

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    weight = torch.nn.Parameter(torch.zeros(1, device=device))
    _, optimizer = build_adamw([{"params": [weight]}], OptimizerConfig(lr=1.0), device)
    return {
        "vilg": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "packages": {name: package_version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "cuda": torch.version.cuda,
        "nccl": nccl_version(),
        "gpus": [_gpu(torch, i) for i in range(torch.cuda.device_count())],
        "compiler": compiler(),
        "apex": apex_status(),
        "optimizer": optimizer,
        "norms": "torch layer_norm / rms_norm",
        "collectives": "nccl" if cuda else "gloo",
    }


def apex_status() -> str:
    """`found` if NVIDIA's apex with its fused optimizer can be used, else why not.

    The package of that name on PyPI is another one; a broken build fails with more than ImportError.
    """
    try:
        from apex.optimizers import FusedAdam  # noqa: F401
    except Exception as error:
        return f"not found ({type(error).__name__}: {error})"
    return "found"


def main(argv: list[str]) -> int:
    """Entry of `vilg env`."""
    parser = argparse.ArgumentParser(prog="vilg env", description="Versions, devices and optimized parts found here.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    found = environment()
    print(json.dumps(found, indent=2) if arguments.json else _table(found))
    return 0


def _table(found: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    for name, value in found.items():
        if name == "packages":
            rows += [(package, version or "not installed") for package, version in value.items()]
        elif name == "gpus":
            rows += [(f"gpu {i}", gpu) for i, gpu in enumerate(value)] or [("gpu", "none")]
        else:
            rows.append((name.replace("_gib", " (GiB)").replace("_", " "), "none" if value is None else str(value)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def nccl_version() -> str | None:
    """The NCCL that torch uses; None without a GPU."""
    import torch

    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None


def package_version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(torch: Any, index: int) -> str:
    device = torch.cuda.get_device_properties(index)
    return f"{device.name}, {device.total_memory / 2**30:.1f} GiB, compute capability {device.major}.{device.minor}"
