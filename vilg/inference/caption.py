"""Image -> text: captions of pictures, and answers to questions about them.

Shapes: I pictures, N image slots, V text vocabulary.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vilg.errors import UserError
from vilg.inference.beams import beam_search
from vilg.inference.sampling import SamplingConfig, candidate_uniforms, check_effect, sample_tokens
from vilg.inference.text_decoder import TextDecoder
from vilg.model.vilg import Vilg
from vilg.tokens.sequence import BEGIN_OF_TEXT, END_OF_TEXT, PAD, UNKNOWN, SequenceSpec
from vilg.tokens.text import TextTokenizer

Language = Literal["zh", "en"]
GREEDY = SamplingConfig(temperature=0.0)
MOST_BEAMS = 16
MOST_LENGTH_PENALTY = 10.0
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


def caption_codes(
    model: Vilg, spec: SequenceSpec, text: TextTokenizer, codes: Tensor, **settings: Any
) -> list[str]:
    """One caption for each picture: `answer_codes`, with its settings, without a question."""
    return answer_codes(model, spec, text, codes, [()] * len(codes), **settings)


@torch.inference_mode()
def answer_codes(
    model: Vilg,
    spec: SequenceSpec,
    text: TextTokenizer,
    codes: Tensor,
    questions: Sequence[Sequence[int]],
    *,
    language: Language | None = None,
    sampling: SamplingConfig = GREEDY,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    seed: int = 0,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """What the model writes behind question i about picture i, for each i.

    codes: int64 [I, N]; questions: I lists of token ids (`TextSegment.question`), at most T - 2 each. language:
    restrict the script, None leaves it to the model. num_beams: above 1, beam search (`beams.py`) in place of sampling.
    batch: rows decoded together, a picture's beams counted. Picture i's random stream depends on (seed, i) only. A text
    ends with its end token or when the segment is full. progress: called with the number of texts finished. Raises
    UserError for guidance, which writing does not have, and for settings that contradict each other.
    """
    check_writing(sampling, num_beams=num_beams, length_penalty=length_penalty)
    device = next(model.parameters()).device
    allowed = torch.zeros(spec.text_vocab_size, dtype=torch.bool)
    allowed[: text.vocab_size] = allowed_tokens(text, language)
    forbidden = ~allowed.to(device)
    written: list[str] = []
    at_once = max(1, batch // num_beams)
    for start in range(0, len(codes), at_once):
        part = codes[start : start + at_once].to(device)
        decoder = TextDecoder(model, spec, part, questions[start : start + at_once], candidates=num_beams)
        if num_beams > 1:
            ids = beam_search(decoder, forbidden, beams=num_beams, length_penalty=length_penalty)
        else:
            uniforms = np.stack([candidate_uniforms(seed, start + i, spec.text_slots) for i in range(len(part))])
            ids = _decode_batch(decoder, torch.from_numpy(uniforms).to(device), forbidden, sampling)
        written.extend(text.decode(row) for row in ids)
        if progress:
            progress(len(part))
    return written


def writing_sampling(
    given: Mapping[str, float | int | None], *, num_beams: int, length_penalty: float
) -> SamplingConfig:
    """Greedy, changed by what a user gave (None: not given). Raises UserError as `check_writing`."""
    sampling = replace(GREEDY, **{name: value for name, value in given.items() if value is not None})
    check_writing(sampling, num_beams=num_beams, length_penalty=length_penalty)
    return sampling


def check_writing(sampling: SamplingConfig, *, num_beams: int, length_penalty: float) -> None:
    """Raise UserError unless texts can be written so, with every setting that differs from its default in effect."""
    if sampling.is_guided:
        raise UserError(f"guidance={sampling.guidance}: texts are written without guidance; leave it at 1")
    if not 1 <= num_beams <= MOST_BEAMS:
        raise UserError(f"num_beams={num_beams}: must be at least 1 and at most {MOST_BEAMS}; 1 is no beam search")
    if not 0 <= length_penalty <= MOST_LENGTH_PENALTY:
        raise UserError(
            f"length_penalty={length_penalty}: must be at least 0 and at most {MOST_LENGTH_PENALTY:g}; 0 compares plain "
            "probabilities"
        )
    if num_beams == 1:
        check_effect(sampling, base=GREEDY)
    if num_beams == 1 and length_penalty != 1:
        raise UserError(
            f"length_penalty={length_penalty}: compares the texts of a beam search; give num_beams above 1, or leave it out"
        )
    drawn = [f"{name}={value}" for name, value in asdict(sampling).items() if value != getattr(GREEDY, name)]
    if num_beams > 1 and drawn:
        raise UserError(f"num_beams={num_beams} and {', '.join(drawn)}: beam search does not sample; choose one")


def _decode_batch(
    decoder: TextDecoder, uniforms: Tensor, forbidden: Tensor, sampling: SamplingConfig
) -> list[list[int]]:
    """Token ids of each row, without the end token; uniforms [I, T]."""
    tokens = torch.full((len(uniforms),), BEGIN_OF_TEXT, device=uniforms.device)
    written: list[Tensor] = []
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    for step in range(int(decoder.room.max())):
        logits = decoder.step(step, tokens).masked_fill(forbidden, -torch.inf)
        tokens = sample_tokens(logits, uniforms[:, step], sampling)
        written.append(tokens)
        ended |= (tokens == END_OF_TEXT) | (decoder.room == step + 1)
        if bool(ended.all()):
            break
    rows = [row[:room] for row, room in zip(torch.stack(written, 1).tolist(), decoder.room.tolist(), strict=True)]
    return [row[: row.index(END_OF_TEXT)] if END_OF_TEXT in row else row for row in rows]
