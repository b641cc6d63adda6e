"""Preflight's rows about files: run folder, disk, tokenizers, shards. Every node's first rank looks for itself.

A node on which a file system is not mounted sees an empty folder, or makes one on its own disk, where the others read and
write; it would end the run only when it needs the first sample or writes its part of the first checkpoint.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vilg.checkpoint.load import latest_checkpoint
from vilg.checkpoint.save import CHECKPOINTS, kept_for_good, leftovers, past_checkpoints
from vilg.config import Recipe
from vilg.config.deepspeed import read_deepspeed_file, zero_stage
from vilg.data.loader import Blend, TokenDataset, open_data, parts_of
from vilg.errors import TRY_AGAIN, UserError, exit_code_of
from vilg.model.state_size import stage_parameters, state_bytes
from vilg.parallel.ranks import Ranks
from vilg.tokens.text import TextTokenizer
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tools.findings import Report, Row, node_name
from vilg.train.evaluation import open_held_out
from vilg.train.open import data_fit, sequence_spec
from vilg.train.rundir import check_run_dir

_PROBE_BYTES = 64 * 2**20
_MARK = ".vilg-preflight-seen-"
_SETTLE_SECONDS = 5.0  # a network file system may show what another node has just written a little later


def check_storage(report: Report, recipe: Recipe, ranks: Ranks, accept: Sequence[str] = ()) -> None:
    """Add the rows; all ranks call it."""
    report.rows += ranks.on_main(lambda: _guarded("run folder", lambda: _run_folder(recipe, accept)))
    _same_folder(report, recipe.run_dir, ranks)
    report.rows += ranks.on_main(lambda: _guarded("disk", lambda: _disk(recipe)))
    if text := _on_every_node(report, ranks, "tokenizers", lambda: _tokenizers(recipe)):
        report.rows.append(Row("tokenizers", "ok", text))
    if _on_every_node(report, ranks, "shards", lambda: _one_sample(recipe)):
        report.rows += ranks.on_main(lambda: _guarded("shards", lambda: _shards(recipe)))


def _guarded(name: str, check: Callable[[], Iterator[Row]]) -> list[Row]:
    """The rows of a check; a mistake that it finds is a bad row instead of the end of the report."""
    rows: list[Row] = []
    try:
        rows.extend(check())
    except (UserError, OSError) as error:
        rows.append(Row(name, "bad", str(error), again=exit_code_of(error) == TRY_AGAIN))
    return rows


def _on_every_node(report: Report, ranks: Ranks, name: str, check: Callable[[], str]) -> str:
    """What the check says on every node's first rank; empty, with a bad row and the nodes at fault blamed, if it fails
    on some or does not say the same everywhere."""
    said, failure, again = None, None, False
    if report.is_first_of_its_node(ranks.rank):
        try:
            said = check()
        except (UserError, OSError) as error:
            failure, again = str(error), exit_code_of(error) == TRY_AGAIN
    every = ranks.gather((said, failure, again))
    found = dict(zip(reversed(report.nodes), reversed(every)))  # of each node's first rank
    counts = Counter(said for said, failure, _ in found.values() if failure is None)
    usual = max(counts, key=lambda text: (counts[text], text == found[report.nodes[0]][0]), default="")
    faults = {node: failure for node, (_, failure, _) in found.items() if failure is not None}
    faults |= {node: f"{said} instead of {usual}" for node, (said, *_) in found.items() if said not in (None, usual)}
    if not faults:
        return usual
    is_everywhere = len(faults) == len(found) and len(set(faults.values())) == 1
    each = [f"{node}: {faults[node]}" for node in report.node_names if node in faults]
    text = faults[report.nodes[0]] if is_everywhere else "; ".join(each)
    report.rows.append(Row(name, "bad", text, again=all(found[node][2] for node in faults)))
    report.blame_few(list(faults))
    return ""


def _run_folder(recipe: Recipe, accept: Sequence[str]) -> Iterator[Row]:
    yield Row("run folder", "ok", "; ".join([str(recipe.run_dir), *check_run_dir(recipe, accept)]))


def _same_folder(report: Report, folder: Path, ranks: Ranks) -> None:
    """A row if nodes cannot write to the run folder, or do not see there what the others have written."""
    if len(report.node_names) == 1:
        return
    mark = folder / f"{_MARK}{node_name()}"

    def leave_mark() -> str:
        if not folder.is_dir():  # to make it would give this node a folder of its own
            raise UserError(f"run_dir={folder} is not there; is its file system mounted?")
        mark.touch()
        return "written"

    def look() -> str:
        # By name: a listing of the folder may be half a minute old on NFS, and hold what a killed preflight has left.
        deadline, seen = time.monotonic() + _SETTLE_SECONDS, []
        while len(seen) < len(report.node_names):
            seen = [node for node in report.node_names if (folder / f"{_MARK}{node}").exists()]
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return f"run_dir={folder} with the files of {len(seen)} node(s) ({', '.join(seen[:3])})"

    if _on_every_node(report, ranks, "run folder", leave_mark):
        _on_every_node(report, ranks, "run folder", look)
    ranks.barrier()  # everybody has looked
    if report.is_first_of_its_node(ranks.rank):
        mark.unlink(missing_ok=True)


def _disk(recipe: Recipe) -> Iterator[Row]:
    folder = recipe.run_dir
    while not folder.exists():
        folder = folder.parent
    size = checkpoint_bytes(recipe)
    needed, there = checkpoints_to_come(recipe)
    # What an interrupted save has left is deleted when the run starts.
    swept = sum(_folder_bytes(path) for path in leftovers(recipe.run_dir))
    free = shutil.disk_usage(folder).free + swept
    text = f"{free / 1e9:.1f} GB free at {folder}, {needed * size / 1e9:.2f} GB needed: {recipe.checkpoint.keep_last} "
    text += "+ 1 checkpoints" + (f", of which {there} are there" if there else "")
    yield Row("disk space", "ok" if free > needed * size else "bad", text)
    probe = folder / f".vilg-preflight-{os.getpid()}"
    try:
        started = time.perf_counter()
        with open(probe, "wb") as stream:
            stream.write(os.urandom(2**20) * (_PROBE_BYTES // 2**20))
            stream.flush()
            os.fsync(stream.fileno())
        speed = _PROBE_BYTES / (time.perf_counter() - started)
    finally:
        probe.unlink(missing_ok=True)
    yield Row("disk speed", "ok", f"{speed / 1e6:.0f} MB/s written and flushed: {size / speed:.0f} s a checkpoint")


def checkpoint_bytes(recipe: Recipe) -> int:
    """Size of one checkpoint: what the engine keeps of weights, their fp32 copies and moments, however they are cut.

    Of weights ZeRO 3 writes the fp32 copies alone. Names and headers are not in it.
    """
    zero = {} if recipe.parallel.engine == "torch" else read_deepspeed_file(recipe.parallel.deepspeed).value
    (parameters,) = stage_parameters(recipe.model, sequence_spec(recipe))
    state = state_bytes(parameters, precision=recipe.precision, zero=zero, data_size=1)
    return state.optimizer + (state.weights if zero_stage(zero) < 3 else 0)


def checkpoints_to_come(recipe: Recipe) -> tuple[int, int]:
    """Checkpoints that must still fit on the disk, and those that are there and will make room for others.

    One more than is kept exists while a checkpoint is being written. A run that has gone on for a while needs space for
    that one alone. Raises UserError if LATEST names a checkpoint that is not there.
    """
    checkpoint = recipe.checkpoint
    latest = latest_checkpoint(recipe.run_dir)
    past = past_checkpoints(recipe.run_dir / CHECKPOINTS, latest.name) if latest else []
    there = sum(not kept_for_good(path, checkpoint.keep_every) for path in past)
    return max(1, checkpoint.keep_last + 1 - there), min(there, checkpoint.keep_last)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _tokenizers(recipe: Recipe) -> str:
    text, image = TextTokenizer.load(recipe.tokens.text_model), ImageTokenizer.load(recipe.tokens.image_model)
    return f"text {text.vocab_size} pieces ({text.hash[:12]}), image {image.vocab_size} codes ({image.hash[:12]})"


def _one_sample(recipe: Recipe) -> str:
    """Open the data and read their first sample: the same one everywhere, so that a damaged shard is no node's fault."""
    data = open_data(recipe.data)
    for dataset in parts_of(data):
        dataset.sample(0)
    text = f"data with manifest {data.manifest_hash[:12]}"
    if recipe.evaluation.every_steps:
        held_out, _ = open_held_out(recipe, data)
        held_out.sample(0)
        text += f", held out {held_out.manifest_hash[:12]}"
    return text


