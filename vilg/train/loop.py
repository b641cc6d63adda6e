"""The training loop, and the command `vilg train`."""

import os
import time
from collections.abc import Sequence

import torch

from vilg.config.environment import process_environment
from vilg.config.schema import Recipe
from vilg.errors import UserError
from vilg.parallel.ranks import Ranks
from vilg.train.distributed import distributed, one_voice
from vilg.train.guards import StopSignals
from vilg.train.open import open_run, read_arguments
from vilg.train.requests import STOP_FILE
from vilg.train.run import Run
from vilg.train.rundir import LOGS
from vilg.train.step import count, plan_step
from vilg.train.watchdog import Watchdog

# Seconds that rank 0 has to print what all ranks have found wrong; its launcher then ends the others. One that is still
# there afterwards prints too: its node may see other files.
_MAIN_FIRST = 15.0


def main(argv: Sequence[str]) -> int:
    """`vilg train RECIPE [--section.key=value ...] [--accept=KEY,KEY]`: start the recipe's run or continue it.

    Exit code 0 also for a stop by signal: the run is saved, and `DONE` in its folder says whether it is finished.
    """
    place = process_environment(os.environ)
    rank, world_size = int(place["RANK"]), int(place["WORLD_SIZE"])
    try:
        recipe, accept = read_arguments(argv, world_size=world_size)  # a mistake shows before ranks wait for each other
    except UserError:
        if rank > 0:
            time.sleep(_MAIN_FIRST)
        raise
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with distributed(device, pause_timeout=recipe.guards.pause_timeout) as ranks, one_voice(ranks):
        train(ranks.on_main(lambda: recipe), ranks, device, accept=accept)
    return 0


def train(recipe: Recipe, ranks: Ranks, device: torch.device, *, accept: Sequence[str] = ()) -> None:
    """Run the optimizer steps that are left. Every rank calls it; a signal to any ends all after a whole step.

    accept: keys that may differ from the recipe of the checkpoint that the run continues.
    """
    watchdog = Watchdog(
        recipe.run_dir / LOGS,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=recipe.guards.hang_timeout,
        pause_timeout=recipe.guards.pause_timeout,
    )
    with watchdog:
        with watchdog.aside("opening the run"):
            run = open_run(recipe, ranks, device, watchdog, accept=accept)
        if run is not None:
            _train(run)


def _train(run: Run) -> None:
    recipe = run.recipe
    with StopSignals() as stop, run.watch.running():
        run.save()  # before the first step: a bad disk or quota shows now
        steps = iter(run.loader)
        while run.steps_left:
            with run.meter.waiting():
                batches = next(steps)
            # One exchange per step, on the host: what the loss is divided by, and what anybody was asked for.
            asked = stop.asked is not None or run.requests.stop(), run.requests.save()
            stops, saves, *counts = run.ranks.sum(*asked, *count(batches))
            if stops:
                break
            text_targets, image_targets, tokens = (n // run.grid.replicas for n in counts)
            targets = dict(text_targets=text_targets, image_targets=image_targets)
            plan = plan_step(recipe, run.step + 1, **targets, loss_limit=run.guards.loss_limit)
            run.watch.before_step(plan, batches)
            result = run.engine.train_step(batches, plan)
            run.finish_step(plan, result, tokens)
            if run.guards.going_back:
                run.roll_back()
                continue
            run.check_save()
            if run.due(recipe.evaluation.every_steps):
                run.evaluate()  # before the console line: it adds to the step's figures
            if run.due(recipe.logging.every_steps):
                run.log_line()
            if run.due(recipe.samples.every_steps):
                run.draw_samples()
            if saves or run.due(recipe.checkpoint.every_steps):
                run.save(background=recipe.checkpoint.asynchronous)
        if run.steps_left:
            why = stop.asked or (f"{STOP_FILE} file" if run.requests.stop() else "signal on another rank")
            run.log.say(f"{why}: stopping after step {run.step}")
        run.save()
        run.close()
