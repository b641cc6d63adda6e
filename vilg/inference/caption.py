"""Image -> text: cached decoding of captions and answers.

Shapes: I images, T text slots, N image slots, V text vocabulary.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kernels import sparse_attention
from vilg.errors import UserError
from vilg.inference.cache import DecodeCache, KeyValue, Reads
from vilg.inference.sampling import SamplingConfig, candidate_uniforms, sample_tokens
from vilg.model.vilg import Vilg
from vilg.parallel.ops import gather_last
from vilg.tokens.sequence import BEGIN_OF_TEXT, END_OF_TEXT, PAD, UNKNOWN, SequenceSpec
from vilg.tokens.text import TextTokenizer

Language = Literal["zh", "en"]
GREEDY = SamplingConfig(temperature=0.0)
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3001-\u303f\uff00-\uffef]")
_LATIN = re.compile(r"[A-Za-z]")


def allowed_tokens(text: TextTokenizer, language: Language | None) -> Tensor:
    """bool [V]: which tokens a caption may hold: no begin, padding or unknown token, and only the language's script.

    Both languages share one model and no tag tells them apart, so the script is what a caller can ask for: `zh`
    forbids pieces with Latin letters, `en` pieces with Chinese characters; both forbid byte pieces, which could spell
    either.
    """
    allowed = torch.ones(text.vocab_size, dtype=torch.bool)
    allowed[[UNKNOWN, BEGIN_OF_TEXT, PAD]] = False
    if language is not None:
        foreign = _LATIN if language == "zh" else _HAN
        for token in range(text.vocab_size):
            if text.is_byte(token) or foreign.search(text.piece(token)):
                allowed[token] = token == END_OF_TEXT
    return allowed


class TextDecoder:
    """Writes text slots under images; the images are read once, and by layer pattern, in both directions."""

    def __init__(self, model: Vilg, spec: SequenceSpec, codes: Tensor) -> None:
        self.embed, self.blocks, self.heads = model.embed, model.blocks, model.heads
        self.tensor_group = model.grid.tensor_group
        self.device = codes.device
        source = self._read_images(model, spec, codes)
        visible = torch.ones(codes.shape, dtype=torch.bool, device=self.device)
        capacities = [spec.text_slots] * len(self.blocks)
        self.cache = DecodeCache(source, visible, candidates=1, capacities=capacities)

    def _read_images(self, model: Vilg, spec: SequenceSpec, codes: Tensor) -> list[KeyValue]:
        nobody = torch.zeros(codes.shape[0], dtype=torch.int32, device=self.device)
        source: list[KeyValue] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, pattern: str) -> Tensor:
            source.append((k, v))
            return sparse_attention(
                q, k, v, grid=spec.grid, pattern=pattern, conv_size=model.config.conv_size,
                text_len=nobody, text_prefix=nobody, image_is_target=nobody,
            )  # fmt: skip

        slots = torch.arange(spec.image_slots, device=self.device)
        hidden = self.embed.image(codes, slots, nobody.bool())
        for block in self.blocks:
            hidden = block(hidden, attend)
        return source

    def step(self, slot: int, tokens: Tensor) -> Tensor:
        """Feed tokens int64 [I] into text slot `slot`; logits fp32 [I, V] of what follows."""
        slots = torch.tensor([slot], device=self.device)
        is_target = torch.ones(len(tokens), 1, dtype=torch.bool, device=self.device)
        hidden = self.embed.text(tokens[:, None], slots, is_target)
        reads = slice(slot + 1)
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, partial(self._attend, layer, slot, reads))
        return gather_last(self.heads.text(hidden), self.tensor_group)[:, 0].float()

    def _attend(self, layer: int, slot: int, reads: Reads, q: Tensor, k: Tensor, v: Tensor, pattern: str) -> Tensor:
        return self.cache.attend(layer, slot, reads, q, k, v)


@torch.inference_mode()
def caption_codes(
    model: Vilg,
    spec: SequenceSpec,
    text: TextTokenizer,
    codes: Tensor,
    *,
    language: Language | None = None,
    sampling: SamplingConfig = GREEDY,
    seed: int = 0,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One caption for each picture.

    codes: int64 [I, N]; language: restrict the script, None leaves it to the model; image i's random stream depends on
    (seed, i) only. A caption ends with its end token or when the segment is full. Raises UserError for guidance, which
    captioning does not have.
    """
    if sampling.guidance != 1:
        raise UserError(f"guidance={sampling.guidance}: captions are drawn without guidance; leave it at 1")
    device = next(model.parameters()).device
    allowed = torch.zeros(spec.text_vocab_size, dtype=torch.bool)
    allowed[: text.vocab_size] = allowed_tokens(text, language)
    forbidden = ~allowed.to(device)
    captions: list[str] = []
    for start in range(0, len(codes), batch):
        part = codes[start : start + batch].to(device)
        uniforms = np.stack([candidate_uniforms(seed, start + i, spec.text_slots) for i in range(len(part))])
        decoder = TextDecoder(model, spec, part)
        ids = _decode_batch(decoder, spec, torch.from_numpy(uniforms).to(device), forbidden, sampling)
        captions.extend(text.decode(row) for row in ids)
        if progress:
            progress(len(part))
    return captions


def _decode_batch(
    decoder: TextDecoder, spec: SequenceSpec, uniforms: Tensor, forbidden: Tensor, sampling: SamplingConfig
) -> list[list[int]]:
    tokens = torch.full((len(uniforms),), BEGIN_OF_TEXT, device=uniforms.device)
    written: list[Tensor] = []
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    for slot in range(spec.text_slots):
        logits = decoder.step(slot, tokens).masked_fill(forbidden, -torch.inf)
        tokens = sample_tokens(logits, uniforms[:, slot], sampling)
        written.append(tokens)
        ended |= tokens == END_OF_TEXT
        if bool(ended.all()):
            break
    rows = torch.stack(written, 1).tolist()
    return [row[: row.index(END_OF_TEXT)] if END_OF_TEXT in row else row for row in rows]
