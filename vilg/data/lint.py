"""`vilg data lint`: everything that can be wrong with a folder of token shards, each fault by shard and byte or key.

The loader refuses what it meets; this looks at all of it beforehand. It shares the loader's reading functions, so that
what passes here is what the loader can read.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from vilg.data.dataset import INDEX_FOLDER, index_path
from vilg.data.fields import BadField, decode_captions, decode_codes, decode_meta, decode_questions
from vilg.data.manifest import FILE_NAME, Manifest, ShardEntry
from vilg.data.shards import TOKEN_FIELDS, ShardIndex, ShardReader, file_sha256, index_shard
from vilg.data.tar import ShardError


def lint(
    folder: Path, *, fast: bool = False, progress: bool = True, image_tokenizer_hash: str | None = None
) -> Iterator[str]:
    """Yield one line per fault of the token shards in `folder`.

    Checks the manifest, sizes, SHA-256, tar structure, grouping, and of every sample codes (dtype, shape, range), JSON
    and captions (UTF-8, not blank). fast: manifest, sizes, saved indices and quick fingerprints only; where a shard has
    no saved index its headers are walked. image_tokenizer_hash: of the tokenizer that should have made them, checked
    against the manifest if given. Raises UserError if there is no readable manifest.
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
    for entry in tqdm(manifest.shards, unit="shard", desc="lint", disable=not (progress and sys.stderr.isatty())):
        path = folder / entry.name
        try:
            size = path.stat().st_size
        except OSError as error:
            yield f"{path}: is in the manifest, but: {error.strerror}"
            continue
        if size != entry.bytes:
            yield f"{path}: has {size} bytes, the manifest says {entry.bytes}"
        if not fast and (found := file_sha256(path)) != entry.sha256:
            yield f"{path}: SHA-256 is {found}, the manifest says {entry.sha256}"
        yield from _index_faults(folder, entry)
        if not (fast and index_path(folder / INDEX_FOLDER, entry.name).exists()):
            yield from _content_faults(path, entry, manifest, samples=not fast)


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


def _content_faults(path: Path, entry: ShardEntry, manifest: Manifest, *, samples: bool) -> Iterator[str]:
    faults: list[ShardError] = []
    try:
        index = index_shard(path, TOKEN_FIELDS, sha256=entry.sha256, on_fault=faults.append)
    except ShardError as error:
        yield from map(str, faults)
        yield str(error)
        return
    yield from map(str, faults)
    if len(index) != entry.samples:
        yield f"{path}: holds {len(index)} samples, the manifest says {entry.samples}"
    if not samples:
        return
    num = manifest.grid[0] * manifest.grid[1]
    with ShardReader(path, index) as reader:
        for number in range(len(reader)):
            fields = reader.read(number)
            for problem in _sample_faults(fields, num, manifest.image_vocab_size):
                yield f"{path}: key {reader.key(number)!r}: {problem}"


def _sample_faults(fields: dict[str, bytes], num: int, vocab_size: int) -> Iterator[str]:
    meta = {}
    try:
        decode_codes(fields.get("img.npy"), num, vocab_size)
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


def main(argv: Sequence[str] | None = None) -> int:
    """`vilg data lint`: exit code 1 if there is any fault."""
    parser = argparse.ArgumentParser(prog="vilg data lint", description="Check token shards against their manifest.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of token shards with manifest.json")
    parser.add_argument("--fast", action="store_true", help="manifest, sizes and indices only; no hashes, no samples")
    parser.add_argument("--image-model", type=Path, help="folder of the image tokenizer that should have made them")
    options = parser.parse_args(argv)
    expected = None
    if options.image_model is not None:
        from vilg.tokens.vqgan import ImageTokenizer

        expected = ImageTokenizer.load(options.image_model).hash
    count = 0
    for fault in lint(options.folder, fast=options.fast, image_tokenizer_hash=expected):
        print(fault, flush=True)
        count += 1
    manifest = Manifest.load(options.folder)
    scope = "sizes and indices" if options.fast else "every byte"
    print(
        f"{options.folder}: {len(manifest.shards)} shards, {manifest.num_samples} samples, {scope} checked: "
        f"{count or 'no'} fault{'' if count == 1 else 's'}"
    )
    return 1 if count else 0
