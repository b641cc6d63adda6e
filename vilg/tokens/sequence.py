"""The canonical sequence: `[ text segment: T slots ][ image segment: N = H*W slots, raster order ]`.

The only place that knows slots, shifts and special ids. Every task fills the same layout; three integers per sample
say who may see whom (`kernels/patterns.py` turns them into masks):

    field             text -> image   image -> text   visual question answering
    image_is_target   1               0               0
    text_len          m               m + 1           q + a + 1
    text_prefix       m               0               q

A target segment is shifted right by one behind a begin token, and (text) predicts an end token, which is why a target
text of m tokens fills m + 1 slots; a source segment is not shifted.
Shapes: B batch, T text slots, N image slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from vilg.errors import UserError

# SentencePiece is trained with these ids (tokens/text.py), so that they are the same for every vocabulary.
UNKNOWN, BEGIN_OF_TEXT, END_OF_TEXT, PAD = 0, 1, 2, 3
IGNORE = -100  # target value of slots without a loss; torch's cross_entropy default


@dataclass(frozen=True)
class SequenceSpec:
    """Sizes of the canonical sequence. `grid` is (rows, columns) and may be given as a list, as JSON has it.

    The begin-of-image id is `image_vocab_size`: one past the codes, an input only, never predicted.
    Raises UserError for sizes below one, or a text vocabulary that the special ids alone would fill.
    """

    text_slots: int
    grid: tuple[int, int]
    text_vocab_size: int
    image_vocab_size: int

    def __post_init__(self):
        object.__setattr__(self, "grid", tuple(self.grid))
        if len(self.grid) != 2 or min(self.text_slots, *self.grid, self.image_vocab_size) < 1:
            raise UserError(
                f"{self}: text slots, two sides of the grid and the image vocabulary must all be at least 1"
            )
        if self.text_vocab_size <= PAD + 1:
            raise UserError(
                f"text vocabulary of {self.text_vocab_size} pieces has no room beside the special ids 0..{PAD}"
            )

    @property
    def image_slots(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_slots(self) -> int:
        return self.text_slots + self.image_slots

    @property
    def begin_of_image(self) -> int:
        return self.image_vocab_size


@dataclass(frozen=True)
class SequenceBatch:
    """A batch in canonical layout; of mixed tasks if need be.

    text_input, text_target: int64 [B, T]; image_input, image_target: int64 [B, N]; targets hold `IGNORE` where there
    is no loss. text_len, text_prefix, image_is_target: int32 [B].
    """

    text_input: Tensor
    image_input: Tensor
    text_target: Tensor
    image_target: Tensor
    text_len: Tensor
    text_prefix: Tensor
    image_is_target: Tensor

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the model reads: text_input, image_input, text_len, text_prefix, image_is_target."""
        return self.text_input, self.image_input, self.text_len, self.text_prefix, self.image_is_target

    def target_counts(self) -> tuple[int, int]:
        """Number of text and of image target tokens."""
        return int((self.text_target != IGNORE).sum()), int((self.image_target != IGNORE).sum())

    def to(self, device: torch.device | str) -> "SequenceBatch":
        return SequenceBatch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def __len__(self) -> int:
        return self.text_input.shape[0]


@dataclass(frozen=True)
class Sample:
    """One sequence: the same fields as `SequenceBatch` without the batch axis (numpy int64 [T], [N], Python ints)."""

    text_input: np.ndarray
    image_input: np.ndarray
    text_target: np.ndarray
    image_target: np.ndarray
    text_len: int
    text_prefix: int
    image_is_target: int


