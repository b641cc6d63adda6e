"""The Triton kernels behind the signature of the reference."""

from kernels.attention.triton_op import triton_attention
from kernels.patterns import window


def run(q, k, v, *, grid, pattern, text_len, text_prefix, image_is_target, conv_size=11, scale=None):
    view = window(pattern, grid, conv_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return triton_attention(q, k, v, text_len, text_prefix, image_is_target, view=view, scale=scale)
