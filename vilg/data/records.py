"""What a tokenising job leaves beside its shards, so that it can be stopped at any moment and started again.

`job.json` says what the folder's shards are made with; `records/NAME.json` says that shard NAME is finished, from which
raw shard it came and which samples were left out.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from vilg.data.manifest import FILE_NAME, ShardEntry, read_json, write_json
from vilg.data.shards import fingerprint
from vilg.data.tar import ByteSource
from vilg.errors import UserError

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Rejected:
    """A raw sample that has no place in the token shards."""

    shard: str
    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Record:
    """A finished shard: its manifest entry, the fingerprint of the raw shard it came from, and what was left out."""

    entry: ShardEntry
    source: str
    rejected: tuple[Rejected, ...]

    def save(self, path: Path) -> None:
        """Write under a temporary name, then rename."""
        write_json(path, {"format_version": FORMAT_VERSION, **asdict(self)})

    @staticmethod
    def load(path: Path) -> "Record":
        """Raises UserError for another format version or anything that is no record."""
        data = read_json(path, missing="the record of a finished shard")
        try:
            if data["format_version"] != FORMAT_VERSION:
                raise UserError(f"{path}: format_version {data['format_version']!r} is unknown, not {FORMAT_VERSION}")
            rejected = tuple(Rejected(**item) for item in data["rejected"])
            return Record(ShardEntry(**data["entry"]), data["source"], rejected)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is no shard's record ({error!r}); delete it, the shard is made again") from None


def claim(out: Path, job: dict, names: list[str]) -> None:
    """Write job.json, or check that the one there describes this job and that no strange shard lies in `out`."""
    path = out / "job.json"
    if path.exists():
        found = read_json(path, missing="")
        for key, value in job.items():
            there = found.get(key) if isinstance(found, dict) else None
            if there != value:
                raise UserError(f"{out} holds shards made with {key} {there!r}, now it is {value!r}; use another --out")
    strange = sorted({shard.name for shard in out.glob("*.tar")} - set(names))
    if strange:
        raise UserError(f"{out} already holds {strange[0]}, which the raw shards do not; use another --out")
    if not path.exists() and (out / FILE_NAME).exists():
        raise UserError(f"{out} already holds a data set; use another --out")
    write_json(path, job)


def record_path(out: Path, shard_name: str) -> Path:
    """Where the record of a shard lies."""
    return out / "records" / f"{shard_name}.json"


def finished(out: Path, shard: Path) -> Record | None:
    """The record of a shard that an earlier start finished; UserError if its raw shard has changed since."""
    path = record_path(out, shard.name)
    if not path.exists():
        return None
    record = Record.load(path)
    with ByteSource(shard) as source:
        found = fingerprint(source)
    if record.source != found:
        raise UserError(f"{shard} has changed since {out / shard.name} was made from it; use another --out")
    token_shard = out / shard.name
    whole = token_shard.exists() and token_shard.stat().st_size == record.entry.bytes
    return record if whole else None
