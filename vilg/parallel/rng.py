"""Dropout that depends on nothing but (run seed, step, sequence in the global batch, place in the model).

The mask is a hash of the element's place, not a draw from a generator's state. So it is the same after a resume, when
activations are recomputed, and under any split into ranks, micro-batches, pipeline stages, tensor ranks or slots.
"""

import hashlib

import torch
from torch import Tensor

LANES = 4  # 16-bit numbers in one hash
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit integer


def sequence_seeds(seed: int, step: int, first: int, count: int) -> Tensor:
    """One dropout seed per sequence, int64 [count] in 0 .. 2^56 - 1.

    `first` is the index in the step's global batch of the micro-batch's first sequence.
    """
    names = (f"dropout/{seed}/{step}/{sequence}" for sequence in range(first, first + count))
    words = (hashlib.blake2b(name.encode(), digest_size=7).digest() for name in names)
    return torch.tensor([int.from_bytes(word, "big") for word in words], dtype=torch.int64)


def dropout(x: Tensor, p: float, seeds: Tensor, *, site: int | Tensor, first_slot: int = 0) -> Tensor:
    """x [B, S, C] with entries zeroed with probability p and the rest divided by 1 - p.

    seeds: int64 [B] of `sequence_seeds`. site: number of the place in the model (a tensor: int64 on x's device). first_slot: whole-sequence slot of
    x's first (sequence parallelism holds a range of slots).
    """
    if p == 0.0:
        return x
    return x * keep_mask(x.shape, p, seeds.to(x.device), site=site, first_slot=first_slot).to(x.dtype).div_(1.0 - p)


def keep_mask(shape: tuple[int, int, int], p: float, seeds: Tensor, *, site: int | Tensor, first_slot: int = 0) -> Tensor:
    """Bool [B, S, C], True with probability 1 - p to within 2^-16: four channels share the bits of one 64-bit hash.

    The hash of (seed, site, slot, channel // 4) is SplitMix64's finalizer (Steele et al., OOPSLA 2014, figure 16).
    """
    _, slots, channels = shape
    words = -(-channels // LANES)
    place = torch.arange(first_slot * words, (first_slot + slots) * words, device=seeds.device).view(slots, words)
    key = _mix(seeds * _GOLDEN + site)
    bits = _mix(place * _GOLDEN + key[:, None, None])  # int64 [B, S, words]
    return bits.view(torch.int16)[..., :channels] >= round(p * 2**16) - 2**15


def _mix(x: Tensor) -> Tensor:
    """Products of int64 wrap, as the finalizer wants; shifts carry the sign along, which is cut off."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = x.bitwise_xor(_shifted(x, shift)).mul_(factor)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)
