"""`vilg data tokenize`: raw shards -> token shards and their manifest. B images of a batch.

Each raw shard becomes one token shard of the same name. An image goes through `vilg.tokens.vqgan.images.decode_image`
(bicubic scaling until the shorter side fits, centre crop), the same as in the image tokenizer's training, and is
encoded in fp32. Batches never cross shards, so a shard's bytes depend on the raw shard, the tokenizer, the image size
and the batch size only.

Several jobs may share the work (`--part 2/8`: every eighth shard from the second); whichever finds all shards finished
writes the manifest.

A job may be killed at any moment: a shard gets its name when it is whole, `records/NAME.json` follows, and whoever
starts the same command again continues behind the last record. `job.json` refuses to mix two tokenizers or sizes
in a folder.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vilg.data.dataset import INDEX_FOLDER, index_path
from vilg.data.fields import BadField, decode_captions, decode_meta, describe, encode_codes
from vilg.data.manifest import FILE_NAME, Manifest, ShardEntry
from vilg.data.records import FORMAT_VERSION, Record, Rejected, claim, finished, record_path
from vilg.data.shards import IMAGE_FIELDS, RAW_FIELDS, TOKEN_FIELDS, ShardIndex, ShardReader, index_shard
from vilg.data.writer import ShardWriter
from vilg.errors import UserError
from vilg.tokens.raw import raw_shards
from vilg.tokens.vqgan.images import BadImage, decode_image, to_float

_FEW = 20  # bad samples that never stop a job, however small it is
_LINE_SECONDS = 10  # between progress lines where there is no terminal


class ImageEncoder(Protocol):
    """What is needed of `vilg.tokens.vqgan.ImageTokenizer`."""

    vocab_size: int
    factor: int
    image_size: int
    hash: str

    def encode(self, images: Tensor) -> Tensor: ...


def tokenize(
    raw: Path,
    out: Path,
    image_tokenizer: ImageEncoder,
    *,
    image_size: int | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    max_bad_fraction: float = 0.01,
    progress: bool = True,
    part: tuple[int, int] = (1, 1),
) -> Manifest | None:
    """Encode the raw shards in `raw` into token shards in `out`; returns the manifest written last, or None while
    shards of other parts are missing.

    image_size: side in pixels (default: the size the tokenizer was trained on). batch_size: images per encoder call.
    max_bad_fraction: share of unreadable samples above which the job stops (the first few are always let pass).
    part: (i, n), of n jobs on the same folder this is the i-th.
    Raises UserError: no shards, a damaged raw shard, an unfit size, `out` holding another job's shards, too many bad.
    """
    size = image_size if image_size is not None else image_tokenizer.image_size
    if size % image_tokenizer.factor:
        raise UserError(
            f"--image-size {size} is not a multiple of the image tokenizer's factor {image_tokenizer.factor}; "
            f"use {max(1, size // image_tokenizer.factor) * image_tokenizer.factor}"
        )
    if image_tokenizer.vocab_size > 1 << 16:
        raise UserError(f"the image tokenizer has {image_tokenizer.vocab_size} codes; token shards hold 65536 at most")
    shards = raw_shards(Path(raw))
    side = size // image_tokenizer.factor
    job = {
        "format_version": FORMAT_VERSION,
        "image_tokenizer": image_tokenizer.hash,
        "image_vocab_size": image_tokenizer.vocab_size,
        "image_size": size,
        "batch_size": batch_size,
    }
    claim(out, job, [shard.name for shard in shards])
    first, parts = part[0] - 1, part[1]
    mine = shards[first::parts]
    indices = [index_shard(shard, RAW_FIELDS, sha256="") for shard in mine]
    bar = _Progress(sum(len(index) for index in indices), enabled=progress)
    records = []
    for shard, index in zip(mine, indices, strict=True):
        record = finished(out, shard, index)
        if record is not None:
            bar.skip(len(index))
        else:
            record = _tokenize_shard(shard, index, out, image_tokenizer, size, batch_size, device, bar)
        records.append(record)
        _check_bad(records, max_bad_fraction)
        bar.shard_done(shard.name)
    bar.close()
    if parts > 1:
        # Looking is cheap; only who may be the last one reads the other parts' raw shards to be sure.
        if not all(record_path(out, shard.name).exists() for shard in shards):
            return None
        found = [finished(out, shard, index_shard(shard, RAW_FIELDS, sha256="")) for shard in shards]
        if None in found:
            return None
        records = found
        _check_bad(records, max_bad_fraction)
    manifest = Manifest(
        image_tokenizer.hash, (side, side), image_tokenizer.vocab_size, tuple(record.entry for record in records)
    )
    if manifest.num_samples == 0:
        raise UserError(f"{raw}: not one usable sample in {len(shards)} shards")
    manifest.save(out)
    return manifest


def _tokenize_shard(
    shard: Path,
    index: ShardIndex,
    out: Path,
    image_tokenizer: ImageEncoder,
    size: int,
    batch_size: int,
    device: torch.device | str,
    bar: "_Progress",
) -> Record:
    rejected: list[Rejected] = []
    with ShardReader(shard, index) as reader, ShardWriter(out / shard.name) as writer:
        for batch in _batches(_usable(reader, size, rejected, bar), batch_size):
            images = to_float(np.stack([image for _, image, _ in batch])).to(device)
            codes = image_tokenizer.encode(images).flatten(1).cpu().numpy().astype(np.uint16)  # [B, N]
            for (key, _, fields), row in zip(batch, codes, strict=True):
                writer.write(key, {"img.npy": encode_codes(row), **fields})
    entry = ShardEntry(shard.name, writer.samples, writer.bytes, writer.sha256)
    token_index = index_shard(writer.path, TOKEN_FIELDS, sha256=writer.sha256)
    token_index.save(index_path(out / INDEX_FOLDER, shard.name))
    record = Record(entry, index.fingerprint, tuple(rejected))
    record.save(record_path(out, shard.name))
    return record


def _usable(
    reader: ShardReader, size: int, rejected: list[Rejected], bar: "_Progress"
) -> Iterator[tuple[str, np.ndarray, dict[str, bytes]]]:
    """(key, image uint8 [size, size, 3], text fields) of every good sample; the others go to `rejected`."""
    for number in range(len(reader)):
        fields = reader.read(number)
        key = reader.key(number)
        try:
            decode_captions(fields.get("txt"), decode_meta(fields.get("json")))
            image = next((fields[name] for name in IMAGE_FIELDS if name in fields), None)
            if image is None:
                raise BadField("no image", "has no image")
            pixels = decode_image(image, size)
        except (BadField, BadImage) as error:
            rejected.append(Rejected(reader.shard.name, key, getattr(error, "reason", "bad image"), describe(error)))
        else:
            yield key, pixels, {name: fields[name] for name in ("txt", "json") if name in fields}
        bar.image_done()


def _batches(items: Iterator, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_bad(records: list[Record], max_bad_fraction: float) -> None:
    rejected = [item for record in records for item in record.rejected]
    seen = len(rejected) + sum(record.entry.samples for record in records)
    if len(rejected) > max(_FEW, max_bad_fraction * seen):
        examples = "; ".join(f"{r.shard} key {r.key!r}: {r.detail}" for r in rejected[-3:])
        raise UserError(
            f"{len(rejected)} of the first {seen} samples cannot be used, more than --max-bad-fraction "
            f"{max_bad_fraction} allows. The last ones: {examples}. Filter the data with `vilg data ingest`, or raise "
            "it; finished shards are kept"
        )


class _Progress:
    """A bar with images/s and ETA on a terminal, a line now and then elsewhere (batch jobs' logs)."""

    def __init__(self, total: int, *, enabled: bool):
        self._bar = tqdm(total=total, unit="img", desc="tokenize", disable=not (enabled and sys.stderr.isatty()))
        self._lines = enabled and not sys.stderr.isatty()
        self._total, self._done, self._skipped = total, 0, 0
        self._begin = self._last_line = time.monotonic()

    def image_done(self) -> None:
        self._done += 1
        self._bar.update()

    def skip(self, images: int) -> None:
        self._skipped += images
        self._bar.total -= images
        self._bar.refresh()

    def shard_done(self, name: str) -> None:
        now = time.monotonic()
        if self._lines and self._done and now - self._last_line > _LINE_SECONDS:
            self._last_line = now
            rate = self._done / (now - self._begin)
            left = self._total - self._skipped - self._done
            print(
                f"tokenize: {name} done, {self._skipped + self._done}/{self._total} images  {rate:.0f} images/s  "
                f"eta {int(left / rate // 60)}m{int(left / rate % 60):02d}s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        self._bar.close()


def main(argv: Sequence[str] | None = None) -> int:
    """`vilg data tokenize`."""
    parser = argparse.ArgumentParser(
        prog="vilg data tokenize",
        description="Encode raw image-text shards into token shards. Started again, it continues where it was stopped.",
    )
    parser.add_argument("raw", type=Path, help="folder of raw shards (key.jpg|png|webp, .txt, .json), or one .tar")
    parser.add_argument("--image-model", type=Path, required=True, help="folder of the image tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for token shards and manifest.json")
    parser.add_argument("--image-size", type=int, help="side in pixels (default: that of the image tokenizer)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per encoder call")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, help="share of bad samples that stops the job")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="this is the I-th of N jobs that share the work, as in 2/8"
    )
    options = parser.parse_args(argv)
    if options.batch_size < 1 or (options.image_size is not None and options.image_size < 1):
        raise UserError("--batch-size and --image-size must be at least 1")
    part = _part(options.part)
    from vilg.tokens.vqgan import ImageTokenizer

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    manifest = tokenize(
        options.raw,
        options.out,
        ImageTokenizer.load(options.image_model, device=device),
        image_size=options.image_size,
        batch_size=options.batch_size,
        device=device,
        max_bad_fraction=options.max_bad_fraction,
        part=part,
    )
    if manifest is None:
        print(f"part {options.part} is finished; the manifest follows with the last part")
        return 0
    rejected = [
        asdict(item) for e in manifest.shards for item in Record.load(record_path(options.out, e.name)).rejected
    ]
    summary = {
        "samples": manifest.num_samples,
        "shards": len(manifest.shards),
        "grid": list(manifest.grid),
        "image_vocab_size": manifest.image_vocab_size,
        "bad_samples": len(rejected),
        "manifest": str(options.out / FILE_NAME),
    }
    print(json.dumps(summary, ensure_ascii=False))
    for item in rejected[:_FEW]:
        print(f"left out: {item['shard']} key {item['key']!r}: {item['detail']}", file=sys.stderr)
    return 0


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise UserError(f"--part {text} is no part; write the number of this job and of all, from 1/8 to 8/8")
    return int(number), int(count)
