"""From sampled codes to pixels: by the codebook, or by the hidden states that the model has over the sampled sequence."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vilg.errors import UserError
from vilg.inference.load import Bundle
from vilg.tokens.sequence import collate, text_to_image
from vilg.tokens.vqgan.images import to_uint8

Decode = Literal["auto", "hidden", "codebook"]
DECODES: tuple[Decode, ...] = ("auto", "hidden", "codebook")


def chosen(bundle: Bundle, decode: Decode) -> Decode:
    """`hidden` or `codebook`: what is meant by `decode_pictures`. Raises UserError as that does."""
    if decode == "hidden" and bundle.reconstructor is None:
        raise UserError(
            f"{bundle.name} was trained without model.reconstructor, so its export decodes by the codebook only; "
            "use --decode codebook"
        )
    if decode == "auto":
        return "hidden" if bundle.reconstructor else "codebook"
    return decode


def decode_pictures(
    bundle: Bundle, prompts: Sequence[Sequence[int]], codes: Tensor, *, decode: Decode = "auto", batch: int = 64
) -> np.ndarray:
    """uint8 [I, height, width, 3] of codes int64 [I, N] that were drawn for prompts (token ids, I of them).

    codebook: the image tokenizer's decoder of the code vectors (two-stage). hidden: one more pass over prompt and codes,
    without guidance, and the reconstructor of its last states (end-to-end). auto: hidden where the export holds a
    reconstructor. Raises UserError for `hidden` if it holds none.
    """
    if chosen(bundle, decode) == "codebook":
        return bundle.decode_images(codes, batch=batch)
    return np.concatenate(
        [
            to_uint8(decode_states(bundle, prompts[start : start + batch], codes[start : start + batch]))
            for start in range(0, len(codes), batch)
        ]
    )


@torch.inference_mode()
def decode_states(bundle: Bundle, prompts: Sequence[Sequence[int]], codes: Tensor) -> Tensor:
    """Pixels fp32 [I, 3, height, width] in [-1, 1], otherwise as `decode_pictures` with `hidden`, in one pass; of a
    bundle that has a reconstructor."""
    rows = zip(prompts, codes.cpu().numpy(), strict=True)
    batch = collate([text_to_image(bundle.spec, ids, row) for ids, row in rows]).to(bundle.device)
    *_, states = bundle.model(*batch.inputs(), with_states=True)
    return bundle.reconstructor(states).clamp(-1, 1)
