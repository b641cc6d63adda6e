"""Text -> image, slot after slot: each prompt is read once, what its candidates draw goes into rings.

Shapes: P prompts, K candidates of each, R = P * K rows, M slots of the longest prompt, N image slots, V image codes,
H heads, D head dim.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from vilg.inference.cache import DecodeCache, KeyValue, Reads, ring_reads
from vilg.model.attention import Attend
from vilg.model.vilg import Vilg
from vilg.parallel.ops import gather_last
from vilg.tokens.sequence import SequenceSpec, pad_texts


class ImageDecoder:
    """Writes image slots one after another for P prompts (lists of token ids) with K candidates each.

    A prompt's keys and values serve all its candidates. Of a tensor-parallel model every rank must make the same calls;
    each gets whole logits.
    """

    def __init__(self, model: Vilg, spec: SequenceSpec, prompts: Sequence[Sequence[int]], *, candidates: int) -> None:
        self.embed, self.blocks, self.heads = model.embed, model.blocks, model.heads
        self.tensor_group = model.grid.tensor_group
        self.device = next(model.parameters()).device
        self.pattern = dict(grid=spec.grid, conv_size=model.config.conv_size)
        self.rings = [ring_reads(block.attention.pattern, spec.grid, model.config.conv_size) for block in self.blocks]
        source, lengths = self._read_text(prompts)
        self.prefix = lengths.to(torch.int32)  # [P]
        visible = torch.arange(source[0][0].shape[2], device=self.device) < lengths[:, None]
        capacities = [capacity for capacity, _ in self.rings]
        self.cache = DecodeCache(source, visible, candidates=candidates, capacities=capacities)

    def _read_text(self, prompts: Sequence[Sequence[int]]) -> tuple[list[KeyValue], Tensor]:
        """Keys and values of every layer, each [P, H, M, D], and the prompts' lengths [P]."""
        text, lengths = (tensor.to(self.device) for tensor in pad_texts(prompts, least=1))
        slots = torch.arange(text.shape[1], device=self.device)
        # Rows without any visible slot would be NaN; padding reads slot 0, and nobody reads padding.
        mask = (slots < lengths[:, None]) | (slots == 0)
        source: list[KeyValue] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, pattern: str) -> Tensor:
            source.append((k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])

        hidden = self.embed.text(text, slots, torch.zeros_like(text))
        for block in self.blocks:
            hidden = block(hidden, attend)
        return source, lengths

    def step(self, slot: int, codes: Tensor) -> Tensor:
        """Feed the codes int64 [R] of slot - 1 (begin-of-image at slot 0); logits fp32 [R, V] of `slot`."""
        attends = (
            partial(self._attend, layer, slot % capacity, reads[slot])
            for layer, (capacity, reads) in enumerate(self.rings)
        )
        return self._run(torch.tensor([slot], device=self.device), codes, attends)

    def step_at(self, slots: Tensor, codes: Tensor) -> Tensor:
        """The same where the slot is a tensor, int32 [R] of equal numbers: nothing is read back or depends on it, so
        that a CUDA graph of one step serves all. The attention is `kernels.decode_attention`."""
        attends = (partial(self._attend_at, layer, slots) for layer in range(len(self.blocks)))
        return self._run(slots[:1].long(), codes, attends)

    def _run(self, slot: Tensor, codes: Tensor, attends: Iterator[Attend]) -> Tensor:
        hidden = self.embed.image(codes[:, None], slot, torch.ones_like(codes, dtype=torch.bool))
        for block, attend in zip(self.blocks, attends, strict=True):
            hidden = block(hidden, attend)
        return gather_last(self.heads.image(hidden), self.tensor_group)[:, 0].float()

    def _attend(self, layer: int, write: int, reads: Reads, q: Tensor, k: Tensor, v: Tensor, pattern: str) -> Tensor:
        return self.cache.attend(layer, write, reads, q, k, v)

    def _attend_at(self, layer: int, slots: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: str) -> Tensor:
        return self.cache.attend_at(layer, slots, self.prefix, q, k, v, pattern=pattern, **self.pattern)
