"""Checkpoints: written so that a crash at any byte leaves the last one usable, read without unpickling anything but tensors."""
