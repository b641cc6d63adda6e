"""The number formats of weights: their names in recipes and options, and in files."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, as `torch.float32` is called in files."""
    return str(dtype).removeprefix("torch.")


DTYPE_OF_NAME = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