def _shards(recipe: Recipe) -> Iterator[Row]:
    data = open_data(recipe.data)
    fit = data_fit(recipe, ImageTokenizer.load(recipe.tokens.image_model))
    data.check(**fit)
    parts, counts = parts_of(data), data.counts if isinstance(data, Blend) else (1,)
    for dataset, count in zip(parts, counts):
        _open_every_shard(dataset)
        epochs = recipe.schedule.steps * recipe.batch.global_size * count / sum(counts) / dataset.num_samples
        where = f"{dataset.folder}: " if len(parts) > 1 else ""
        yield Row(
            "shards",
            "ok",
            f"{where}{len(dataset.manifest.shards)} shards, {dataset.num_samples:,} samples, read {epochs:.1f} times",
        )
    if recipe.evaluation.every_steps:
        held_out, pairs = open_held_out(recipe, data)
        held_out.check(**fit)
        _open_every_shard(held_out)
        yield Row("held out", "ok", f"{len(held_out.manifest.shards)} shards, {pairs:,} of {held_out.num_samples:,} samples")


def _open_every_shard(dataset: TokenDataset) -> None:
    """Read the first and the last sample of each, which checks it against its entry in the manifest."""
    first = 0
    for shard in dataset.manifest.shards:
        for index in {first, first + shard.samples - 1} if shard.samples else ():
            dataset.sample(index)
        first += shard.samples
