"""One optimizer step's share of a rank, built from nothing but its first global sample index. Runs in loader workers.

Shapes: B pairs of a micro-batch (2B sequences with `directions: both`), T text slots, N image slots.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from vilg.data.blend import Blend
from vilg.data.dataset import SampleError, TokenDataset, TokenSample
from vilg.data.fields import BadField, decode_pixels
from vilg.data.order import WINDOW_SAMPLES, uniforms
from vilg.errors import USER_MISTAKE, UserError
from vilg.tokens.sequence import Sample, SequenceBatch, SequenceSpec, answer, collate, text_to_image

MAX_BAD_IN_A_ROW = 100
MAX_CAPTION_CHARACTERS = 20_000  # longer ones do not fit any text segment; encoding a megabyte would stall the step
_CACHED_CAPTIONS = 1 << 16
_DIRECTION, _DROPOUT, _CAPTION = 0, 1, 2  # columns of `uniforms`

Ids = tuple[int, ...]


class TextEncoder(Protocol):
    """What the loader needs of `vilg.tokens.text.TextTokenizer`."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class BadSample:
    """A sample that was replaced. global_index counts through the run; sample through the data set."""

    global_index: int
    epoch: int
    sample: int
    shard: str
    key: str
    reason: str
    detail: str


class Pair(NamedTuple):
    """Codes uint16 [N], question (empty for a caption) and caption or answer, pixels uint8 [S, S, 3] where wanted."""

    codes: np.ndarray
    question: Ids
    text: Ids
    pixels: np.ndarray | None


@dataclass(frozen=True)
class StepData:
    """One rank's share of a step as numpy arrays: they cross process borders without shared memory or descriptors.

    arrays: per micro-batch the fields of SequenceBatch. num_samples: pairs read. failure: why the run must stop,
    and with which exit code.
    """

    arrays: list[dict[str, np.ndarray]]
    num_samples: int
    bad: list[BadSample]
    failure: str | None = None
    exit_code: int = USER_MISTAKE

    def batches(self) -> list[SequenceBatch]:
        return [SequenceBatch(**{k: torch.from_numpy(v) for k, v in batch.items()}) for batch in self.arrays]


