"""A run at the step where it stands: what the loop does with it, and what a checkpoint of it holds."""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vilg.checkpoint.probes import PROBE_FILE, compute_probes, save_probes
from vilg.checkpoint.save import Files, Saved, Saver
from vilg.checkpoint.state import RunState
from vilg.config import Recipe
from vilg.data.loader import Loader, LoaderState
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks, SharedError
from vilg.tokens.files import write_atomically
from vilg.train.engine import Engine
from vilg.train.guards import NonFiniteGuard
from vilg.train.log import RunLog
from vilg.train.metrics import Meter
from vilg.train.rundir import DONE_FILE, SAMPLES, RunLock
from vilg.train.samples import Sampler
from vilg.train.step import StepPlan, StepResult


@dataclass
class Run:
    """Everything the loop needs. step, tokens, position: after the last finished step; saved_step: of LATEST, or being saved."""

    recipe: Recipe
    ranks: Ranks
    grid: Grid
    engine: Engine
    loader: Loader
    log: RunLog
    meter: Meter
    sampler: Sampler | None
    tokenizers: dict[str, str]
    parameters: dict[str, dict[str, Any]]
    position: LoaderState
    lock: RunLock
    saver: Saver
    step: int = 0
    tokens: int = 0
    saved_step: int | None = None
    guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)
    _stopped: float = 0.0

    @property
    def steps_left(self) -> int:
        return self.recipe.schedule.steps - self.step

    def finish_step(self, plan: StepPlan, result: StepResult, tokens: int) -> None:
        """Account for a step. Raises UserError when too many steps in a row were not finite."""
        self.step, self.position = plan.step, self.loader.state
        self.tokens += tokens
        self.meter.count(tokens)
        self.log.step(plan, result)
        try:
            warning = self.guard.check(plan.step, result, self.recipe.guards)
        except SharedError:
            self.log.flush()  # the steps that were not finite are what people will look for
            raise
        if warning:
            self.log.warn(warning)

    def due(self, every: int) -> bool:
        """Whether something done every so many steps (0: never) is due after this one; the last step always counts."""
        return every > 0 and (self.step % every == 0 or self.steps_left == 0)

    def log_line(self) -> None:
        """Print the console line and write the metrics kept since the last one."""
        window = self.meter.window(self.steps_left)
        self.log.flush(window, device_word="rank" if self.meter.device.type == "cpu" else "gpu")

    def draw_samples(self) -> None:
        """Draw the fixed prompts, if the recipe has any."""
        if self.sampler is None:
            return
        with self.meter.paused():
            name = f"step_{self.step:08d}.png"
            path = self.recipe.run_dir / SAMPLES / name if self.ranks.is_main else None
            self.sampler.draw(path, title=f"{self.recipe.name}, step {self.step}")
        self.log.say(f"drew {SAMPLES}/{name}")

    def save(self, *, background: bool = False) -> None:
        """Save a checkpoint of the last finished step, if that was not begun already. background: training goes on when
        the state is copied to the host; otherwise return when LATEST is this step. Raises SharedError."""
        with self.meter.paused():
            if self.saved_step != self.step:
                self.log.flush()  # the metrics on the disk must reach at least as far as the checkpoint
                self._begin_save(copy=background)
            if not background:
                self._report_save(self.saver.wait())

    def check_save(self) -> None:
        """Let a save in the background get on with its next part; all ranks call it after every step. Raises SharedError
        if it failed."""
        self._report_save(self.saver.poll())

    def _begin_save(self, *, copy: bool) -> None:
        self._report_save(self.saver.wait())  # before memory for another copy is taken
        started = time.perf_counter()
        state = RunState(
            step=self.step,
            samples=self.position.samples_consumed,
            tokens=self.tokens,
            loader=self.position.to_dict(),
            skipped=self.guard.to_dict(),
            layout=self.engine.layout,
            recipe=self.recipe.model_dump(mode="json"),
            tokenizers=self.tokenizers,
            parameters=self.parameters,
        )
        files = {**self.engine.files(copy=copy), **self._probe_files()}
        self.saver.begin(state, files)
        self.saved_step, self._stopped = self.step, time.perf_counter() - started

    def _report_save(self, saved: Saved | None) -> None:
        if saved:
            self.log.say(f"saved {saved.path} in {saved.seconds:.1f} s (training stood still for {self._stopped:.1f} s)")

    def mark_done(self) -> None:
        """Leave the file that tells batch scripts not to start the run again."""
        if self.ranks.is_main:
            write_atomically(self.recipe.run_dir / DONE_FILE, f"{self.step}\n".encode())

    def _probe_files(self) -> Files:
        probes = compute_probes(self.engine.model)
        return {PROBE_FILE: partial(save_probes, probes)} if self.ranks.is_main else {}
