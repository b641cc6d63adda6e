"""`vilg data ingest`: pairs from several places -> raw shards in img2dataset's form, and a report of what was left out.

Sources: folders of img2dataset shards, single `.tar` files, or folders of images (searched deeply) with `NAME.txt`
beside `NAME.jpg|png|webp`. Images are copied byte for byte. Keys are numbered anew (five digits of the shard, then the
place in it), since keys of two downloads collide; `ingested_from` in the JSON says where a sample came from. The same
sources give the same bytes.
"""

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from vilg.data.fields import BadField, decode_captions, decode_meta, describe
from vilg.data.manifest import write_json
from vilg.data.shards import IMAGE_FIELDS, RAW_FIELDS, ShardReader, index_shard
from vilg.data.writer import ShardWriter
from vilg.errors import UserError
from vilg.tokens.files import write_atomically
from vilg.tokens.vqgan.images import BadImage, decode_image

FORMAT_VERSION = 1
REPORT = "ingest.json"
UNFINISHED = ".ingest.unfinished"  # lies in a folder whose shards an ingest began; only those are ever deleted
_EXAMPLES = 20  # dropped samples named in the report, per reason
_PROBE_SIZE = 64  # pixels to which an image is decoded to see whether it can be


@dataclass(frozen=True)
class Found:
    """A sample of a source, not yet looked at: where it comes from and its raw fields."""

    shard: str
    key: str
    fields: dict[str, bytes]


def ingest(
    sources: Sequence[Path], out: Path, *, samples_per_shard: int = 10_000, progress: bool = True
) -> dict[str, object]:
    """Write the usable pairs of `sources` to raw shards in `out`; returns the report (also `out/ingest.json`).

    Kept is a pair whose image decodes and whose caption is UTF-8 and not blank. Raises UserError for a source that is
    none, a damaged tar, a finished `out`, or if nothing is left. An unfinished `out` is written again from the start.
    """
    if (out / REPORT).exists():
        raise UserError(f"{out} already holds a finished ingest ({REPORT}); use another --out or delete the folder")
    if any(source.resolve() == out.resolve() for source in sources):
        raise UserError(f"--out {out} is one of the sources; use another folder")
    leftovers = sorted(out.glob("*.tar"))
    marker = out / UNFINISHED
    if (leftovers and not marker.exists()) or (out / "manifest.json").exists():
        raise UserError(f"{out} holds other data ({[*leftovers, out / 'manifest.json'][0].name}); use another --out")
    for leftover in leftovers:
        leftover.unlink()
    write_atomically(marker, b"")

    seen, kept, dropped = 0, 0, Counter()
    examples: dict[str, list[dict[str, str]]] = {}
    shards: list[dict[str, object]] = []
    writer: ShardWriter | None = None
    found = (sample for source in sources for sample in _source(source))
    try:
        for sample in tqdm(found, unit="pair", desc="ingest", disable=not (progress and sys.stderr.isatty())):
            seen += 1
            try:
                image_field, caption, meta = _check(sample)
            except (BadField, BadImage) as error:
                reason = getattr(error, "reason", "bad image")
                dropped[reason] += 1
                if len(named := examples.setdefault(reason, [])) < _EXAMPLES:
                    named.append({"shard": sample.shard, "key": sample.key, "detail": describe(error)})
                continue
            if writer is None:
                writer = ShardWriter(out / f"{len(shards):05d}.tar")
            key = f"{len(shards):05d}{writer.samples:0{max(4, len(str(samples_per_shard - 1)))}d}"
            meta |= {"key": key, "ingested_from": {"shard": sample.shard, "key": sample.key}}
            fields = {image_field: sample.fields[image_field], "txt": caption}
            writer.write(key, {**fields, "json": json.dumps(meta, ensure_ascii=False).encode("utf-8", "replace")})
            kept += 1
            if writer.samples == samples_per_shard:
                shards.append(_close(writer))
                writer = None
        if writer is not None:
            shards.append(_close(writer))
            writer = None
    finally:
        if writer is not None:
            writer.discard()
    if not kept:
        raise UserError(f"none of {seen} samples can be used: {_counts(dropped) or 'the sources are empty'}")
    report = {
        "format_version": FORMAT_VERSION,
        "sources": [str(source) for source in sources],
        "seen": seen,
        "kept": kept,
        "dropped": dict(dropped.most_common()),
        "examples": examples,
        "shards": shards,
    }
    write_json(out / REPORT, report)
    marker.unlink()
    return report


def _close(writer: ShardWriter) -> dict[str, object]:
    writer.close()
    return {"name": writer.path.name, "samples": writer.samples, "bytes": writer.bytes, "sha256": writer.sha256}


def _counts(dropped: Counter) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common())


def _check(sample: Found) -> tuple[str, bytes, dict]:
    """(image field, caption, JSON object) of a usable sample; raises BadField or BadImage."""
    image_field = next((name for name in IMAGE_FIELDS if name in sample.fields), None)
    if image_field is None:
        raise BadField("no image", "has no image")
    meta = decode_meta(sample.fields.get("json"))
    caption = decode_captions(sample.fields.get("txt"), meta)[0].strip()
    image = sample.fields[image_field]
    decode_image(image, _PROBE_SIZE)
    with Image.open(io.BytesIO(image)) as header:
        meta = {"caption": caption, "width": header.width, "height": header.height} | meta
    return image_field, caption.encode("utf-8", "replace"), meta


def _source(source: Path) -> Iterator[Found]:
    if source.is_file() and source.suffix == ".tar":
        return _shard(source)
    if source.is_dir():
        tars = sorted(source.glob("*.tar"))
        return (sample for tar in tars for sample in _shard(tar)) if tars else _folder(source)
    raise UserError(f"{source}: expected a folder of img2dataset shards, a .tar file, or a folder of images")


def _shard(shard: Path) -> Iterator[Found]:
    with ShardReader(shard, index_shard(shard, RAW_FIELDS, sha256="")) as reader:
        for number in range(len(reader)):
            yield Found(f"{shard.parent.name}/{shard.name}", reader.key(number), reader.read(number))


def _folder(folder: Path) -> Iterator[Found]:
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_FIELDS and p.is_file())
    if not images:
        raise UserError(f"{folder}: holds neither .tar shards nor images ({', '.join(IMAGE_FIELDS)})")
    for path in images:
        fields = {path.suffix.lower().lstrip("."): path.read_bytes()}
        for field in ("txt", "json"):
            if (beside := path.with_suffix(f".{field}")).is_file():
                fields[field] = beside.read_bytes()
        yield Found(folder.name, path.relative_to(folder).as_posix(), fields)


def main(argv: Sequence[str] | None = None) -> int:
    """`vilg data ingest`."""
    parser = argparse.ArgumentParser(
        prog="vilg data ingest",
        description="Collect image-text pairs into raw shards; pairs that cannot be used are counted and left out.",
    )
    sources = "folder of img2dataset shards, .tar file, or folder of images with .txt beside"
    parser.add_argument("sources", nargs="+", type=Path, help=sources)
    parser.add_argument("--out", type=Path, required=True, help="folder for raw shards and the report ingest.json")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, help="pairs in a shard")
    options = parser.parse_args(argv)
    if options.samples_per_shard < 1:
        raise UserError("--samples-per-shard must be at least 1")
    report = ingest(options.sources, options.out, samples_per_shard=options.samples_per_shard)
    print(json.dumps({key: report[key] for key in ("seen", "kept", "dropped")}, ensure_ascii=False))
    return 0
