"""Key-value cache of decoding: what the prompt gave, stored once; what each candidate adds, in a ring per layer.

Shapes: P prompts (a guidance null counts as a prompt of no text), K candidates a prompt, R = P * K rows,
H heads, D head dim, M source slots, C ring capacity of a layer.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kernels import decode_attention
from kernels.patterns import cache_capacity, visible_image_slots

KeyValue = tuple[Tensor, Tensor]
Reads = slice | Tensor  # entries of a ring: evenly spaced ones are a view, others (int64 [n]) are gathered


@lru_cache(maxsize=None)
def ring_reads(pattern: str, grid: tuple[int, int], conv_size: int) -> tuple[int, tuple[Reads, ...]]:
    """Ring capacity of an image layer, and for each slot the ring entries it reads.

    Both follow from the one definition of the pattern: slot n lives in entry n mod C until no later slot reads it.
    """
    capacity = cache_capacity(pattern, grid, conv_size=conv_size)
    slots = range(grid[0] * grid[1])
    return capacity, tuple(
        as_reads([read % capacity for read in visible_image_slots(pattern, grid, slot, conv_size=conv_size)])
        for slot in slots
    )


def as_reads(entries: Sequence[int]) -> Reads:
    """The same entries, in any order: softmax and sum do not ask for it."""
    ordered = sorted(entries)
    steps = {later - earlier for earlier, later in zip(ordered, ordered[1:], strict=False)} or {1}
    if len(steps) > 1:
        return torch.tensor(ordered)
    return slice(ordered[0], ordered[-1] + 1, steps.pop())


class DecodeCache:
    """Keys and values that new slots read: a source shared by the K candidates of a prompt, and a ring for each row.

    source: per layer (keys, values), each [P, H, M, D]; source_visible: bool [P, M]; capacities: C per layer.
    """

    def __init__(
        self, source: Sequence[KeyValue], source_visible: Tensor, *, candidates: int, capacities: Sequence[int]
    ) -> None:
        # Contiguous: as parts of one qkv tensor they would hold the queries too, and be copied at every step.
        self.source = [(keys.contiguous(), values.contiguous()) for keys, values in source]
        self.candidates = candidates
        # [P, 1, 1, M], added to scores: minus infinity where the prompt has no slot.
        self.source_bias = torch.zeros(source_visible.shape, dtype=torch.float32, device=source_visible.device)
        self.source_bias = self.source_bias.masked_fill(~source_visible, -torch.inf)[:, None, None, :]
        keys = self.source[0][0]
        prompts, heads, _, head_dim = keys.shape
        self.rings = [
            tuple(keys.new_zeros(prompts * candidates, heads, capacity, head_dim) for _ in range(2))
            for capacity in capacities
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(t.numel() * t.element_size() for pair in [*self.source, *self.rings] for t in pair)

    def reorder(self, rows: Tensor, count: int) -> None:
        """Row r goes on with the ring of row rows[r] (int64 [R], of the same prompt), whose first `count` entries are
        written."""
        for ring in (tensor for pair in self.rings for tensor in pair):
            ring[:, :, :count] = ring[rows, :, :count]

    def attend(self, layer: int, write: int, reads: Reads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store one new slot in ring entry `write` and attend to the source and the entries `reads`.

        q, k, v: [R, H, 1, D], reads: n entries, `write` among them. Returns [R, H, 1, D]; softmax in float32 over
        source and ring together.
        """
        ring_keys, ring_values = self.rings[layer]
        if isinstance(reads, Tensor):
            reads = reads.to(ring_keys.device)
        ring_keys[:, :, write] = k[:, :, 0]
        ring_values[:, :, write] = v[:, :, 0]
        keys, values = ring_keys[:, :, reads], ring_values[:, :, reads]  # [R, H, n, D]
        source_keys, source_values = self.source[layer]

        rows, heads, _, head_dim = q.shape
        prompts = rows // self.candidates
        by_prompt = (prompts, self.candidates, heads, -1)
        q_PHKD = q.view(by_prompt).transpose(1, 2) / math.sqrt(head_dim)
        source_scores = (q_PHKD @ source_keys.transpose(-1, -2)).float() + self.source_bias  # [P, H, K, M]
        ring_scores = (q @ keys.transpose(-1, -2)).float() / math.sqrt(head_dim)  # [R, H, 1, n]
        ring_scores = ring_scores.view(by_prompt).transpose(1, 2)  # [P, H, K, n]
        probs = torch.cat([source_scores, ring_scores], -1).softmax(-1).to(v.dtype)
        source_probs, ring_probs = probs.split([source_scores.shape[-1], ring_scores.shape[-1]], -1)
        out = (source_probs @ source_values).transpose(1, 2).reshape(rows, heads, 1, head_dim)
        return out + ring_probs.transpose(1, 2).reshape(rows, heads, 1, -1) @ values

    def attend_at(
        self, layer: int, slots: Tensor, prefix: Tensor, q: Tensor, k: Tensor, v: Tensor,
        *, pattern: str, grid: tuple[int, int], conv_size: int,
    ) -> Tensor:  # fmt: skip
        """`attend` of image slot `slots` (int32 [R], all equal), which is not known here but to the device.

        prefix: int32 [P], source slots that are there (the first ones). The ring's entries are written and read as
        `ring_reads` has them.
        """
        ring_keys, ring_values = self.rings[layer]
        write = slots[:1].long() % ring_keys.shape[2]
        ring_keys.index_copy_(2, write, k)
        ring_values.index_copy_(2, write, v)
        mixed = decode_attention(
            q[:, :, 0], *self.source[layer], ring_keys, ring_values,
            grid=grid, pattern=pattern, conv_size=conv_size, text_prefix=prefix, image_slot=slots,
        )  # fmt: skip
        return mixed[:, :, None]
