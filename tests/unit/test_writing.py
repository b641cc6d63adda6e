"""Captions and answers: cached writing against the whole model, beam search against all texts there are."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.model_support import tiny_config, tiny_model
from vilg.errors import UserError
from vilg.inference.beams import beam_search
from vilg.inference.caption import GREEDY, answer_codes, caption_codes
from vilg.inference.sampling import SamplingConfig, candidate_uniforms, sample_tokens
from vilg.inference.text_decoder import TextDecoder
from vilg.model.vilg import Vilg
from vilg.tokens.sequence import BEGIN_OF_TEXT, END_OF_TEXT, PAD, SequenceSpec, answer, collate

SPEC = SequenceSpec(text_slots=7, grid=(3, 4), text_vocab_size=24, image_vocab_size=16)
QUESTIONS = [[5, 6, 7], [], [8], [9, 4, 5, 6, 7]]
ALL_SHAPES = pytest.mark.parametrize(
    "changes",
    [{}, {"row_style": "wrap"}, {"attention": "dense"}, {"qk_norm": True}],
    ids=["row", "wrap", "dense", "qk_norm"],
)


class Letters:
    """A text tokenizer of which nothing is asked but ids: piece 4 is `a`, 5 `b` ..."""

    def __init__(self, vocab_size: int = SPEC.text_vocab_size):
        self.vocab_size = vocab_size

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + i - PAD - 1) for i in ids)


def model_of(spec=SPEC, **changes) -> Vilg:
    return tiny_model(tiny_config(init_std=0.4, **changes), spec=spec, seed=3).eval()


def random_codes(count: int, spec=SPEC) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, spec.image_vocab_size, (count, spec.image_slots)))


def uncached(model, question, code, sampling, uniforms) -> list[int]:
    """What is written behind a question, with the whole sequence computed again for every token."""
    written: list[int] = []
    while len(question) + len(written) < SPEC.text_slots:
        batch = collate([answer(SPEC, question, written, code.numpy())])
        logits = model(*batch.inputs())[0][:, len(question) + len(written)].float()
        logits[:, [0, BEGIN_OF_TEXT, PAD]] = -torch.inf
        token = int(sample_tokens(logits, torch.tensor(uniforms[len(written)])[None], sampling))
        if token == END_OF_TEXT:
            break
        written.append(token)
    return written


@ALL_SHAPES
@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=1.5, top_k=9)], ids=["greedy", "sampled"])
@torch.inference_mode()
def test_answers_are_those_written_without_a_cache_whatever_the_lengths_of_the_questions(changes, sampling):
    model, codes, text = model_of(**changes), random_codes(len(QUESTIONS)), Letters()
    found = answer_codes(model, SPEC, text, codes, QUESTIONS, sampling=sampling, seed=5)
    for row, question in enumerate(QUESTIONS):
        uniforms = candidate_uniforms(5, row, SPEC.text_slots)
        assert found[row] == text.decode(uncached(model, question, codes[row], sampling, uniforms))
    assert len(set(map(len, found))) > 1
    one_by_one = answer_codes(model, SPEC, text, codes, QUESTIONS, sampling=sampling, seed=5, batch=1)
    assert one_by_one == found


@ALL_SHAPES
@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=1.5, top_p=0.9)], ids=["greedy", "sampled"])
@torch.inference_mode()
def test_sixty_texts_are_the_tokens_drawn_without_a_cache(changes, sampling):
    """All 60, captions and answers, by teacher forcing: each token is drawn again from the logits of one pass over the
    whole sequence. Written one by one they are the same."""
    model, codes, text = model_of(**changes), random_codes(60), Letters()
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(60)]
    found = answer_codes(model, SPEC, text, codes, questions, sampling=sampling, seed=5)
    assert answer_codes(model, SPEC, text, codes, questions, sampling=sampling, seed=5, batch=1) == found
    assert caption_codes(model, SPEC, text, codes, sampling=sampling, seed=5)[1::4] == found[1::4]
    for row, (question, words) in enumerate(zip(questions, found, strict=True)):
        ids = [ord(letter) - ord("a") + PAD + 1 for letter in words]
        room = SPEC.text_slots - len(question)
        batch = collate([answer(SPEC, question, ids[: room - 1], codes[row].numpy())])
        logits = model(*batch.inputs())[0][0, len(question) :].float()
        logits[:, [0, BEGIN_OF_TEXT, PAD]] = -torch.inf
        wanted = [*ids, END_OF_TEXT][:room]
        uniforms = torch.from_numpy(candidate_uniforms(5, row, SPEC.text_slots)[: len(wanted)])
        assert sample_tokens(logits[: len(wanted)], uniforms, sampling).tolist() == wanted


def test_a_question_changes_what_is_written_and_a_caption_is_the_answer_to_none():
    model, codes, text = model_of(), random_codes(3), Letters()
    captions = caption_codes(model, SPEC, text, codes)
    assert captions == answer_codes(model, SPEC, text, codes, [[], [], []])
    assert captions != answer_codes(model, SPEC, text, codes, [[9, 9], [9, 9], [9, 9]])


# Four words and five slots: 341 ways to end early and 1024 to fill the segment.
FEW = SequenceSpec(text_slots=5, grid=(3, 4), text_vocab_size=8, image_vocab_size=16)
FORBIDDEN = torch.tensor([True, True, False, True, False, False, False, False])


def log_probabilities(model, question, words, code) -> torch.Tensor:
    """Of the tokens behind `words`, float64 [V], from the whole model."""
    logits = model(*collate([answer(FEW, question, words, code.numpy())]).inputs())[0]
    return logits[0, len(question) + len(words)].double().masked_fill(FORBIDDEN, -torch.inf).log_softmax(-1)


def best_of_all(model, question, code, length_penalty: float) -> list[int]:
    """The best of all texts, each scored by itself."""
    room = FEW.text_slots - len(question)
    scored = []
    for length in range(room + 1):
        for words in itertools.product(range(4, 8), repeat=length):
            tokens = [*words] if length == room else [*words, END_OF_TEXT]
            logs = [float(known(model, question, words[:i], code)[token]) for i, token in enumerate(tokens)]
            scored.append((sum(logs) / len(tokens) ** length_penalty, [*words]))
    return max(scored)[1]


_known: dict = {}


def known(model, question, words, code) -> torch.Tensor:
    key = (id(model), tuple(question), tuple(words), tuple(code.tolist()))
    if key not in _known:
        _known[key] = log_probabilities(model, question, list(words), code)
    return _known[key]


def plain_beam_search(model, question, code, beams: int, length_penalty: float) -> list[int]:
    """The same search with lists, no cache, and no early end."""
    room = FEW.text_slots - len(question)
    running, finished = [(0.0, [])], []
    for length in range(1, room + 1):
        options = []
        for score, words in running:
            logs = known(model, question, words, code)
            finished.append(((score + float(logs[END_OF_TEXT])) / length**length_penalty, words))
            options += [(score + float(logs[word]), [*words, word]) for word in range(4, 8)]
        running = sorted(options, reverse=True)[:beams]
    finished += [(score / room**length_penalty, words) for score, words in running]
    return max(finished)[1]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
@torch.inference_mode()
def test_beam_search_finds_the_best_of_all_texts_and_with_few_beams_what_a_plain_search_finds(length_penalty):
    model, codes = model_of(FEW), random_codes(3, FEW)
    questions = [[5], [4, 6, 7], [7, 7]]
    found = {}
    for beams in (2, 3, 256):  # 256 beams hold all 4 ** 4 texts of four words, so nothing is ever cut
        decoder = TextDecoder(model, FEW, codes, questions, candidates=beams)
        found[beams] = beam_search(decoder, FORBIDDEN, beams=beams, length_penalty=length_penalty)
    for row, question in enumerate(questions):
        assert found[256][row] == best_of_all(model, question, codes[row], length_penalty)
        for beams in (2, 3):
            assert found[beams][row] == plain_beam_search(model, question, codes[row], beams, length_penalty)


def test_beams_reach_captions_and_answers_whatever_the_batch():
    model, codes, text = model_of(), random_codes(5), Letters()
    together = caption_codes(model, SPEC, text, codes, num_beams=3, length_penalty=0.5)
    assert together == caption_codes(model, SPEC, text, codes, num_beams=3, length_penalty=0.5, batch=1)
    assert together != caption_codes(model, SPEC, text, codes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": SamplingConfig(guidance=2.0)}, "guidance=2.0: texts are written without guidance"),
        ({"num_beams": 0}, "num_beams=0: must be at least 1"),
        ({"length_penalty": -1.0}, "length_penalty=-1.0: must be at least 0"),
        ({"length_penalty": math.nan}, "length_penalty=nan"),
        ({"num_beams": 2, "sampling": SamplingConfig()}, "num_beams=2 and temperature=1.0: beam search does not sample"),
    ],
)
def test_ways_of_writing_that_do_not_exist_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        caption_codes(model_of(), SPEC, Letters(), random_codes(1), **settings)
