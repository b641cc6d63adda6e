"""All that watches a run while it trains, put together: watchdog, heartbeat, stragglers, recomputation, faults."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from vilg.config import Recipe
from vilg.errors import UserError
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks
from vilg.tokens.sequence import SequenceBatch
from vilg.train.faults import FaultPlan, read_faults
from vilg.train.heartbeat import Heartbeat, State
from vilg.train.log import RunLog
from vilg.train.logfile import Trouble
from vilg.train.metrics import Window
from vilg.train.recompute import check_recomputation
from vilg.train.stragglers import ForwardClock, RankTimes, StragglerReport
from vilg.train.step import StepPlan
from vilg.train.watchdog import Watchdog


@dataclass
class Watch:
    """Called by the run at its turns. clock and stragglers are None where the recipe wants no report."""

    recipe: Recipe
    grid: Grid
    ranks: Ranks
    model: nn.Module
    log: RunLog
    watchdog: Watchdog
    heartbeat: Heartbeat
    faults: FaultPlan
    clock: ForwardClock | None
    stragglers: StragglerReport | None
    step: int = 0
    no_heartbeat: Trouble = field(init=False)

    def __post_init__(self) -> None:
        self.no_heartbeat = Trouble(self.log.warn)
        self.watchdog.say = self.log.alarm

    @classmethod
    def build(
        cls, recipe: Recipe, grid: Grid, ranks: Ranks, watchdog: Watchdog, *, model: nn.Module, log: RunLog,
        device: torch.device,
    ) -> "Watch":  # fmt: skip
        """All ranks call it. watchdog: awake since before there was a log, which it gets now. Raises SharedError for a
        VILG_FAULT that cannot be."""
        guards = recipe.guards
        faults = ranks.together(lambda: read_faults(os.environ, world_size=ranks.world_size))
        compares = guards.straggler_percent > 0 and ranks.world_size > 1
        return cls(
            recipe=recipe,
            grid=grid,
            ranks=ranks,
            model=model,
            log=log,
            watchdog=watchdog,
            heartbeat=Heartbeat(
                log.folder,
                every=recipe.logging.heartbeat_seconds if ranks.is_main else 0,
                steps=recipe.schedule.steps,
                world_size=ranks.world_size,
            ),
            faults=FaultPlan(faults, model, rank=ranks.rank),
            clock=ForwardClock(model, device) if compares else None,
            stragglers=StragglerReport.build(ranks, socket.gethostname(), percent=guards.straggler_percent)
            if compares
            else None,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the loop: what ends the run is left in its events and its heartbeat."""
        for fault in self.faults.faults:
            self.log.warn(f"VILG_FAULT: {fault} is planted on this rank")
        try:
            self.watchdog.beat(self.step)
            self.beat("training")
            yield
        except BaseException as error:
            text = f"{type(error).__name__}: {str(error)[:500]}"
            self.log.event("error", self.step, text, quiet=True)  # the command line prints it
            self.beat("failed")
            raise

    @contextmanager
    def aside(self, state: State) -> Iterator[None]:
        """Around work that is no step."""
        self.beat(state)
        with self.watchdog.aside(state):
            yield
        self.beat("training")

    def before_step(self, plan: StepPlan, batches: Sequence[SequenceBatch]) -> None:
        """Checks that come first. Raises SharedError if the hardware computes wrongly."""
        for fault in self.faults.before_step(plan.step):
            self.log.event("fault", self.step, f"VILG_FAULT: {fault} happens now", warn=True)
        every = self.recipe.guards.recompute_every
        if every and plan.step % every == 0:
            check_recomputation(
                self.model, batches[0], plan, recipe=self.recipe, grid=self.grid, ranks=self.ranks
            )

    def after_step(self, step: int, loss: float | None) -> None:
        """A step was finished, or the run went back to it. loss: of that step, None where it is not known."""
        self.step = step
        self.watchdog.beat(step)
        self.beat("training", loss)

    def beat(self, state: State, loss: float | None = None) -> None:
        """Write the heartbeat, if it is time; one that cannot be written is reported, and tried again."""
        try:
            if self.heartbeat.beat(state, self.step, loss):
                self.no_heartbeat.end(f"{self.heartbeat.path} is written again")
        except UserError as error:
            self.no_heartbeat.begin(f"no heartbeat until it can be written again: {error}")

    def compare_ranks(self, window: Window, *, steps: int) -> dict[str, float]:
        """At a console line: name stragglers; figures for its row, empty without comparison. All ranks call it."""
        if self.clock is None or self.stragglers is None:
            return {}
        own = RankTimes(
            step=window.seconds_per_step,
            forward=self.clock.take() / max(1, steps),
            data_wait=window.data_wait * window.seconds_per_step,
            stage=self.grid.pipeline_rank,
        )
        times = self.ranks.gather(own)
        for text in self.stragglers.check(times):
            self.log.event("straggler", self.step, text, warn=True)
        forward = [t.forward for t in times]
        slowest = max(forward)
        return {
            "forward_seconds": round(sum(forward) / len(forward), 6),
            "forward_seconds_slowest": round(slowest, 6),
            "slowest_rank": forward.index(slowest),
        }
