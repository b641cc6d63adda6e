"""Rounding to a narrow type, the same on a GPU and in Triton's interpreter."""

import triton
import triton.language as tl


@triton.jit
def narrow(x, DTYPE: tl.constexpr, WIDEN: tl.constexpr):
    """x rounded to DTYPE. WIDEN: to bf16 in Triton's interpreter, which cuts digits off where a GPU rounds to the nearest."""
    if WIDEN and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


INTERPRETED = not isinstance(narrow, triton.JITFunction)  # TRITON_INTERPRET=1 when the kernels were imported
