"""A run put together: folder, tokenizers, data, model, engine and log."""

import argparse
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vilg.checkpoint.from_export import fill_from_export
from vilg.checkpoint.save import Saver
from vilg.checkpoint.state import parameter_table, read_state, versions
from vilg.checkpoint.verify import verify_files
from vilg.config import Recipe, load_recipe, take_overrides
from vilg.data.loader import Blend, Loader, LoaderState, TokenDataset, bad_sample_path, open_data
from vilg.errors import UserError
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks, SharedError
from vilg.tokens.files import write_atomically
from vilg.tokens.sequence import SequenceSpec
from vilg.tokens.text import TextTokenizer
from vilg.tokens.vqgan import ImageTokenizer
from vilg.train.changes import DATA, check_accept, check_tokenizers, is_accepted
from vilg.train.engine import build_engine, build_model, load_checkpoint
from vilg.train.evaluation import Evaluation
from vilg.train.guards import StepGuards
from vilg.train.log import RunLog
from vilg.train.metrics import Meter, step_flops, step_recomputed_flops
from vilg.train.reconstruction import build_reconstruction
from vilg.train.requests import Requests, refuse_stopped
from vilg.train.run import Run
from vilg.train.rundir import DONE_FILE, LOGS, RunLock, open_run_dir, write_recipe
from vilg.train.samples import Sampler
from vilg.train.sinks import open_sinks
from vilg.train.watch import Watch
from vilg.train.watchdog import Watchdog