def text_to_image(spec: SequenceSpec, text: Sequence[int], codes: np.ndarray) -> Sample:
    """Text is source, image is target. Empty `text` is the unconditional branch of classifier-free guidance.

    text: ids without special ones. codes: integers [N] or [H, W].
    Raises UserError if the text has more than T tokens, or if ids or codes do not fit the vocabularies.
    """
    _check_text(spec, text)
    text_input = _padded_text(spec, text)
    codes = _checked_codes(spec, codes)
    image_input = np.concatenate([[spec.begin_of_image], codes[:-1]])
    no_text_loss = np.full(spec.text_slots, IGNORE, np.int64)
    return Sample(text_input, image_input, no_text_loss, codes, len(text), len(text), 1)


def image_to_text(spec: SequenceSpec, text: Sequence[int], codes: np.ndarray) -> Sample:
    """Image is source, text is target. Raises UserError if the text has more than T - 1 tokens."""
    return answer(spec, (), text, codes)


def answer(spec: SequenceSpec, question: Sequence[int], text: Sequence[int], codes: np.ndarray) -> Sample:
    """Image and question are source, `text` is target (visual question answering; captioning if no question).

    Raises UserError if question + text + 1 exceeds T, or if ids or codes do not fit the vocabularies.
    """
    _check_text(spec, question)
    _check_text(spec, text)
    shifted = [*question, BEGIN_OF_TEXT, *text]
    text_target = np.full(spec.text_slots, IGNORE, np.int64)
    text_input = _padded_text(spec, shifted)
    text_target[len(question) : len(shifted)] = [*text, END_OF_TEXT]
    codes = _checked_codes(spec, codes)
    no_image_loss = np.full(spec.image_slots, IGNORE, np.int64)
    return Sample(text_input, codes, text_target, no_image_loss, len(shifted), len(question), 0)


def collate(samples: Sequence[Sample]) -> SequenceBatch:
    """Stack samples of any mix of tasks (at least one)."""
    arrays = {
        f.name: torch.from_numpy(np.stack([getattr(s, f.name) for s in samples]))
        for f in fields(Sample)
        if f.name.endswith(("_input", "_target")) and f.name != "image_is_target"
    }
    counts = {
        name: torch.tensor([getattr(s, name) for s in samples], dtype=torch.int32)
        for name in ("text_len", "text_prefix", "image_is_target")
    }
    return SequenceBatch(**arrays, **counts)


def _padded_text(spec: SequenceSpec, ids: Sequence[int]) -> np.ndarray:
    if len(ids) > spec.text_slots:
        raise UserError(
            f"text fills {len(ids)} slots, but the text segment has {spec.text_slots} (tokens.text_slots); shorten it"
        )
    padded = np.full(spec.text_slots, PAD, np.int64)
    padded[: len(ids)] = ids
    return padded


def _check_text(spec: SequenceSpec, ids: Sequence[int]) -> None:
    """An id past the embedding table stops a GPU without saying why; an end token inside a text would cut it short."""
    if len(ids) == 0:
        return
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or highest >= spec.text_vocab_size:
        raise UserError(
            f"text ids span {lowest}..{highest}, outside 0..{spec.text_vocab_size - 1} (tokens.text_vocab_size): "
            "is it the text model of this run?"
        )
    if lowest <= PAD and any(BEGIN_OF_TEXT <= i <= PAD for i in ids):
        raise UserError(f"text holds the special ids {BEGIN_OF_TEXT}..{PAD}, which belong to the layout alone")


def _checked_codes(spec: SequenceSpec, codes: np.ndarray) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.shape not in ((spec.image_slots,), spec.grid):
        raise UserError(f"image codes of shape {codes.shape}, but the grid is {spec.grid} ({spec.image_slots} slots)")
    if not np.issubdtype(codes.dtype, np.integer):
        raise UserError(f"image codes are {codes.dtype}, not integers")
    codes = codes.astype(np.int64).reshape(-1)  # a copy: a sample does not change with the caller's array
    if codes.min() < 0 or codes.max() >= spec.image_vocab_size:
        raise UserError(f"image codes span {codes.min()}..{codes.max()}, outside 0..{spec.image_vocab_size - 1}")
    return codes
