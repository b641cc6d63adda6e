"""Attention: reference, CPU path, Triton kernels, public call, in that order of trust."""
