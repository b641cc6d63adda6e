"""A folder of token shards as numbered samples. N image slots."""

import bisect
import itertools
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vilg.data.fields import BadField, decode_captions, decode_codes, decode_meta, decode_questions
from vilg.data.manifest import Manifest
from vilg.data.order import Order
from vilg.data.shards import PIXELS, ShardIndex, ShardReader, file_sha256, index_shard
from vilg.data.tar import ShardError
from vilg.errors import TRY_AGAIN, UserError
from vilg.tokens.sequence import SequenceSpec

INDEX_FOLDER = "index"  # beside the shards, unless the caller names another place
_MAX_OPEN_SHARDS = 128  # file descriptors per process; a window of the order touches 32 at most


class SampleError(UserError):
    """A sample that cannot be used; the loader replaces it. `reason` is a short class for counting."""

    def __init__(self, shard: str, key: str, reason: str, detail: str):
        super().__init__(f"{shard}: key {key!r}: {detail}")
        self.shard, self.key, self.reason, self.detail = shard, key, reason, detail

    def __reduce__(self):
        return SampleError, (self.shard, self.key, self.reason, self.detail)


@dataclass(frozen=True)
class TokenSample:
    """codes: uint16 [N]; captions: one or more; meta: the sample's JSON object; questions: with their answers; image: the
    bytes of the resized image as a PNG, where the shards hold it."""

    codes: np.ndarray
    captions: tuple[str, ...]
    meta: dict
    questions: tuple[tuple[str, str], ...] = ()
    image: bytes | None = None


