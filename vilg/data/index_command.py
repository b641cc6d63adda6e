"""`vilg data index`: what `index/` lacks of a folder of token shards, made by several processes before a run needs it.

`vilg data tokenize` leaves the indices beside its shards. Where they are missing, each rank that meets a shard would
read all of it, at the same time as the others.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from vilg.data.children import cores, mapped
from vilg.data.dataset import TokenDataset
from vilg.errors import UserError


def make_indices(folder: Path, *, cache_dir: Path | None = None, workers: int = 0, progress: bool = True) -> int:
    """Make and save the indices that are missing; how many those were.

    Every shard without one is read as a whole, and its SHA-256 compared with the manifest's. cache_dir: for indices
    where `folder` cannot be written (`data.cache_dir` of the recipes that read it). workers: processes; 0 is this one.
    Raises UserError naming a damaged shard, or the folder if an index can be saved nowhere.
    """
    data = TokenDataset.open(folder, cache_dir=cache_dir)
    shards = data.manifest.shards
    # One shard each: sending the whole manifest along with every shard would take longer than the work.
    missing = [
        TokenDataset(data.folder, replace(data.manifest, shards=(shard,)), data.index_folders)
        for number, shard in enumerate(shards)
        if data.saved_index(number) is None
    ]
    made = mapped(_make, missing, workers=workers)
    for _ in tqdm(made, total=len(missing), unit="shard", desc="index", disable=not (progress and sys.stderr.isatty())):
        pass
    return len(missing)


def _make(shard: TokenDataset) -> None:
    shard.shard_index(0)
    if shard.saved_index(0) is None:
        raise UserError(
            f"{' and '.join(map(str, shard.index_folders))} cannot be written to; name another place with --cache-dir"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """`vilg data index`."""
    parser = argparse.ArgumentParser(
        prog="vilg data index", description="Make the indices that token shards lack; the shards' hashes are checked."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of token shards with manifest.json")
    parser.add_argument("--cache-dir", type=Path, help="for indices where DIR cannot be written: data.cache_dir")
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: a core each; 0: this one)")
    options = parser.parse_args(argv)
    if options.workers < 0:
        raise UserError("--workers must be 0 or more")
    made = make_indices(options.folder, cache_dir=options.cache_dir, workers=options.workers)
    print(f"{options.folder}: {made or 'no'} {'index was' if made == 1 else 'indices were'} missing and made")
    return 0
