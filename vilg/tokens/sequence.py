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

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

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
    is no loss. text_len, text_prefix, image_is_target: int32 [B]. images: for end-to-end training, uint8 [b, S, S, 3] of
    the b sequences whose image is the target, in their order; else None. source_images: of the others, [B - b, S, S, 3],
    where the image tokenizer is trained too.
    """

    text_input: Tensor
    image_input: Tensor
    text_target: Tensor
    image_target: Tensor
    text_len: Tensor
    text_prefix: Tensor
    image_is_target: Tensor
    images: Tensor | None = None
    source_images: Tensor | None = None

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the model reads: text_input, image_input, text_len, text_prefix, image_is_target."""
        return self.text_input, self.image_input, self.text_len, self.text_prefix, self.image_is_target

    def target_counts(self) -> tuple[int, int]:
        """Number of text and of image target tokens."""
        return int((self.text_target != IGNORE).sum()), int((self.image_target != IGNORE).sum())

    def to(self, device: torch.device | str) -> "SequenceBatch":
        return SequenceBatch(**{name: x.to(device, non_blocking=True) for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __len__(self) -> int:
        return self.text_input.shape[0]


class Sample(NamedTuple):
    """One sequence, checked but not yet laid out: `collate` does that for a whole batch at once.

    text: ids as they fill the text slots, a begin token before a target included. text_prefix: how many of the first of
    them are source. codes: integers [N], the caller's own array. image: uint8 [S, S, 3] where pixels are wanted.
    """

    spec: SequenceSpec
    text: Sequence[int]
    text_prefix: int
    image_is_target: bool
    codes: np.ndarray
    image: np.ndarray | None = None


def text_to_image(
    spec: SequenceSpec, text: Sequence[int], codes: np.ndarray, image: np.ndarray | None = None
) -> Sample:
    """Text is source, image is target. Empty `text` is the unconditional branch of classifier-free guidance.

    text: ids without special ones. codes: integers [N] or [H, W]. image: uint8 [S, S, 3], for end-to-end training.
    Raises UserError if the text has more than T tokens, or if its ids or the shape of the codes do not fit.
    """
    _check_text(spec, text)
    _check_room(spec, len(text))
    return Sample(spec, text, len(text), True, _flat_codes(spec, codes), image)


def image_to_text(spec: SequenceSpec, text: Sequence[int], codes: np.ndarray) -> Sample:
    """Image is source, text is target. Raises UserError if the text has more than T - 1 tokens."""
    return answer(spec, (), text, codes)


def answer(
    spec: SequenceSpec, question: Sequence[int], text: Sequence[int], codes: np.ndarray, image: np.ndarray | None = None
) -> Sample:
    """Image and question are source, `text` is target (visual question answering; captioning if no question).

    image: uint8 [S, S, 3], where the image tokenizer is trained too.
    Raises UserError if question + text + 1 exceeds T, or if ids or the shape of the codes do not fit.
    """
    _check_text(spec, question)
    _check_text(spec, text)
    shifted = [*question, BEGIN_OF_TEXT, *text]
    _check_room(spec, len(shifted))
    return Sample(spec, shifted, len(question), False, _flat_codes(spec, codes), image)


def pad_texts(texts: Sequence[Sequence[int]], *, least: int = 0) -> tuple[Tensor, Tensor]:
    """Source texts for decoding: ids int64 [B, longest or `least`], padded on the right, and lengths int64 [B]."""
    lengths = torch.tensor([len(ids) for ids in texts])
    padded = torch.full((len(texts), max(least, int(lengths.max()))), PAD)
    for row, ids in enumerate(texts):
        padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return padded, lengths


def collate(samples: Sequence[Sample]) -> SequenceBatch:
    """Lay out samples of any mix of tasks (at least one, of one spec). The batch has images where samples have them.

    Raises UserError for codes outside the vocabulary, which would stop a GPU without saying why.
    """
    spec = samples[0].spec
    lengths = np.array([len(sample.text) for sample in samples], np.int32)
    prefixes = np.array([sample.text_prefix for sample in samples], np.int32)
    is_image = np.array([sample.image_is_target for sample in samples], bool)
    text_input, text_target = _lay_out_text(spec, [sample.text for sample in samples], lengths, prefixes)
    image_input, image_target = _lay_out_images(spec, np.stack([sample.codes for sample in samples]), is_image)
    arrays = (text_input, image_input, text_target, image_target, lengths, prefixes, is_image.astype(np.int32))
    return SequenceBatch(
        *map(torch.from_numpy, arrays),
        images=_images([sample for sample in samples if sample.image_is_target]),
        source_images=_images([sample for sample in samples if not sample.image_is_target]),
    )


def target_images(batch: SequenceBatch) -> Tensor:
    """`batch.images`, uint8 [0, 1, 1, 3] where a batch without text -> image sequences has none."""
    return batch.images if batch.images is not None else torch.zeros(0, 1, 1, 3, dtype=torch.uint8)


def all_images(batch: SequenceBatch) -> Tensor:
    """Images of all sequences in their order, uint8 [B, S, S, 3], of a batch that has them all."""
    order = batch.image_is_target.argsort(descending=True, stable=True)  # targets, then sources
    found = torch.cat([x for x in (batch.images, batch.source_images) if x is not None])
    assert len(found) == len(batch), "not every sequence has its image"
    return torch.empty_like(found).index_copy_(0, order, found)


def image_codes(batch: SequenceBatch) -> Tensor:
    """Codes of all images, whether source or target, int64 [B, N]."""
    return torch.where(batch.image_is_target.bool()[:, None], batch.image_target, batch.image_input)


def with_image_codes(spec: SequenceSpec, batch: SequenceBatch, codes: Tensor) -> SequenceBatch:
    """The same batch, on the host, with other codes int64 [B, N]. Raises UserError for codes outside the vocabulary."""
    laid_out = _lay_out_images(spec, codes.numpy(), batch.image_is_target.bool().numpy())
    image_input, image_target = map(torch.from_numpy, laid_out)
    return replace(batch, image_input=image_input, image_target=image_target)


def without_targets(batch: SequenceBatch, which: Tensor) -> SequenceBatch:
    """The same batch, on the host, where the sequences of `which`, bool [B], have no target: their image is a source."""
    is_target = batch.image_is_target.masked_fill(which, 0)
    images, source_images = batch.images, batch.source_images
    if source_images is not None:
        pixels, drawn = all_images(batch), is_target.bool()
        images, source_images = pixels[drawn], pixels[~drawn]
    elif images is not None:
        images = images[~which[batch.image_is_target.bool()]]
    return replace(
        batch,
        text_target=batch.text_target.masked_fill(which[:, None], IGNORE),
        image_target=batch.image_target.masked_fill(which[:, None], IGNORE),
        image_is_target=is_target,
        images=images,
        source_images=source_images,
    )


def _images(samples: Sequence[Sample]) -> Tensor | None:
    pixels = [sample.image for sample in samples if sample.image is not None]
    return torch.from_numpy(np.stack(pixels)) if pixels else None


def _lay_out_text(
    spec: SequenceSpec, texts: Sequence[Sequence[int]], lengths: np.ndarray, prefixes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Input and target int64 [B, T]. A target is the input behind it, and the end token behind the last one."""
    shape, slots = (len(texts), spec.text_slots), np.arange(spec.text_slots)
    filled = slots < lengths[:, None]  # [B, T]
    text_input = np.full(shape, PAD, np.int64)
    text_input[filled] = np.fromiter(itertools.chain.from_iterable(texts), np.int64, lengths.sum())
    following = np.full(shape, END_OF_TEXT, np.int64)
    following[:, :-1] = text_input[:, 1:]
    following[slots == lengths[:, None] - 1] = END_OF_TEXT
    return text_input, np.where(filled & (slots >= prefixes[:, None]), following, IGNORE)


def _lay_out_images(spec: SequenceSpec, codes: np.ndarray, is_target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Input and target int64 [B, N] of codes [B, N] and bool [B]."""
    if codes.max() >= spec.image_vocab_size or codes.min() < 0:
        raise UserError(f"image codes span {codes.min()}..{codes.max()}, outside 0..{spec.image_vocab_size - 1}")
    image_input = codes.astype(np.int64)
    image_input[is_target, 1:] = codes[is_target, :-1]
    image_input[is_target, 0] = spec.begin_of_image
    image_target = np.full(codes.shape, IGNORE, np.int64)
    image_target[is_target] = codes[is_target]
    return image_input, image_target


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


def _check_room(spec: SequenceSpec, num_slots: int) -> None:
    if num_slots > spec.text_slots:
        raise UserError(
            f"text fills {num_slots} slots, but the text segment has {spec.text_slots} (tokens.text_slots); shorten it"
        )


def _flat_codes(spec: SequenceSpec, codes: np.ndarray) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.shape not in ((spec.image_slots,), spec.grid):
        raise UserError(f"image codes of shape {codes.shape}, but the grid is {spec.grid} ({spec.image_slots} slots)")
    if codes.dtype.kind not in "iu":
        raise UserError(f"image codes are {codes.dtype}, not integers")
    return codes.reshape(-1)
