"""Dropout that depends on nothing but (run seed, step, sequence in the global batch, place in the model).

The mask is a hash of the element's place, not a draw from a generator's state. So it is the same after a resume, when
activations are recomputed, and under any split into ranks, micro-batches, pipeline stages, tensor ranks or slots.
"""

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def sequence_seeds(seed: int, step: int, first: int, count: int) -> Tensor:
    """One dropout seed per sequence, int64 [count] in 0 .. 2^32 - 1.

    `first` is the index in the step's global batch of the micro-batch's first sequence.
    """
    words = [hashlib.blake2b(f"dropout/{seed}/{step}/{first + i}".encode(), digest_size=4).digest() for i in range(count)]
    return torch.tensor([int.from_bytes(word, "big") for word in words], dtype=torch.int64)


def dropout(x: Tensor, p: float, seeds: Tensor, *, site: int, first_slot: int = 0) -> Tensor:
    """x [B, S, C] with entries zeroed with probability p and the rest divided by 1 - p.

    seeds: int64 [B] of `sequence_seeds`. site: number of the place in the model. first_slot: whole-sequence slot of
    x's first (sequence parallelism holds a range of slots).
    """
    if p == 0.0:
        return x
    return x * keep_mask(x.shape, p, seeds.to(x.device), site=site, first_slot=first_slot).to(x.dtype).div_(1.0 - p)


def keep_mask(shape: tuple[int, int, int], p: float, seeds: Tensor, *, site: int, first_slot: int = 0) -> Tensor:
    """Bool [B, S, C], True with probability 1 - p: a 32-bit integer hash of (seed, site, slot, channel) against p.

    The mixing is the two-round multiply-xorshift with C. Wellons' constants (hash-prospector, "lowbias32").
    """
    _, slots, channels = shape
    place = torch.arange(first_slot * channels, (first_slot + slots) * channels, device=seeds.device).view(slots, channels)
    key = _mix((seeds * 0x9E3779B1 + site * 0x85EBCA77) & _MASK)
    return _mix(place ^ key[:, None, None]) >= int(p * 2**32)


def _mix(x: Tensor) -> Tensor:
    # int64 holds the 32-bit words, so that shifts are logical; products of 32-bit words wrap and are cut to 32 bits.
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
