"""A plain streaming reader of raw shards as img2dataset writes them: `key.jpg|png|webp`, `key.txt`, `key.json`.

Enough for training the tokenizers, which read every shard once from front to back. Shards that are indexed, resumed or
repaired are the data room's business.
"""

import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path

from vilg.errors import UserError


def raw_shards(path: Path) -> list[Path]:
    """The `.tar` files of a folder in name order, or the one that `path` names. Raises UserError if there is none."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a folder of .tar shards as img2dataset writes them")
    shards = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not shards:
        nested = sorted(path.glob("*/*.tar"))
        hint = f"; there are some in {nested[0].parent}" if nested else ""
        raise UserError(f"{path}: holds no .tar shards{hint}")
    return shards


def read_raw(shard: Path, suffixes: Collection[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, {suffix: content}) per sample of one shard, in file order.

    suffixes: the lower-case member suffixes to read, without dot; others are passed over. Members of a sample lie side
    by side, as in every such shard; the key is the path up to the first dot of the file name. Samples without any of
    the suffixes are left out. Raises UserError naming the shard and the byte position where its tar structure breaks.
    """
    key, members = None, {}
    end = 0  # byte behind the last whole member
    try:
        with tarfile.open(shard, mode="r|") as archive:
            for member in archive:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    sample_key = f"{folder}/{stem}" if folder else stem
                    if sample_key != key:
                        if members:
                            yield key, members
                        key, members = sample_key, {}
                    if suffix.lower() in suffixes:
                        content = archive.extractfile(member).read()
                        if len(content) != member.size:
                            raise tarfile.ReadError(f"member {member.name} is cut short")
                        members[suffix.lower()] = content
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        _check_end(shard, end)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{shard}: damaged after byte {end}: {error}; download or write this shard again") from error
    if members:
        yield key, members


def _check_end(shard: Path, end: int) -> None:
    """tarfile takes a damaged header, or a cut between members, for the end: ask for a real one's zero block."""
    with open(shard, "rb") as stream:
        stream.seek(end)
        block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise tarfile.ReadError("neither another member nor the end of the archive follows")
