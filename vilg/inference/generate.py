"""Text -> image: cached decoding of image codes, many candidates a prompt.

Shapes: P prompts, K candidates of each, T text slots, N image slots.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vilg.inference.decode import Decode, chosen, decode_pictures
from vilg.inference.drawing import Drawing, OnStep
from vilg.inference.image_decoder import ImageDecoder
from vilg.inference.load import Bundle
from vilg.inference.sampling import SamplingConfig, candidate_uniforms
from vilg.model.vilg import Vilg
from vilg.tokens.sequence import SequenceSpec


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
    graph: bool = True,
    progress: Callable[[int], None] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw `num` candidates for each prompt.

    prompts: token ids, at most T each; seeds: one integer per prompt, candidate i of a prompt depends on (its seed, i)
    only. batch_rows: candidates decoded together (doubled by guidance). graph: on one GPU, replay a CUDA graph of the
    step (the same tokens, sooner). progress: called with the number of pictures finished. on_step: after each slot, see
    `drawing.OnStep`. Returns int64 [P, num, N] on the model's device.
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
            codes = _decode_batch(
                model, spec, [prompts[row] for row in rows], len(candidates), drawn_from, sampling,
                graph=graph, on_step=on_step,
            )  # fmt: skip
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
    *,
    graph: bool,
    on_step: OnStep | None,
) -> Tensor:
    """Codes int64 [P * K, N] for uniforms [P * K, N]."""
    conditions = [*prompts, *([()] * len(prompts))] if sampling.is_guided else list(prompts)
    decoder = ImageDecoder(model, spec, conditions, candidates=candidates)
    on_gpu = uniforms.is_cuda
    drawing = Drawing(decoder, uniforms, sampling, begin=spec.begin_of_image, replayable=on_gpu)
    return drawing.draw(graph=graph and on_gpu and decoder.tensor_group is None, on_step=on_step)


def draw_images(
    bundle: Bundle,
    prompts: Sequence[str],
    *,
    num: int,
    seed: int,
    sampling: SamplingConfig,
    batch_rows: int = 64,
    truncate: bool = False,
    graph: bool = True,
    decode: Decode = "auto",
    progress: Callable[[int], None] | None = None,
    on_step: OnStep | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Pictures for prompts: uint8 [P, num, height, width, 3] and their codes int64 [P, num, N].

    batch_rows: candidates decoded together, to codes and to pixels. decode: as `decode_pictures`. Raises UserError
    naming a prompt that is empty or, without `truncate`, does not fit the text segment, and as `decode_pictures` does.
    """
    decode = chosen(bundle, decode)
    ids = [bundle.encode_prompt(prompt, truncate=truncate) for prompt in prompts]
    codes = generate_codes(
        bundle.model,
        bundle.spec,
        ids,
        num=num,
        seeds=[bundle.prompt_seed(prompt, seed) for prompt in prompts],
        sampling=sampling,
        batch_rows=batch_rows,
        graph=graph,
        progress=progress,
        on_step=on_step,
    )
    repeated = [row for row in ids for _ in range(num)]
    images = decode_pictures(bundle, repeated, codes.flatten(0, 1), decode=decode, batch=batch_rows)
    return images.reshape(len(prompts), num, *images.shape[1:]), codes
