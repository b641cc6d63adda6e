"""Image -> text, slot after slot: the picture and its question are read once, what is written goes into the cache.

Shapes: I pictures, K candidates of each, R = I * K rows, T text slots, Q slots of the longest question, N image slots,
V text vocabulary.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kernels import sparse_attention
from vilg.inference.cache import DecodeCache, KeyValue, Reads
from vilg.model.vilg import Vilg
from vilg.parallel.ops import gather_last
from vilg.tokens.sequence import SequenceSpec, pad_texts


class TextDecoder:
    """Writes text behind sources: a picture, and before it in the text segment the tokens of a question, or none.

    codes: int64 [I, N]; questions: I lists of token ids (default: none). The source is read by layer pattern, in both
    directions, once for the K candidates of each picture. room: int64 [R], how many tokens fit behind each question.
    Of a tensor-parallel model every rank must make the same calls; each gets whole logits.
    """

    def __init__(
        self,
        model: Vilg,
        spec: SequenceSpec,
        codes: Tensor,
        questions: Sequence[Sequence[int]] | None = None,
        *,
        candidates: int = 1,
    ) -> None:
        self.embed, self.blocks, self.heads = model.embed, model.blocks, model.heads
        self.tensor_group = model.grid.tensor_group
        self.device = codes.device
        self.last_slot = spec.text_slots - 1
        ids, lengths = pad_texts(questions if questions is not None else [()] * len(codes))
        ids, lengths = ids.to(self.device), lengths.to(self.device)
        source = self._read_source(model, spec, codes, ids, lengths)
        asked = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        visible = torch.cat([asked, torch.ones_like(codes, dtype=torch.bool)], 1)  # [I, Q + N]
        self.first_slots = lengths.repeat_interleave(candidates)  # [R], where the begin token goes
        self.room = spec.text_slots - self.first_slots
        capacities = [int(self.room.max())] * len(self.blocks)
        self.cache = DecodeCache(source, visible, candidates=candidates, capacities=capacities)

    def _read_source(
        self, model: Vilg, spec: SequenceSpec, codes: Tensor, questions: Tensor, lengths: Tensor
    ) -> list[KeyValue]:
        source: list[KeyValue] = []
        asked = lengths.to(torch.int32)
        image_is_target = torch.zeros_like(asked)

        def attend(q: Tensor, k: Tensor, v: Tensor, pattern: str) -> Tensor:
            source.append((k, v))
            return sparse_attention(
                q, k, v, grid=spec.grid, pattern=pattern, conv_size=model.config.conv_size,
                text_len=asked, text_prefix=asked, image_is_target=image_is_target,
            )  # fmt: skip

        text_slots = torch.arange(questions.shape[1], device=self.device)
        image_slots = torch.arange(spec.image_slots, device=self.device)
        text = self.embed.text(questions, text_slots, torch.zeros_like(questions))
        hidden = torch.cat([text, self.embed.image(codes, image_slots, image_is_target)], 1)
        for block in self.blocks:
            hidden = block(hidden, attend)
        return source

    def step(self, step: int, tokens: Tensor) -> Tensor:
        """Feed tokens int64 [R], number `step` from 0 (the begin token) behind each question; logits fp32 [R, V] of
        what follows. A row whose room is used up gets logits that mean nothing."""
        slots = (self.first_slots + step).clamp(max=self.last_slot)[:, None]
        hidden = self.embed.text(tokens[:, None], slots, torch.ones_like(slots))
        reads = slice(step + 1)
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, partial(self._attend, layer, step, reads))
        return gather_last(self.heads.text(hidden), self.tensor_group)[:, 0].float()

    def _attend(self, layer: int, write: int, reads: Reads, q: Tensor, k: Tensor, v: Tensor, pattern: str) -> Tensor:
        return self.cache.attend(layer, write, reads, q, k, v)
