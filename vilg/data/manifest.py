"""`manifest.json`: what a folder of token shards holds. Format version 1.

    {"format_version": 1, "image_tokenizer": HASH, "grid": [H, W], "image_vocab_size": V, "num_samples": n,
     "shards": [{"name": "00000.tar", "samples": 1000, "bytes": 4106240, "sha256": HEX}, ...]}

and, where every sample holds its resized image too, "image_size": its side in pixels.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vilg.data.shards import PIXELS, TOKEN_FIELDS
from vilg.errors import UserError
from vilg.tokens.files import write_atomically

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard: file name, number of samples, size in bytes, SHA-256 (hex) of the whole file."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A folder of token shards, in the order in which their samples are numbered.

    image_tokenizer: `ImageTokenizer.hash` of the encoder; grid: [H, W] tokens of an image; image_vocab_size: codes lie
    in 0 .. image_vocab_size - 1. image_size: side in pixels of the images that lie beside the codes, None without.
    """

    image_tokenizer: str
    grid: tuple[int, int]
    image_vocab_size: int
    shards: tuple[ShardEntry, ...]
    image_size: int | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a sample."""
        return TOKEN_FIELDS if self.image_size is None else (*TOKEN_FIELDS, PIXELS)

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of everything above; two data sets with one hash hold the same bytes in the same order."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict:
        return {
            "format_version": FORMAT_VERSION,
            "image_tokenizer": self.image_tokenizer,
            "grid": list(self.grid),
            "image_vocab_size": self.image_vocab_size,
            **({} if self.image_size is None else {"image_size": self.image_size}),
            "num_samples": self.num_samples,
            "shards": [asdict(shard) for shard in self.shards],
        }

    def save(self, folder: Path) -> None:
        """Write `folder/manifest.json` under a temporary name, then rename."""
        write_json(Path(folder) / FILE_NAME, self.to_dict())

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Read and check `folder/manifest.json`. Raises UserError naming the file and what is wrong with it."""
        path = Path(folder) / FILE_NAME
        data = read_json(path, missing=f"{folder} is no folder of token shards (`vilg data tokenize` makes one)")
        return Manifest.parse(data, path)

    @staticmethod
    def parse(data: object, where: Path | str) -> "Manifest":
        """Check the JSON of a manifest that was read from `where`. Raises UserError naming it."""
        try:
            return _checked(data)
        except (KeyError, TypeError, ValueError) as error:
            detail = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where}: {detail}") from None


def _checked(data: object) -> Manifest:
    if not isinstance(data, dict):
        raise ValueError("expected a JSON object")
    version = data["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version {version!r} is unknown; this vilg reads {FORMAT_VERSION}")
    known = {"format_version", "image_tokenizer", "grid", "image_vocab_size", "image_size", "num_samples", "shards"}
    unknown = set(data) - known
    if unknown:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r}")
    grid = data["grid"]
    if not isinstance(grid, list) or len(grid) != 2 or not all(_is_count(side) and side for side in grid):
        raise ValueError(f"grid {grid!r} is not [H, W]")
    if not _is_count(data["image_vocab_size"]) or not 0 < data["image_vocab_size"] <= 1 << 16:
        raise ValueError(f"image_vocab_size {data['image_vocab_size']!r} is not in 1..65536 (codes are uint16)")
    if not isinstance(data["image_tokenizer"], str):
        raise ValueError("image_tokenizer is not a string")
    if "image_size" in data and not (_is_count(data["image_size"]) and data["image_size"]):
        raise ValueError(f"image_size {data['image_size']!r} is no number of pixels")
    shards = tuple(_checked_entry(entry) for entry in _list(data["shards"]))
    if len({shard.name for shard in shards}) != len(shards):
        raise ValueError("two shards have one name")
    manifest = Manifest(data["image_tokenizer"], (grid[0], grid[1]), data["image_vocab_size"], shards, data.get("image_size"))
    if data["num_samples"] != manifest.num_samples:
        raise ValueError(f"num_samples is {data['num_samples']!r}, but the shards add up to {manifest.num_samples}")
    return manifest


def _checked_entry(entry: object) -> ShardEntry:
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(ShardEntry)}:
        raise ValueError(f"shard entry {entry!r} does not hold exactly name, samples, bytes, sha256")
    name = entry["name"]
    if not isinstance(name, str) or not name or name != os.path.basename(name) or name in (".", ".."):
        raise ValueError(f"shard name {name!r} is not a plain file name")
    if not _is_count(entry["samples"]) or not _is_count(entry["bytes"]) or not isinstance(entry["sha256"], str):
        raise ValueError(f"shard {name!r}: samples and bytes must be counts, sha256 a string")
    return ShardEntry(**entry)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _list(value: object) -> Sequence[object]:
    if not isinstance(value, list):
        raise ValueError("shards is not a list")
    return value


def read_json(path: Path, *, missing: str) -> object:
    """Parsed JSON of `path`; UserError with `missing` if there is no such file, or if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {missing}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def write_json(path: Path, data: object) -> None:
    """Write JSON under a temporary name, then rename. Raises UserError if the place is not writable."""
    write_atomically(path, (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode("utf-8"))
