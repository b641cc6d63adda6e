"""`vilg data lint`: everything that can be wrong with a folder of token shards, each fault by shard and byte or key.

The loader refuses what it meets; this looks at all of it beforehand. It shares the loader's reading functions, so that
what passes here is what the loader can read.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from vilg.data.children import cores, mapped
from vilg.data.dataset import INDEX_FOLDER, index_path
from vilg.data.fields import BadField, decode_captions, decode_codes, decode_meta, decode_pixels, decode_questions
from vilg.data.manifest import FILE_NAME, Manifest, ShardEntry
from vilg.data.shards import PIXELS, ShardIndex, ShardReader, file_sha256, index_shard
from vilg.data.tar import ShardError
from vilg.errors import UserError

_WORTH_PROCESSES = 1 << 30  # bytes of shards from which on several processes look at them by default


def lint(
    folder: Path,
    *,
    fast: bool = False,
    progress: bool = True,
    image_tokenizer_hash: str | None = None,
    workers: int = 0,
) -> Iterator[str]:
    """Yield one line per fault of the token shards in `folder`.

    Checks the manifest, sizes, SHA-256, tar structure, grouping, and of every sample codes (dtype, shape, range), JSON
    and captions (UTF-8, not blank). fast: manifest, sizes, saved indices and quick fingerprints only; where a shard has
    no saved index its headers are walked. image_tokenizer_hash: of the tokenizer that should have made them, checked
    against the manifest if given. workers: processes, each with a shard at a time; 0 is this one. Raises UserError if
    there is no readable manifest.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    if image_tokenizer_hash not in (None, manifest.image_tokenizer):
        yield (
            f"{folder / FILE_NAME}: was made with image tokenizer {manifest.image_tokenizer[:12]}, not with "
            f"{image_tokenizer_hash[:12]}"
        )
    listed = {entry.name for entry in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            yield f"{path}: is not in the manifest; it would never be read"
    # Without its shards, of which there may be thousands: it goes to every process with every shard.
    check = partial(_shard_faults, folder, kind=replace(manifest, shards=()), fast=fast)
    checked = mapped(check, manifest.shards, workers=workers)
    shown = dict(total=len(manifest.shards), unit="shard", desc="lint", disable=not (progress and sys.stderr.isatty()))
    for faults in tqdm(checked, **shown):
        yield from faults


def _shard_faults(folder: Path, entry: ShardEntry, *, kind: Manifest, fast: bool) -> list[str]:
    """All faults of a shard whose samples are what `kind` says."""
    path = folder / entry.name
    try:
        size = path.stat().st_size
    except OSError as error:
        return [f"{path}: is in the manifest, but: {error.strerror}"]
    faults = [f"{path}: has {size} bytes, the manifest says {entry.bytes}"] if size != entry.bytes else []
    if not fast and (found := file_sha256(path)) != entry.sha256:
        faults.append(f"{path}: SHA-256 is {found}, the manifest says {entry.sha256}")
    faults += _index_faults(folder, entry)
    if not fast:
        faults += _content_faults(path, entry, kind, samples=True)
    elif not index_path(folder / INDEX_FOLDER, entry.name).exists():
        faults += _content_faults(path, entry, kind, samples=False)
    return faults


def _index_faults(folder: Path, entry: ShardEntry) -> Iterator[str]:
    """Faults of the saved index; a missing one is none, it is made when needed."""
    saved = index_path(folder / INDEX_FOLDER, entry.name)
    if not saved.exists():
        return
    try:
        index = ShardIndex.load(saved)
        if (index.bytes, index.sha256, len(index)) != (entry.bytes, entry.sha256, entry.samples):
            yield f"{saved}: is the index of another {entry.name} than the manifest's; delete it"
        else:
            ShardReader(folder / entry.name, index).close()
    except ShardError as error:
        yield str(error)


def _content_faults(path: Path, entry: ShardEntry, kind: Manifest, *, samples: bool) -> Iterator[str]:
    """Faults of the archive; with `samples` those of every sample as well."""
    faults: list[ShardError] = []
    try:
        index = index_shard(path, kind.fields, sha256=entry.sha256, on_fault=faults.append)
    except ShardError as error:
        yield from map(str, faults)
        yield str(error)
        return
    yield from map(str, faults)
    if len(index) != entry.samples:
        yield f"{path}: holds {len(index)} samples, the manifest says {entry.samples}"
    if not samples:
        return
    with ShardReader(path, index) as reader:
        for number in range(len(reader)):
            fields = reader.read(number)
            for problem in _sample_faults(fields, kind):
                yield f"{path}: key {reader.key(number)!r}: {problem}"


def _sample_faults(fields: dict[str, bytes], kind: Manifest) -> Iterator[str]:
    meta = {}
    try:
        decode_codes(fields.get("img.npy"), kind.grid[0] * kind.grid[1], kind.image_vocab_size)
    except BadField as error:
        yield str(error)
    try:
        meta = decode_meta(fields.get("json"))
    except BadField as error:
        yield str(error)
    try:
        decode_captions(fields.get("txt"), meta)
    except BadField as error:
        yield str(error)
    try:
        decode_questions(meta)
    except BadField as error:
        yield str(error)
    if kind.image_size is not None:
        try:
            decode_pixels(fields.get(PIXELS), kind.image_size)
        except BadField as error:
            yield str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """`vilg data lint`: exit code 1 if there is any fault."""
    parser = argparse.ArgumentParser(prog="vilg data lint", description="Check token shards against their manifest.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of token shards with manifest.json")
    parser.add_argument("--fast", action="store_true", help="manifest, sizes and indices only; no hashes, no samples")
    parser.add_argument("--image-model", type=Path, help="folder of the image tokenizer that should have made them")
    parser.add_argument("--workers", type=int, help="processes; 0: this one (default: a core each, from 1 GiB)")
    options = parser.parse_args(argv)
    if (options.workers or 0) < 0:
        raise UserError("--workers must be 0 or more")
    manifest, workers, expected = Manifest.load(options.folder), options.workers, None
    if options.image_model is not None:
        from vilg.tokens.vqgan import ImageTokenizer

        expected = ImageTokenizer.load(options.image_model).hash
    count = 0
    if workers is None:  # a process starts in seconds
        size = 0 if options.fast else sum(shard.bytes for shard in manifest.shards)
        workers = cores() if size > _WORTH_PROCESSES else 0
    for fault in lint(options.folder, fast=options.fast, image_tokenizer_hash=expected, workers=workers):
        print(fault, flush=True)
        count += 1
    scope = "sizes and indices" if options.fast else "every byte"
    print(
        f"{options.folder}: {len(manifest.shards)} shards, {manifest.num_samples} samples, {scope} checked: "
        f"{count or 'no'} fault{'' if count == 1 else 's'}"
    )
    return 1 if count else 0
