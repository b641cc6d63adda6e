"""Beam search over the decoding cache.

Shapes: I pictures, K beams of each, R = I * K rows, L the most tokens that fit, V text vocabulary.
"""

import torch
from torch import Tensor

from vilg.inference.text_decoder import TextDecoder
from vilg.tokens.sequence import BEGIN_OF_TEXT, END_OF_TEXT


@torch.inference_mode()
def beam_search(decoder: TextDecoder, forbidden: Tensor, *, beams: int, length_penalty: float) -> list[list[int]]:
    """The best text under each picture, without its end token.

    The score of a text is its log-probability (among the tokens that are not forbidden) divided by
    (number of tokens, the end token counted) ** length_penalty, so 0 compares plain probabilities and larger values
    favour longer texts. A text ends with its end token, or where the segment is full. At every step each of the K
    likeliest unfinished texts is also tried as finished; the search ends when no unfinished one can still win.

    decoder: made with candidates=beams and not yet stepped; forbidden: bool [V].
    """
    room = decoder.room.view(-1, beams)[:, 0]  # [I]
    images, device = len(room), room.device
    scores = torch.full((images, beams), -torch.inf, dtype=torch.float64, device=device)
    scores[:, 0] = 0  # all beams are the same text as yet
    texts = torch.zeros(images, beams, int(room.max()), dtype=torch.long, device=device)  # [I, K, L]
    best_score = torch.full((images,), -torch.inf, dtype=torch.float64, device=device)
    best_text, best_length = texts[:, 0].clone(), torch.zeros_like(room)
    last = torch.full((images * beams,), BEGIN_OF_TEXT, device=device)
    first_rows = torch.arange(images, device=device)[:, None] * beams

    def consider(candidates: Tensor, lengths: int) -> None:
        """Keep the best of finished texts: `candidates` [I, K] scores of the present beams, cut to `lengths` tokens."""
        value, beam = candidates.max(1)
        better = value > best_score
        best_score[better] = value[better]
        best_text[better] = texts[better, beam[better]]
        best_length[better] = lengths

    for step in range(texts.shape[2]):
        divisor = float(step + 1) ** length_penalty
        logits = decoder.step(step, last).masked_fill(forbidden, -torch.inf)
        total = scores[..., None] + logits.double().log_softmax(-1).view(images, beams, -1)  # [I, K, V]
        consider(total[..., END_OF_TEXT] / divisor, step)
        total[..., END_OF_TEXT] = -torch.inf
        scores, place = total.flatten(1).topk(beams)
        beam, token = place // total.shape[2], place % total.shape[2]
        texts = texts.gather(1, beam[..., None].expand_as(texts))
        texts[:, :, step] = token
        full = room == step + 1
        consider((scores / divisor).masked_fill(~full[:, None], -torch.inf), step + 1)
        scores = scores.masked_fill(full[:, None], -torch.inf)
        # What an unfinished text adds only lowers its log-probability; the longest one is divided by most.
        if bool((scores[:, 0] / room.double() ** length_penalty <= best_score).all()):
            break
        decoder.cache.reorder((first_rows + beam).flatten(), step + 1)
        last = token.flatten()
    return [text[:length] for text, length in zip(best_text.tolist(), best_length.tolist(), strict=True)]
