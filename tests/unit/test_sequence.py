"""The canonical sequence: shifts, special ids, lengths, and what does not fit."""

import numpy as np
import pytest
import torch

from vilg.errors import UserError
from vilg.tokens.sequence import (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    IGNORE,
    PAD,
    SequenceSpec,
    answer,
    collate,
    image_to_text,
    text_to_image,
)

SPEC = SequenceSpec(text_slots=6, grid=(2, 3), text_vocab_size=20, image_vocab_size=9)
CODES = np.array([8, 0, 3, 1, 4, 7], np.uint16)
BOI = 9


def rows(sample):
    batch = collate([sample])
    return [getattr(batch, name)[0].tolist() for name in ("text_input", "text_target", "image_input", "image_target")]


def lengths(sample):
    batch = collate([sample])
    return int(batch.text_len), int(batch.text_prefix), int(batch.image_is_target)


def test_text_to_image_shifts_the_image_and_leaves_the_text():
    sample = text_to_image(SPEC, [5, 6, 7], CODES)
    text_input, text_target, image_input, image_target = rows(sample)
    assert text_input == [5, 6, 7, PAD, PAD, PAD]
    assert text_target == [IGNORE] * 6
    assert image_input == [BOI, 8, 0, 3, 1, 4]
    assert image_target == [8, 0, 3, 1, 4, 7]
    assert lengths(sample) == (3, 3, 1)


def test_text_to_image_without_text_is_the_unconditional_branch():
    sample = text_to_image(SPEC, [], CODES)
    assert rows(sample)[0] == [PAD] * 6
    assert lengths(sample) == (0, 0, 1)


def test_image_to_text_shifts_the_text_and_leaves_the_image():
    sample = image_to_text(SPEC, [5, 6, 7], CODES)
    text_input, text_target, image_input, image_target = rows(sample)
    assert text_input == [BEGIN_OF_TEXT, 5, 6, 7, PAD, PAD]
    assert text_target == [5, 6, 7, END_OF_TEXT, IGNORE, IGNORE]
    assert image_input == CODES.tolist()
    assert image_target == [IGNORE] * 6
    assert lengths(sample) == (4, 0, 0)


def test_image_to_text_of_empty_text_predicts_the_end_alone():
    sample = image_to_text(SPEC, [], CODES)
    text_input, text_target, _, _ = rows(sample)
    assert text_input == [BEGIN_OF_TEXT] + [PAD] * 5
    assert text_target == [END_OF_TEXT] + [IGNORE] * 5
    assert lengths(sample) == (1, 0, 0)


def test_answer_shifts_the_answer_behind_an_unshifted_question():
    sample = answer(SPEC, [10, 11], [5, 6], CODES)
    text_input, text_target, image_input, image_target = rows(sample)
    assert text_input == [10, 11, BEGIN_OF_TEXT, 5, 6, PAD]
    assert text_target == [IGNORE, IGNORE, 5, 6, END_OF_TEXT, IGNORE]
    assert image_input == CODES.tolist() and image_target == [IGNORE] * 6
    assert lengths(sample) == (5, 2, 0)


@pytest.mark.parametrize("make", [text_to_image, image_to_text])
def test_every_target_token_is_the_next_input_token(make):
    text_input, text_target, image_input, image_target = map(np.array, rows(make(SPEC, [5, 6, 7], CODES)))
    for input_ids, target in ((text_input, text_target), (image_input, image_target)):
        slots = np.flatnonzero(target[:-1] != IGNORE)
        following = input_ids[slots + 1]
        is_end = target[slots] == END_OF_TEXT if target is text_target else np.zeros(slots.size, bool)
        assert (following == target[slots])[~is_end].all()


def test_the_segment_can_be_filled_to_its_last_slot():
    assert rows(text_to_image(SPEC, [5] * 6, CODES))[0] == [5] * 6
    assert rows(image_to_text(SPEC, [5] * 5, CODES))[1] == [5] * 5 + [END_OF_TEXT]
    assert rows(answer(SPEC, [10] * 3, [5] * 2, CODES))[1] == [IGNORE] * 3 + [5, 5, END_OF_TEXT]


@pytest.mark.parametrize(
    "make, slots",
    [
        (lambda: text_to_image(SPEC, [5] * 7, CODES), 7),
        (lambda: image_to_text(SPEC, [5] * 6, CODES), 7),
        (lambda: answer(SPEC, [10] * 3, [5] * 3, CODES), 7),
    ],
)
def test_too_long_a_text_is_refused_with_the_slots_it_needs(make, slots):
    with pytest.raises(UserError, match=rf"fills {slots} slots.*has 6 \(tokens.text_slots\)"):
        make()