@dataclass
class StepBuilder:
    """Callable: first global index of a step -> StepData. Picklable; caches refill in the process that calls it.

    image_size: side of the pixels that text -> image sequences carry; None: none. source_images: the others carry theirs
    too. last_sample: when a sample was last
    asked for (`time.monotonic`), for whoever waits in another thread.
    """

    dataset: TokenDataset | Blend
    text_tokenizer: TextEncoder
    spec: SequenceSpec
    directions: Literal["both", "alternate", "answer"]
    text_to_image_fraction: float
    caption_dropout: float
    seed: int
    global_size: int
    micro_size: int
    data_rank: int
    data_size: int
    image_size: int | None = None
    source_images: bool = False

    def __post_init__(self) -> None:
        self._order = self.dataset.order(self.seed)
        self._encoded: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._reading = 0
        self._fetched = 0  # global index up to which remote data have been told what comes
        self.last_sample = time.monotonic()

    def reading_from(self) -> str:
        """The shard whose sample was asked for last."""
        return self.dataset.shard_of(self._reading)

    def __reduce__(self):
        return StepBuilder, tuple(getattr(self, field.name) for field in fields(self))

    def __call__(self, first: int) -> StepData:
        if self.dataset.is_remote:
            self._read_ahead(first)
        chances = uniforms(self.seed, "pair-choices", first, self.global_size)
        # [micro-batches, micro_size]: the elements of the step that are this rank's.
        mine = np.arange(self.global_size).reshape(-1, self.data_size, self.micro_size)[:, self.data_rank]
        samples = self._order(first + mine.reshape(-1)).reshape(mine.shape)
        arrays: list[dict[str, np.ndarray]] = []
        bad: list[BadSample] = []
        try:
            for elements, numbers in zip(mine, samples, strict=True):
                sequences: list[Sample] = []
                for element, number in zip(elements.tolist(), numbers.tolist(), strict=True):
                    chance = chances[element].tolist()
                    pair = self._pair(first + element, number, chance, bad)
                    sequences += self._sequences(pair, chance)
                arrays.append(_arrays(collate(sequences)))
        except UserError as error:  # handed over as text: a traceback from a worker would bury it
            return StepData([], mine.size, bad, failure=str(error), exit_code=error.exit_code)
        return StepData(arrays, mine.size, bad)

    def _read_ahead(self, first: int) -> None:
        """Tell remote data what the next two windows of the order need, once every window."""
        if first >= self._fetched:
            self.dataset.read_ahead(self._order(np.arange(first, first + 2 * WINDOW_SAMPLES)))
            self._fetched = first + WINDOW_SAMPLES

    def _pair(self, index: int, number: int, chance: list[float], bad: list[BadSample]) -> Pair:
        """The pair at global index `index`, or that of the next good position in its data set's order.

        Only the sample at `index` itself is recorded as bad: its followers are recorded at their own index, once.
        """
        attempts = min(MAX_BAD_IN_A_ROW, self.dataset.num_samples)
        for attempt in range(attempts):
            if attempt:
                number = self._order.following(index, attempt)
            self._reading, self.last_sample = number, time.monotonic()
            try:
                sample = self.dataset.sample(number)
                question, text = self._texts(number, sample, chance[_CAPTION])
                wanted = self.source_images or self._draws(chance)
                return Pair(sample.codes, question, text, self._pixels(number, sample) if wanted else None)
            except SampleError as error:
                last = error
                if attempt == 0:
                    bad.append(
                        BadSample(index, self._order.epoch(index), number, error.shard, error.key, error.reason, error.detail)
                    )
        raise UserError(
            f"{attempts} samples in a row are bad, the last one {last}; check the data with `vilg data lint "
            f"{self.dataset.folder}`"
        )

    def _texts(self, number: int, sample: TokenSample, chance: float) -> tuple[Ids, Ids]:
        """Ids of a caption drawn among the sample's, behind no question, or of a question with its answer; or of the
        next one that fits. Raises SampleError if none does."""
        if self.directions == "answer":
            kind, texts = "question", list(sample.questions)
        else:
            kind, texts = "caption", [("", caption) for caption in sample.captions]
        if not texts:
            raise self.dataset.error(number, "no question", "json holds no `questions`, which data.directions asks for")
        room = self.spec.text_slots - 1  # as a target it needs one more slot, for the end token
        drawn = int(chance * len(texts))
        length = "no tokens"
        for i in range(len(texts)):
            source, target = texts[(drawn + i) % len(texts)]
            if (characters := len(source) + len(target)) > MAX_CAPTION_CHARACTERS:
                length = f"{characters} characters"
                continue
            asked, ids = self._encode(source) if source else (), self._encode(target)
            count = len(asked) + len(ids)
            if ids and bool(asked) == bool(source) and count <= room:
                return asked, ids
            length = f"{count} tokens" if ids else length
        if length == "no tokens":
            raise self.dataset.error(number, f"empty {kind}", f"the {kind} has no tokens")
        raise self.dataset.error(
            number, f"{kind} too long", f"the {kind} has {length}, tokens.text_slots leaves room for {room} tokens"
        )

    def _encode(self, caption: str) -> Ids:
        ids = self._encoded.get(caption)
        if ids is None:
            ids = tuple(self.text_tokenizer.encode(caption))
            self._encoded[caption] = ids
            if len(self._encoded) > _CACHED_CAPTIONS:
                self._encoded.popitem(last=False)
        return ids

    def _pixels(self, number: int, sample: TokenSample) -> np.ndarray | None:
        if self.image_size is None:
            return None
        try:
            return decode_pixels(sample.image, self.image_size)
        except BadField as error:
            raise self.dataset.error(number, error.reason, str(error)) from None

    def _draws(self, chance: list[float]) -> bool:
        """Whether a pair gives a text -> image sequence."""
        if self.directions in ("both", "answer"):
            return self.directions == "both"
        return chance[_DIRECTION] < self.text_to_image_fraction

    def _sequences(self, pair: Pair, chance: list[float]) -> list[Sample]:
        source = () if chance[_DROPOUT] < self.caption_dropout else pair.text
        drawn = [text_to_image(self.spec, source, pair.codes, pair.pixels)] if self._draws(chance) else []
        if drawn and self.directions != "both":
            return drawn
        seen = pair.pixels if self.source_images else None
        return [*drawn, answer(self.spec, pair.question, pair.text, pair.codes, seen)]


def _arrays(batch: SequenceBatch) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in batch.tensors().items()}
