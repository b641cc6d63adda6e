"""`vilg data ingest`: pairs from several places -> filtered raw shards in img2dataset's form, and a report.

`vilg.data.sources` says what a source may be, `vilg.config.ingest` which filters there are. Images are copied byte for
byte. Keys are numbered anew (five digits of the shard, then the place in it), since keys of two downloads collide;
`ingested_from` in the JSON says where a sample came from. The same sources and recipe give the same bytes, whatever the
number of processes.
"""

import argparse
import itertools
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from vilg.config import IngestRecipe, load_ingest_recipe, take_overrides
from vilg.data.children import pool
from vilg.data.filters.examine import Verdict, examine
from vilg.data.filters.similarity import Scorer
from vilg.data.filters.together import Judge
from vilg.data.ingest_report import PAGE, REPORT, Tally, write_report
from vilg.data.progress import Progress
from vilg.data.sources import TABLES, Found, Table, Totals, open_source
from vilg.data.writer import ShardWriter
from vilg.errors import UserError
from vilg.tokens.files import write_atomically

UNFINISHED = ".ingest.unfinished"  # lies in a folder whose shards an ingest began; only those are ever deleted
_CHUNK = 32  # pairs handed to a process at once
_AHEAD = 4  # chunks per process read ahead


def ingest(
    sources: Sequence[Path],
    out: Path,
    *,
    recipe: IngestRecipe | None = None,
    table: Table = Table(),
    scorer: Scorer | None = None,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, object]:
    """Write the pairs of `sources` that pass the recipe's filters to raw shards in `out`; returns the report.

    Without a recipe a pair is kept if its image decodes and its caption is UTF-8 and not blank. table: how tables of
    captions are read. scorer: for the similarity filter, instead of the model that the recipe names. workers: processes
    that look at the pairs; 0 is this one.
    Raises UserError for a source that is none, a damaged tar, a finished `out`, or if nothing is left. An unfinished
    `out` is written again from the start.
    """
    recipe = recipe if recipe is not None else IngestRecipe()
    _prepare(sources, out)
    judge, totals, tally = Judge(recipe, scorer), Totals(), Tally(recipe)
    streams = [open_source(source, table, totals) for source in sources]
    bar = Progress("ingest", totals.expected or None, enabled=progress)
    looked_at = _examined(itertools.chain.from_iterable(streams), recipe, workers)
    shards: list[dict[str, object]] = []
    writer: ShardWriter | None = None
    try:
        for batch in _batches(looked_at, judge.batch_size):
            for (found, _), verdict in zip(batch, judge.judge(batch), strict=True):
                bar.image_done()
                tally.add(found, verdict)
                if verdict.reason is not None:
                    continue
                if writer is None:
                    writer = ShardWriter(out / f"{len(shards):05d}.tar")
                digits = max(4, len(str(recipe.samples_per_shard - 1)))
                key = f"{len(shards):05d}{writer.samples:0{digits}}"
                writer.write(key, _fields(key, found, verdict))
                if writer.samples == recipe.samples_per_shard:
                    shards.append(_close(writer))
                    writer = None
        if writer is not None:
            shards.append(_close(writer))
            writer = None
    finally:
        bar.close()
        if writer is not None:
            writer.discard()
    if not tally.seen:
        raise UserError(f"the sources are empty: {', '.join(str(source) for source in sources)}")
    report = write_report(out, tally, [str(source) for source in sources], totals.notes, shards)
    if not tally.kept:
        raise UserError(f"none of {tally.seen} samples can be used: {tally.reasons()}; {out / PAGE} shows some")
    (out / UNFINISHED).unlink()
    return report


def _prepare(sources: Sequence[Path], out: Path) -> None:
    """Refuse a folder that holds something else; mark it and delete what an unfinished ingest left."""
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


def _examined(pairs: Iterable[Found], recipe: IngestRecipe, workers: int) -> Iterator[tuple[Found, Verdict]]:
    """Pairs with their verdicts, in order. Only some chunks are ahead, so memory does not depend on the data."""
    chunks = _batches(pairs, _CHUNK)
    if workers == 0:
        for chunk in chunks:
            yield from zip(chunk, examine(recipe, chunk), strict=True)
        return
    with pool(workers) as processes:
        waiting: deque[tuple[list[Found], Future]] = deque()
        for chunk in chunks:
            waiting.append((chunk, processes.submit(examine, recipe, chunk)))
            if len(waiting) >= workers * _AHEAD:
                yield from _finished(waiting)
        while waiting:
            yield from _finished(waiting)


def _finished(waiting: deque) -> Iterator[tuple[Found, Verdict]]:
    chunk, future = waiting.popleft()
    return zip(chunk, future.result(), strict=True)


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _fields(key: str, found: Found, verdict: Verdict) -> dict[str, bytes]:
    caption = verdict.captions[0]
    meta = {"caption": caption} | verdict.meta
    meta |= {"key": key, "ingested_from": {"shard": found.shard, "key": found.key}}
    if verdict.several:
        meta["captions"] = list(verdict.captions)
    return {
        verdict.image_field: found.fields[verdict.image_field],
        "txt": caption.encode("utf-8", "replace"),
        "json": json.dumps(meta, ensure_ascii=False).encode("utf-8", "replace"),
    }


def _close(writer: ShardWriter) -> dict[str, object]:
    writer.close()
    return {"name": writer.path.name, "samples": writer.samples, "bytes": writer.bytes, "sha256": writer.sha256}


def main(argv: Sequence[str] | None = None) -> int:
    """`vilg data ingest`."""
    parser = argparse.ArgumentParser(
        prog="vilg data ingest",
        description="Collect image-text pairs into raw shards; what is left out is counted, and shown in report.html.",
        epilog="Any key of the recipe can be given too, for example --words.below=15 or --near_duplicates.distance=3.",
    )
    sources = f"folder of img2dataset shards, .tar, folder of images with .txt, or table ({' '.join(TABLES)})"
    parser.add_argument("sources", nargs="+", type=Path, help=sources)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for raw shards, {REPORT} and {PAGE}")
    parser.add_argument("--recipe", type=Path, help="filters, as in launch/recipes/ingest.yaml (default: none)")
    parser.add_argument("--images", type=Path, help="folder of a table's images (default: the table's own folder)")
    parser.add_argument("--image-column", help="a table's column of image files (default: guessed)")
    parser.add_argument("--caption-column", help="a table's column of captions (default: guessed)")
    parser.add_argument("--workers", type=int, default=0, help="processes that look at pairs (default 0: this one)")
    overrides, rest = take_overrides(sys.argv[1:] if argv is None else argv, recipe=IngestRecipe)
    options = parser.parse_args(rest)
    if options.workers < 0:
        raise UserError("--workers must be 0 or more")
    report = ingest(
        options.sources,
        options.out,
        recipe=load_ingest_recipe(options.recipe, overrides),
        table=Table(options.images, options.image_column, options.caption_column),
        workers=options.workers,
    )
    print(json.dumps({key: report[key] for key in ("seen", "kept", "dropped")}, ensure_ascii=False))
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"what was left out, with pictures: {options.out / PAGE}", file=sys.stderr)
    return 0
