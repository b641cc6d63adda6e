"""Token shards -> the micro-batches of each optimizer step, the same under every layout, resumable exactly.

Global sample index g counts through the whole run: step s holds g = s * global_size .. (s + 1) * global_size - 1, and
g is the sample at position g % num_samples of epoch g // num_samples. Element i of a step goes to data rank r,
micro-batch j, place p with i = (j * data_size + r) * micro_size + p. Order, direction, caption choice and caption
dropout depend on (seed, purpose, g) only, so ranks, workers, micro-batches and restarts cannot change them.
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vilg.config.schema import DataConfig
from vilg.data.blend import Blend, open_data, parts_of
from vilg.data.dataset import SampleError, TokenDataset, TokenSample
from vilg.data.patience import PatientBuilder
from vilg.data.steps import BadSample, StepBuilder, StepData, TextEncoder
from vilg.data.workers import built_ahead
from vilg.errors import UserError
from vilg.tokens.sequence import SequenceBatch, SequenceSpec

__all__ = ["Blend", "Loader", "LoaderState", "SampleError", "TokenDataset", "TokenSample", "open_data", "parts_of"]

STATE_VERSION = 1
ENOUGH_SEEN = 10_000  # samples before a share of bad ones means anything; fewer are judged as if they were so many
_STEPS_AHEAD = 4  # that each worker holds ready


@dataclass(frozen=True)
class LoaderState:
    """All that a resume needs. samples_consumed counts over the whole run and all ranks; epoch follows from it and is
    stored for people."""

    format_version: int
    manifest_hash: str
    seed: int
    epoch: int
    samples_consumed: int

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict) -> "LoaderState":
        """Raises UserError for another format version or other keys."""
        if data.get("format_version") != STATE_VERSION:
            raise UserError(
                f"loader state has format_version {data.get('format_version')!r}; this vilg reads {STATE_VERSION}"
            )
        names = {field.name for field in fields(LoaderState)}
        if set(data) != names:
            raise UserError(f"loader state holds {sorted(data)}, expected {sorted(names)}")
        return LoaderState(**data)


class Loader:
    """Iterating yields, for each optimizer step and without end, the list of this rank's micro-batches.

    Raises UserError if the data do not fit the recipe, if global_size is not a multiple of micro_size * data_size, if
    `state` belongs to other data or another seed, and while iterating when too many samples are bad.
    """

    def __init__(
        self,
        dataset: TokenDataset | Blend,
        text_tokenizer: TextEncoder,
        spec: SequenceSpec,
        data_config: DataConfig,
        *,
        seed: int,
        global_size: int,
        micro_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        state: LoaderState | None = None,
        quarantine: Path | None = None,
        image_tokenizer_hash: str | None = None,
        image_size: int | None = None,
        source_images: bool = False,
    ):
        """Sizes count pairs; with `directions: both` a micro-batch holds 2 * micro_size sequences.

        state: continue there (from any other layout; global_size may differ too). quarantine: JSONL file to which bad
        samples are appended, one per rank. image_tokenizer_hash: checked against the manifest if given.
        image_size: side in pixels of the images that text -> image sequences carry; None: no images. source_images: the
        other sequences carry theirs too.
        """
        if global_size % (micro_size * data_size):
            raise UserError(
                f"batch.global_size={global_size} is not a multiple of batch.micro_size={micro_size} times "
                f"{data_size} data ranks; use a multiple of {micro_size * data_size}"
            )
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data_rank {data_rank} is not in 0..{data_size - 1}")
        dataset.check(spec, image_tokenizer_hash=image_tokenizer_hash, image_size=image_size)
        if text_tokenizer.vocab_size > spec.text_vocab_size:
            raise UserError(
                f"tokens.text_vocab_size={spec.text_vocab_size}, but the text tokenizer has "
                f"{text_tokenizer.vocab_size} pieces; use at least that many"
            )
        self._manifest_hash, self._seed, self._num_samples = dataset.manifest_hash, seed, dataset.num_samples
        self._global_size, self._config, self._quarantine = global_size, data_config, quarantine
        self._unlisted = False
        self._consumed = self._start(state, dataset)
        builder = StepBuilder(
            dataset=dataset,
            text_tokenizer=text_tokenizer,
            spec=spec,
            directions=data_config.directions,
            text_to_image_fraction=data_config.text_to_image_fraction,
            caption_dropout=data_config.caption_dropout,
            seed=seed,
            global_size=global_size,
            micro_size=micro_size,
            data_rank=data_rank,
            data_size=data_size,
            image_size=image_size,
            source_images=source_images,
        )
        self._builder = PatientBuilder(builder, data_config.read_timeout)
        self.samples_seen = 0
        self.bad_samples: Counter[str] = Counter()

    @property
    def state(self) -> LoaderState:
        """State after the step yielded last was consumed (the starting state before the first)."""
        epoch = self._consumed // self._num_samples
        return LoaderState(STATE_VERSION, self._manifest_hash, self._seed, epoch, self._consumed)

    def __iter__(self) -> Iterator[list[SequenceBatch]]:
        with closing(self._steps(self._consumed)) as steps:
            for data in steps:
                self._account(data)
                self._consumed += self._global_size
                yield data.batches()

    def _start(self, state: LoaderState | None, dataset: TokenDataset | Blend) -> int:
        if state is None:
            return 0
        if state.manifest_hash != dataset.manifest_hash:
            raise UserError(
                f"the checkpoint was trained on data with manifest {state.manifest_hash[:12]}, but {dataset.folder} "
                f"has {dataset.manifest_hash[:12]}; set data.train to the same shards, or start a new run"
            )
        if state.seed != self._seed:
            raise UserError(f"the checkpoint was trained with seed={state.seed}, the recipe has seed={self._seed}")
        return state.samples_consumed

    def _steps(self, consumed: int) -> Iterator[StepData]:
        firsts = itertools.count(consumed, self._global_size)
        if self._config.workers == 0:
            yield from map(self._builder, firsts)
        else:
            yield from built_ahead(self._builder, firsts, workers=self._config.workers, ahead=_STEPS_AHEAD)

    def _account(self, data: StepData) -> None:
        if data.failure is not None:
            raise UserError(data.failure, data.exit_code)
        self.samples_seen += data.num_samples
        self.bad_samples.update(bad.reason for bad in data.bad)
        if data.bad and self._quarantine is not None:
            self._list(data.bad, self._quarantine)
        total = self.bad_samples.total()
        if total > self._config.max_bad_fraction * max(self.samples_seen, ENOUGH_SEEN):
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.bad_samples.most_common())
            last = data.bad[-1] if data.bad else None
            where = f"; the last was {last.shard} key {last.key!r}: {last.detail}" if last else ""
            log = f"; all of them are listed in {self._quarantine}" if self._quarantine and not self._unlisted else ""
            raise UserError(
                f"{total} of {self.samples_seen} samples are bad ({reasons}), more than "
                f"data.max_bad_fraction={self._config.max_bad_fraction} allows{where}{log}. "
                "Check the data with `vilg data lint`, or raise data.max_bad_fraction"
            )

    def _list(self, bad: list[BadSample], path: Path) -> None:
        """Append to the list of bad samples. That is for people: where it cannot be written, a note says so once."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in bad)
        except OSError as error:
            if not self._unlisted:
                with suppress(OSError):  # the console may be on the same disk
                    print(f"note: {path}: bad samples are missing there: {error.strerror}", file=sys.stderr, flush=True)
            self._unlisted = True


def bad_sample_path(run_dir: Path, rank: int, *, held_out: bool = False) -> Path:
    """Where a run keeps the bad samples of a data rank, or the held-out ones of a rank."""
    return run_dir / "logs" / f"quarantine_{'held_out_' if held_out else ''}rank{rank}.jsonl"
