"""Text -> image: cached decoding of image codes, many candidates a prompt.

Shapes: P prompts, K candidates, T text slots, N image slots, V image codes, H heads, D head dim, C hidden.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vilg.inference.cache import DecodeCache, KeyValue, Reads, ring_reads
from vilg.inference.load import Bundle
from vilg.inference.sampling import SamplingConfig, candidate_uniforms, guided, sample_tokens
from vilg.model.vilg import Vilg
from vilg.parallel.ops import gather_last
from vilg.tokens.sequence import SequenceSpec, pad_texts


class ImageDecoder:
    """Writes image slots one after another for P prompts with K candidates each.

    The text is read once per prompt; its keys and values serve all candidates. Of a tensor-parallel model every rank
    must make the same calls; each gets whole logits.
    """

    def __init__(self, model: Vilg, spec: SequenceSpec, prompts: Sequence[Sequence[int]], *, candidates: int) -> None:
        self.embed, self.blocks, self.heads = model.embed, model.blocks, model.heads
        self.tensor_group = model.grid.tensor_group
        self.device = next(model.parameters()).device
        self.rings = [ring_reads(block.attention.pattern, spec.grid, model.config.conv_size) for block in self.blocks]
        source, visible = self._read_text(prompts)
        self.cache = DecodeCache(
            source, visible, candidates=candidates, capacities=[capacity for capacity, _ in self.rings]
        )

    def _read_text(self, prompts: Sequence[Sequence[int]]) -> tuple[list[KeyValue], Tensor]:
        text, lengths = pad_texts(prompts, least=1)
        width = text.shape[1]
        visible = (torch.arange(width) < lengths[:, None]).to(self.device)
        # Rows without any visible slot would be NaN; padding reads slot 0, and nobody reads padding.
        mask = visible.clone()
        mask[:, 0] = True
        source: list[KeyValue] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, pattern: str) -> Tensor:
            source.append((k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])

        slots = torch.arange(width, device=self.device)
        hidden = self.embed.text(text.to(self.device), slots, torch.zeros_like(visible))
        for block in self.blocks:
            hidden = block(hidden, attend)
        return source, visible

    def step(self, slot: int, codes: Tensor) -> Tensor:
        """Feed the codes int64 [P * K] of slot - 1 (begin-of-image at slot 0); logits fp32 [P * K, V] of `slot`."""
        slots = torch.tensor([slot], device=self.device)
        hidden = self.embed.image(codes[:, None], slots, torch.ones_like(codes, dtype=torch.bool))
        for layer, block in enumerate(self.blocks):
            capacity, reads = self.rings[layer]
            hidden = block(hidden, partial(self._attend, layer, slot % capacity, reads[slot]))
        return gather_last(self.heads.image(hidden), self.tensor_group)[:, 0].float()

    def _attend(self, layer: int, write: int, reads: Reads, q: Tensor, k: Tensor, v: Tensor, pattern: str) -> Tensor:
        return self.cache.attend(layer, write, reads, q, k, v)


@torch.inference_mode()
def generate_codes(
    model: Vilg,
    spec: SequenceSpec,
    prompts: Sequence[Sequence[int]],
    *,
    num: int,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    batch_rows: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw `num` candidates for each prompt.

    prompts: token ids, at most T each; seeds: one integer per prompt, candidate i of a prompt depends on (its seed, i)
    only. batch_rows: candidates decoded together (doubled by guidance). progress: called with the number of pictures
    finished. Returns int64 [P, num, N] on the model's device.
    """
    device = next(model.parameters()).device
    out = torch.empty(len(prompts), num, spec.image_slots, dtype=torch.long, device=device)
    prompts_at_once, candidates_at_once = max(1, batch_rows // num), min(num, batch_rows)
    for first in range(0, len(prompts), prompts_at_once):
        rows = range(first, min(first + prompts_at_once, len(prompts)))
        for start in range(0, num, candidates_at_once):
            candidates = range(start, min(start + candidates_at_once, num))
            uniforms = np.stack(
                [candidate_uniforms(seeds[row], i, spec.image_slots) for row in rows for i in candidates]
            )
            drawn_from = torch.from_numpy(uniforms).to(device)
            codes = _decode_batch(model, spec, [prompts[row] for row in rows], len(candidates), drawn_from, sampling)
            out[rows.start : rows.stop, candidates.start : candidates.stop] = codes.view(len(rows), len(candidates), -1)
            if progress:
                progress(len(rows) * len(candidates))
    return out


def _decode_batch(
    model: Vilg,
    spec: SequenceSpec,
    prompts: Sequence[Sequence[int]],
    candidates: int,
    uniforms: Tensor,
    sampling: SamplingConfig,
) -> Tensor:
    """Codes int64 [P * K, N] for uniforms [P * K, N]."""
    guidance = sampling.guidance != 1
    conditions = [*prompts, *([()] * len(prompts))] if guidance else list(prompts)
    decoder = ImageDecoder(model, spec, conditions, candidates=candidates)
    rows = len(prompts) * candidates
    codes = uniforms.new_empty(rows, spec.image_slots, dtype=torch.long)
    previous = torch.full((rows,), spec.begin_of_image, device=uniforms.device)
    for slot in range(spec.image_slots):
        logits = decoder.step(slot, previous.repeat(2) if guidance else previous)
        if guidance:
            logits = guided(logits[:rows], logits[rows:], sampling.guidance)
        previous = sample_tokens(logits, uniforms[:, slot], sampling)
        codes[:, slot] = previous
    return codes


def draw_images(
    bundle: Bundle,
    prompts: Sequence[str],
    *,
    num: int,
    seed: int,
    sampling: SamplingConfig,
    batch_rows: int = 64,
    truncate: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Pictures for prompts: uint8 [P, num, height, width, 3] and their codes int64 [P, num, N].

    Raises UserError naming a prompt that is empty or, without `truncate`, does not fit the text segment.
    """
    ids = [bundle.encode_prompt(prompt, truncate=truncate) for prompt in prompts]
    codes = generate_codes(
        bundle.model,
        bundle.spec,
        ids,
        num=num,
        seeds=[bundle.prompt_seed(prompt, seed) for prompt in prompts],
        sampling=sampling,
        batch_rows=batch_rows,
        progress=progress,
    )
    images = bundle.decode_images(codes.flatten(0, 1))
    return images.reshape(len(prompts), num, *images.shape[1:]), codes