def read_arguments(argv: Sequence[str], *, world_size: int) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe of a command line, checked for so many processes, and the keys it accepts to have changed since the
    checkpoint. Raises UserError listing all problems."""
    overrides, rest = take_overrides(argv)
    parser = argparse.ArgumentParser(
        prog="vilg train",
        description="Train a recipe, or continue its run where LATEST stands. Alone, or under torchrun or srun.",
        epilog="--section.key=value overrides a key of the recipe, for example --optimizer.lr=1e-3",
    )
    parser.add_argument("recipe", type=Path, help="YAML file, for example launch/recipes/debug.yaml")
    parser.add_argument(
        "--accept",
        default="",
        metavar="KEY,KEY",
        help="continue although these keys differ from the checkpoint's recipe, for example --accept=seed,optimizer.*",
    )
    options = parser.parse_args(rest)
    accept = tuple(filter(None, options.accept.split(",")))
    recipe = load_recipe(options.recipe, overrides, world_size=world_size)
    check_accept(accept, recipe)
    return recipe, accept


def sequence_spec(recipe: Recipe) -> SequenceSpec:
    """Sizes of the canonical sequence that the recipe describes."""
    tokens = recipe.tokens
    return SequenceSpec(tokens.text_slots, tokens.grid, tokens.text_vocab_size, tokens.image_vocab_size)


def data_fit(recipe: Recipe, image: ImageTokenizer) -> dict[str, Any]:
    """What `TokenDataset.check` compares data with. image: of `tokens.image_model`, which made the data; it may learn on in
    a run, but not before this is called."""
    side = recipe.tokens.grid[0] * image.factor if recipe.model.reconstructor else None
    return dict(spec=sequence_spec(recipe), image_tokenizer_hash=image.hash, image_size=side)


def open_run(
    recipe: Recipe, ranks: Ranks, device: torch.device, watchdog: Watchdog, *, accept: Sequence[str] = ()
) -> Run | None:
    """Start or continue the run of a recipe; None if it is finished. All ranks call it.

    watchdog: which watches over the start, and later over the run. accept: keys that may differ from the checkpoint's
    recipe. Raises UserError for everything that a user can mend: another recipe's folder, files that do not fit each
    other, a damaged checkpoint.
    """
    layout = recipe.parallel
    grid = Grid.build(tensor=layout.tensor, pipeline=layout.pipeline, sequence_parallel=layout.sequence)
    text = ranks.together(lambda: TextTokenizer.load(recipe.tokens.text_model))
    image = ranks.together(lambda: ImageTokenizer.load(recipe.tokens.image_model))
    tokenizers, fit = {"text": text.hash, "image": image.hash}, data_fit(recipe, image)
    spec = sequence_spec(recipe)
    ranks.on_main(lambda: refuse_stopped(recipe.run_dir))
    lock = RunLock(recipe.run_dir)
    checkpoint, notes = ranks.on_main(lambda: open_run_dir(recipe, lock, accept))
    before = ranks.on_main(lambda: read_state(checkpoint) if checkpoint else None)
    if before and before.step >= recipe.schedule.steps:
        if ranks.is_main:
            # A run killed between its last checkpoint and its DONE file comes past here.
            write_atomically(recipe.run_dir / DONE_FILE, f"{before.step}\n".encode())
            print(f"{recipe.run_dir} is finished: {before.step} of {recipe.schedule.steps} steps. Nothing to do")
        return None
    model = build_model(recipe, spec, grid, device)
    if not before and recipe.init_from is None:
        model.reset_parameters(recipe.seed)
    elif not before:
        given = dict(config=recipe.model, spec=spec, tokenizers=tokenizers, grid=grid)
        notes.append(ranks.together(lambda: fill_from_export(model, recipe.init_from, **given)))
    reconstruction = ranks.together(lambda: build_reconstruction(recipe, grid, model, image, device, fresh=not before))
    engine = build_engine(recipe, grid, model, device, reconstruction)
    parameters = parameter_table(engine.model, grid, ranks)
    if before:
        notes += ranks.on_main(lambda: check_tokenizers(before.tokenizers, tokenizers, checkpoint, accept))
        share = dict(rank=ranks.rank, world_size=ranks.world_size)
        ranks.together(lambda: verify_files(checkpoint, before, **share))
        note = ranks.together(lambda: load_checkpoint(engine, checkpoint, before, parameters))
        notes += filter(None, [note])
    position = LoaderState.from_dict(before.loader) if before else None
    end_to_end = recipe.model.reconstructor
    source = dict(
        text_tokenizer=text,
        source_images=end_to_end is not None and end_to_end.joint_quantizer is not None,
        **fit,
    )
    dataset = ranks.together(lambda: open_data(recipe.data))
    loader = ranks.together(lambda: _loader(recipe, grid, dataset, position, source, accept=accept))
    evaluation = None
    if recipe.evaluation.every_steps:
        quarantine = bad_sample_path(recipe.run_dir, grid.rank, held_out=True)
        evaluation = Evaluation.read(recipe, grid, ranks, dataset, quarantine=quarantine, **source)
        if evaluation.bad:
            notes.append(
                f"{evaluation.bad} of the {evaluation.pairs} held-out pairs are bad, others stand for them, some twice: "
                f"{quarantine.parent}"
            )
    sampler = None
    if recipe.samples.every_steps:
        if engine.layout["zero_stage"] == 3:
            raise SharedError(
                "samples.every_steps draws with whole weights, which ZeRO stage 3 does not keep; set it to 0"
            )
        sampler = ranks.together(lambda: Sampler(recipe.samples, engine.model, text, image, seed=recipe.seed))
    # Opened last: it removes metrics of steps that will be done again, which a start that fails must not.
    logs, resume_step = recipe.run_dir / LOGS, before.step if before else 0
    place, troubles = dict(resume_step=resume_step), []
    sinks = ranks.together(lambda: open_sinks(recipe, logs, **place, warn=troubles.append) if ranks.is_main else [])
    place |= dict(rank=ranks.rank, total_steps=recipe.schedule.steps)
    log = ranks.together(lambda: RunLog(logs, sinks=sinks, **place))
    for note in notes:
        log.say(f"note: {note}")
    for trouble in troubles:
        log.warn(trouble)
    run = Run(
        recipe=recipe,
        ranks=ranks,
        grid=grid,
        engine=engine,
        loader=loader,
        log=log,
        meter=Meter(
            world_size=ranks.world_size,
            flops_per_step=step_flops(recipe, spec),
            recomputed_flops=step_recomputed_flops(recipe, spec),
            device=device,
        ),
        evaluation=evaluation,
        sampler=sampler,
        tokenizers=tokenizers,
        parameters=parameters,
        position=loader.state,
        lock=lock,
        saver=Saver(
            recipe.run_dir, ranks=ranks, keep_last=recipe.checkpoint.keep_last, keep_every=recipe.checkpoint.keep_every
        ),
        guards=StepGuards(recipe.guards, ranks),
        watch=Watch.build(recipe, grid, ranks, watchdog, model=engine.model, log=log, device=device),
        requests=Requests(recipe.run_dir, is_main=ranks.is_main, warn=log.warn),
    )
    if before:
        run.step, run.tokens, run.saved_step = before.step, before.tokens, before.step
        run.guards.restore(before.skipped)
        run.watch.step = run.step
    _introduce(run, checkpoint)
    return run


def _loader(
    recipe: Recipe, grid: Grid, dataset: "TokenDataset | Blend", position: LoaderState | None, source: dict[str, Any],
    *, accept: Sequence[str],
) -> Loader:  # fmt: skip
    if position:
        position = replace(position, seed=recipe.seed)  # `open_run_dir` has compared the recipes
        if is_accepted(DATA, accept):
            position = replace(position, manifest_hash=dataset.manifest_hash)
        elif position.manifest_hash != dataset.manifest_hash:
            raise UserError(
                f"the checkpoint was trained on data with manifest {position.manifest_hash[:12]}, but {dataset.folder} has "
                f"{dataset.manifest_hash[:12]}; set {DATA} to the same shards, or continue all the same with "
                f"--accept={','.join([*accept, DATA])}"
            )
    reports = grid.tensor_rank == grid.pipeline_rank == 0  # one of the ranks that read the same data
    return Loader(
        dataset,
        data_config=recipe.data,
        seed=recipe.seed,
        global_size=recipe.batch.global_size,
        micro_size=recipe.batch.micro_size,
        data_rank=grid.data_rank,
        data_size=grid.data_size,
        state=position,
        quarantine=bad_sample_path(recipe.run_dir, grid.data_rank) if reports else None,
        **source,
    )


def _introduce(run: Run, checkpoint: Path | None) -> None:
    """Say what runs: sizes, layout, optimizer, where it starts; and leave the merged DeepSpeed config for people."""
    recipe, layout = run.recipe, run.engine.layout
    parameters = num_parameters_here(run.engine.model)
    cut = f" cut over {layout['data']} data ranks" if layout["zero_stage"] == 3 else ""
    if run.ranks.is_main:
        write_recipe(recipe)  # only now: a start that failed above leaves the folder as it was
        (recipe.run_dir / DONE_FILE).unlink(missing_ok=True)
        if config := getattr(run.engine, "config", None):
            write_atomically(recipe.run_dir / "deepspeed.json", (json.dumps(config, indent=2) + "\n").encode())
    found = versions()
    run.log.say(
        f"{recipe.name}: {parameters / 1e6:.1f}M parameters per rank{cut}, {layout['engine']} (ZeRO {layout['zero_stage']}), "
        f"{run.ranks.world_size} process(es) = {_describe(recipe, layout)}, {recipe.precision}, "
        f"{run.engine.optimizer_name}, torch {found['torch']}, deepspeed {found['deepspeed']}"
    )
    where = f"continuing from {checkpoint}" if checkpoint else "starting"
    run.log.event(
        "start",
        run.step,
        f"{where}: step {run.step} of {recipe.schedule.steps}; run folder {recipe.run_dir}",
        host=socket.gethostname(),
        world_size=run.ranks.world_size,
        job=os.environ.get("SLURM_JOB_ID", ""),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    )


def num_parameters_here(model: nn.Module) -> int:
    """Parameters of this tensor and pipeline rank, also where ZeRO 3 has cut them over the data ranks."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def _describe(recipe: Recipe, layout: dict[str, Any]) -> str:
    """The layout in words: `2 data x 4 tensor (slots split) x 2 pipeline, recompute full every 2`."""
    parallel = recipe.parallel
    slots = " (slots split)" if parallel.sequence else ""
    every = f" every {parallel.recompute_every}" if parallel.recompute_every > 1 else ""
    sizes = f"{layout['data']} data x {layout['tensor']} tensor{slots} x {layout['pipeline']} pipeline"
    return sizes if parallel.recompute == "none" else f"{sizes}, recompute {parallel.recompute}{every}"