class TokenDataset:
    """Random access to the samples of a folder of token shards, numbered through its shards in manifest order.

    Cheap to send to another process: only the folders travel, files are opened where they are read.
    """

    is_remote = False  # then `read_ahead` (of `remote.py`) wants to know what comes next

    def __init__(self, folder: Path, manifest: Manifest, index_folders: tuple[Path, ...]):
        self.folder, self.manifest, self.index_folders = folder, manifest, index_folders
        self.manifest_hash = manifest.hash
        self.num_samples = manifest.num_samples
        self._ends = list(itertools.accumulate(shard.samples for shard in manifest.shards))
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._indices: dict[int, ShardIndex] = {}  # only those that could not be saved
        self._verified: dict[int, tuple[int, int]] = {}  # shard -> (mtime_ns, inode) whose fingerprint was right

    @staticmethod
    def open(folder: Path | str, *, cache_dir: Path | None = None) -> "TokenDataset":
        """Read and check the manifest and the sizes of the shards.

        Indices lie in `folder/index`. The data may be read-only: one that is missing there is looked for, or made and
        written, under `cache_dir`; without that it is kept in memory. Raises UserError naming the file at fault.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if manifest.num_samples == 0:
            raise UserError(f"{folder} holds no samples")
        for shard in manifest.shards:
            try:
                size = os.stat(folder / shard.name).st_size
            except OSError as error:
                raise ShardError(folder / shard.name, f"is in the manifest, but: {error.strerror}") from None
            if size != shard.bytes:
                raise ShardError(folder / shard.name, f"has {size} bytes, the manifest says {shard.bytes}")
        spare = (spare_index_folder(cache_dir, manifest),) if cache_dir is not None else ()
        return TokenDataset(folder, manifest, (folder / INDEX_FOLDER, *spare))

    def __reduce__(self):
        return TokenDataset, (self.folder, self.manifest, self.index_folders)

    def __len__(self) -> int:
        return self.num_samples

    def order(self, seed: int) -> Order:
        """In which order a run of this seed visits the samples."""
        return Order(self.num_samples, seed)

    def check(
        self, spec: SequenceSpec, *, image_tokenizer_hash: str | None = None, image_size: int | None = None
    ) -> None:
        """Raise UserError unless these tokens are what a recipe with `spec` (and that image tokenizer) expects.

        image_size: side in pixels of the images that must lie beside the codes.
        """
        manifest, where = self.manifest, self.folder / "manifest.json"
        if tuple(spec.grid) != manifest.grid:
            raise UserError(
                f"tokens.grid={list(spec.grid)}, but {where} has grid {list(manifest.grid)}; set tokens.grid to that, "
                "or tokenize the data again at another image size"
            )
        if spec.image_vocab_size != manifest.image_vocab_size:
            raise UserError(
                f"tokens.image_vocab_size={spec.image_vocab_size}, but {where} was made with "
                f"{manifest.image_vocab_size} codes; set it to that, or use another image tokenizer"
            )
        if image_tokenizer_hash is not None and image_tokenizer_hash != manifest.image_tokenizer:
            raise UserError(
                f"{where} was made with image tokenizer {manifest.image_tokenizer[:12]}, but tokens.image_model is "
                f"{image_tokenizer_hash[:12]}; name the tokenizer that made the data, or tokenize the data again"
            )

        if image_size is not None and manifest.image_size != image_size:
            held = "no images" if manifest.image_size is None else f"images of {manifest.image_size} pixels"
            raise UserError(
                f"model.reconstructor needs images of {image_size} pixels beside the codes, but {where} has {held}; "
                "tokenize the data again with `vilg data tokenize --store-images`"
            )

    def read(self, index: int) -> tuple[np.ndarray, str, dict]:
        """Codes (uint16 [N]), first caption and JSON object of sample `index`. Raises SampleError if it is bad."""
        sample = self.sample(index)
        return sample.codes, sample.captions[0], sample.meta

    def sample(self, index: int) -> TokenSample:
        """Sample `index` with all its captions.

        The captions are `captions` (a list of strings) of the JSON if it has them, else the text. Raises SampleError
        naming shard and key if the sample is bad, ShardError if the shard itself is not what the manifest describes.
        """
        number, row = self._locate(index)
        reader = self._reader(number)
        fields = reader.read(row)
        grid = self.manifest.grid
        try:
            codes = decode_codes(fields.get("img.npy"), grid[0] * grid[1], self.manifest.image_vocab_size)
            meta = decode_meta(fields.get("json"))
            captions, questions = decode_captions(fields.get("txt"), meta), decode_questions(meta)
            return TokenSample(codes, captions, meta, questions, fields.get(PIXELS))
        except BadField as error:
            raise self.error(index, error.reason, str(error)) from None

    def error(self, index: int, reason: str, detail: str) -> SampleError:
        """A SampleError that names the shard and the key of sample `index`."""
        number, row = self._locate(index)
        return SampleError(self.manifest.shards[number].name, self._reader(number).key(row), reason, detail)

    def shard_of(self, index: int) -> str:
        """Path of the shard that holds sample `index`, for messages."""
        return str(self.folder / self.manifest.shards[self._locate(index)[0]].name)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        number = bisect.bisect_right(self._ends, index)
        return number, int(index) - (self._ends[number - 1] if number else 0)

    def _reader(self, number: int) -> ShardReader:
        reader = self._readers.get(number)
        if reader is not None:
            self._readers.move_to_end(number)
            return reader
        path = self.folder / self.manifest.shards[number].name
        index = self.shard_index(number)
        try:
            status = os.stat(path)
        except OSError as error:
            message = f"cannot be opened any more: {error.strerror}"
            raise ShardError(path, message, exit_code=TRY_AGAIN) from error
        identity = (status.st_mtime_ns, status.st_ino)
        reader = ShardReader(path, index, verify=self._verified.get(number) != identity)
        self._verified[number] = identity
        self._readers[number] = reader
        if len(self._readers) > _MAX_OPEN_SHARDS:
            self._readers.popitem(last=False)[1].close()
        return reader

    def shard_index(self, number: int) -> ShardIndex:
        """The index of a shard: loaded, or made (the shard is then hashed and compared with the manifest) and saved."""
        if number in self._indices:
            return self._indices[number]
        entry = self.manifest.shards[number]
        if (saved := self.saved_index(number)) is not None:
            index = ShardIndex.load(saved)
            if (index.bytes, index.sha256, len(index)) != (entry.bytes, entry.sha256, entry.samples):
                raise ShardError(saved, f"is the index of another {entry.name} than the manifest's; delete it")
            return index
        path = self.folder / entry.name
        found = file_sha256(path)
        if found != entry.sha256:
            raise ShardError(path, f"has SHA-256 {found}, the manifest says {entry.sha256}: damaged or replaced")
        index = index_shard(path, self.manifest.fields, sha256=found)
        if len(index) != entry.samples:
            raise ShardError(path, f"holds {len(index)} samples, the manifest says {entry.samples}")
        for folder in self.index_folders:
            try:
                index.save(index_path(folder, entry.name))
                return index
            except (UserError, OSError):  # read-only data
                continue
        self._indices[number] = index  # slower, not wrong: each process makes its own
        return index

    def saved_index(self, number: int) -> Path | None:
        """Where the index of a shard lies; None if it was not saved."""
        places = (index_path(folder, self.manifest.shards[number].name) for folder in self.index_folders)
        return next((place for place in places if place.exists()), None)


def spare_index_folder(cache_dir: Path, manifest: Manifest) -> Path:
    """Where indices go that cannot lie beside their shards: the same for the same data in another place."""
    return Path(cache_dir) / manifest.hash[:16] / INDEX_FOLDER


def index_path(index_folder: Path, shard_name: str) -> Path:
    """Where the index of a shard lies."""
    return index_folder / f"{shard_name}.idx"