@pytest.mark.parametrize("bad", [[-1], [5, 20]])
@pytest.mark.parametrize("make", [text_to_image, image_to_text])
def test_text_ids_outside_the_vocabulary_are_refused(make, bad):
    with pytest.raises(UserError, match=r"outside 0..19 \(tokens.text_vocab_size\)"):
        make(SPEC, bad, CODES)


@pytest.mark.parametrize("special", [BEGIN_OF_TEXT, END_OF_TEXT, PAD])
def test_special_ids_inside_a_text_are_refused(special):
    with pytest.raises(UserError, match="special ids 1..3"):
        image_to_text(SPEC, [5, special], CODES)
    with pytest.raises(UserError, match="special ids 1..3"):
        answer(SPEC, [special], [5], CODES)


@pytest.mark.parametrize(
    "codes, message",
    [
        (CODES[:5], r"shape \(5,\).*grid is \(2, 3\) \(6 slots\)"),
        (CODES.reshape(3, 2), r"shape \(3, 2\)"),
        (np.array([0, 1, 2, 3, 4, 9]), r"span 0..9, outside 0..8"),
        (np.array([-1, 1, 2, 3, 4, 5]), r"span -1..5, outside 0..8"),
        (CODES / 2, "float64, not integers"),
    ],
)
@pytest.mark.parametrize("make", [text_to_image, image_to_text])
def test_codes_that_do_not_fit_are_refused(make, codes, message):
    with pytest.raises(UserError, match=message):
        collate([make(SPEC, [5], codes)])


def test_codes_may_come_as_a_grid_and_a_batch_copies_them():
    codes = CODES.astype(np.int64).reshape(2, 3)
    batch = collate([text_to_image(SPEC, [5], codes), image_to_text(SPEC, [5], codes)])
    codes[:] = 0
    assert batch.image_target[0].tolist() == batch.image_input[1].tolist() == CODES.tolist()


def test_a_batch_may_mix_tasks():
    samples = [text_to_image(SPEC, [5, 6], CODES), image_to_text(SPEC, [7], CODES), answer(SPEC, [10], [8], CODES)]
    batch = collate(samples)
    assert len(batch) == 3
    assert batch.text_len.tolist() == [2, 2, 3]
    assert batch.text_prefix.tolist() == [2, 0, 1]
    assert batch.image_is_target.tolist() == [1, 0, 0]
    assert batch.target_counts() == (2 + 2, 6)
    assert batch.text_input.dtype == batch.image_target.dtype == torch.int64
    assert batch.text_len.dtype == batch.image_is_target.dtype == torch.int32
    for index, sample in enumerate(samples):
        text_input, text_target, image_input, image_target = rows(sample)
        assert batch.text_input[index].tolist() == text_input and batch.text_target[index].tolist() == text_target
        assert batch.image_input[index].tolist() == image_input and batch.image_target[index].tolist() == image_target


def test_inputs_never_leave_the_embedding_tables():
    batch = collate([text_to_image(SPEC, [0, 19], CODES), image_to_text(SPEC, [0, 19], CODES)])
    assert 0 <= batch.text_input.min() and batch.text_input.max() < SPEC.text_vocab_size
    assert 0 <= batch.image_input.min() and batch.image_input.max() <= SPEC.begin_of_image
    assert SPEC.begin_of_image == SPEC.image_vocab_size == BOI


def test_moving_a_batch_keeps_every_field():
    batch = collate([text_to_image(SPEC, [5], CODES)]).to("meta")
    assert all(tensor.device.type == "meta" for tensor in batch.inputs())
    assert batch.text_target.shape == (1, 6) and batch.image_target.shape == (1, 6)


def test_spec_counts_slots_and_takes_the_grid_as_a_list():
    spec = SequenceSpec(text_slots=6, grid=[2, 3], text_vocab_size=20, image_vocab_size=9)
    assert spec == SPEC and hash(spec) == hash(SPEC)
    assert (spec.image_slots, spec.num_slots) == (6, 12)


@pytest.mark.parametrize(
    "change", [{"text_slots": 0}, {"grid": (0, 4)}, {"grid": (4,)}, {"text_vocab_size": 4}, {"image_vocab_size": 0}]
)
def test_sizes_that_make_no_sequence_are_refused(change):
    with pytest.raises(UserError):
        SequenceSpec(**{"text_slots": 6, "grid": (2, 3), "text_vocab_size": 20, "image_vocab_size": 9, **change})
