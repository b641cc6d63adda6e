"""The number formats of weights: their names in recipes and options, and in files."""

from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, as `torch.float32` is called in files."""
    return str(dtype).removeprefix("torch.")


DTYPE_OF_NAME = {dtype_name(dtype): dtype for dtype in DTYPES.values()}


def computes_bf16(processor: Path = Path("/proc/cpuinfo")) -> bool:
    """Has this machine a GPU or a processor with bf16 arithmetic (avx512_bf16, amx_bf16, Arm's bf16)?

    Without it torch's bf16 matmuls run, but about eight times slower than fp32 ones. Where the system does not say
    (`processor` is missing), the answer is no.
    """
    if torch.cuda.is_available():
        return True
    if not processor.exists():
        return False
    words = set(processor.read_text(errors="replace").split())
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
