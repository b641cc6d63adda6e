"""Sparse attention over text and image tokens (one definition of the patterns, CPU path, Triton kernels, decoding), and the
norm of queries and keys before it."""

from kernels.attention.decode import decode_attention
from kernels.attention.op import AttentionPlan, attention_plan, can_run_triton, sparse_attention
from kernels.head_norm.op import split_heads
from kernels.patterns import PATTERNS

__version__ = "0.0.0"
__all__ = [
    "PATTERNS", "AttentionPlan", "attention_plan", "can_run_triton", "decode_attention", "sparse_attention", "split_heads",
]  # fmt: skip
