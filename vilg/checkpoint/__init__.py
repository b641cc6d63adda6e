"""Checkpoints: a crash at any byte of writing leaves the last one usable; reading unpickles nothing but tensors."""
