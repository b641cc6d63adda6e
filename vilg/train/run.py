"""A run at the step where it stands: what the loop does with it, and what a checkpoint of it holds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from vilg.checkpoint.load import latest_checkpoint
from vilg.checkpoint.probes import PROBE_FILE, compute_probes, save_probes
from vilg.checkpoint.save import Files, Saved, Saver
from vilg.checkpoint.state import RunState, read_state
from vilg.config import Recipe
from vilg.data.loader import Loader, LoaderState
from vilg.errors import UserError
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks, SharedError
from vilg.tokens.files import write_atomically
from vilg.train.engine import Engine, load_checkpoint
from vilg.train.evaluation import Evaluation
from vilg.train.guards import StepGuards
from vilg.train.heartbeat import State
from vilg.train.log import RunLog, loss_text
from vilg.train.metrics import Meter
from vilg.train.requests import Requests
from vilg.train.rundir import DONE_FILE, SAMPLES, RunLock
from vilg.train.samples import Sampler
from vilg.train.step import HELD_OUT, StepPlan, StepResult
from vilg.train.watch import Watch


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
    evaluation: Evaluation | None
    sampler: Sampler | None
    tokenizers: dict[str, str]
    parameters: dict[str, dict[str, Any]]
    position: LoaderState
    lock: RunLock
    saver: Saver
    guards: StepGuards
    watch: Watch
    requests: Requests
    step: int = 0
    tokens: int = 0
    saved_step: int | None = None
    _stopped: float = 0.0

    @property
    def steps_left(self) -> int:
        return self.recipe.schedule.steps - self.step

    def finish_step(self, plan: StepPlan, result: StepResult, tokens: int) -> None:
        """Account for a step. Raises SharedError when too many steps in a row were not finite, or spikes."""
        self.step, self.position = plan.step, self.loader.state
        self.tokens += tokens
        self.meter.count(tokens)
        self.log.step(plan, result)
        try:
            loss = self.guards.judge(plan, result, self.log)
        except SharedError:
            self.log.flush()  # the steps that were left out are what people will look for
            raise
        if loss is None and self.watch.heartbeat.due():
            loss = float(result.loss)
        self.watch.after_step(plan.step, loss)

    def roll_back(self) -> None:
        """Go back to the last checkpoint's weights and step, on with the samples behind the spike; all ranks call it.

        The checkpoint is written anew, so that a later start goes past the same samples. Raises SharedError when the run
        has gone back to it too often.
        """
        with self._aside("saving"):
            self._report_save(self.saver.wait())
            spike, loss = self.step, self.guards.spikes.window[-1]
            checkpoint = self.ranks.on_main(lambda: latest_checkpoint(self.recipe.run_dir))
            before = self.ranks.on_main(lambda: read_state(checkpoint))
            self.guards.restore(before.skipped)
            self.guards.spikes.count(spike, loss, self.recipe.guards)
            self.ranks.together(lambda: load_checkpoint(self.engine, checkpoint, before, self.parameters))
            left_out = [before.samples, self.position.samples_consumed]
            self.guards.spikes.left_out.append(left_out)
            self.step, self.tokens, self.saved_step = before.step, before.tokens, None
            self.log.rewind(self.step)
            text = (
                f"back from step {spike} to {checkpoint.name}; samples {left_out[0]} to {left_out[1] - 1} are left out "
                f"(rollback {self.guards.spikes.in_a_row} to this checkpoint)"
            )
            self.log.event("rollback", spike, text, warn=True, to_step=self.step, left_out=left_out)
            self.watch.after_step(self.step, None)
            self._begin_save(copy=False)
            self._report_save(self.saver.wait())

    def due(self, every: int) -> bool:
        """Whether something done every so many steps (0: never) is due after this one; the last step always counts."""
        return every > 0 and (self.step % every == 0 or self.steps_left == 0)

    def log_line(self) -> None:
        """Print the console line and write the metrics kept since the last one."""
        steps = self.meter.steps
        window = self.meter.window(self.steps_left)
        figures = self.watch.compare_ranks(window, steps=steps)
        self.log.flush(window, device_word="rank" if self.meter.device.type == "cpu" else "gpu", **figures)

    def evaluate(self) -> None:
        """Losses of the held-out pairs, if the recipe has any; all ranks call it."""
        evaluation = self.evaluation
        if evaluation is None:
            return
        started = time.perf_counter()
        with self._aside("evaluating"):
            result = self.engine.evaluate(evaluation.batches, evaluation.plan(self.step))
            figures = evaluation.figures(result)
        self.log.add(figures)
        seconds = time.perf_counter() - started
        text = f"step {self.step} held out: {loss_text(figures, prefix=HELD_OUT)}  {evaluation.pairs} pairs in {seconds:.1f} s"
        self.log.event("evaluate", self.step, text, seconds=round(seconds, 3))

    def draw_samples(self) -> None:
        """Draw the fixed prompts, if the recipe has any."""
        if self.sampler is None:
            return
        with self._aside("drawing"):
            name = f"step_{self.step:08d}.png"
            codes = self.sampler.draw()
            try:
                if self.ranks.is_main:
                    path = self.recipe.run_dir / SAMPLES / name
                    self.sampler.write(codes, path, title=f"{self.recipe.name}, step {self.step}")
            except (OSError, UserError) as error:  # no reason to end the run
                self.log.event("draw", self.step, f"{SAMPLES}/{name} could not be written: {error}", warn=True)
                return
        self.log.event("draw", self.step, f"drew {SAMPLES}/{name}", file=f"{SAMPLES}/{name}")

    def save(self, *, background: bool = False) -> None:
        """Save a checkpoint of the last finished step, if that was not begun already. background: training goes on when
        the state is copied to the host; otherwise return when LATEST is this step. Raises SharedError."""
        with self._aside("saving"):
            if self.saved_step != self.step:
                self.log.flush()  # metrics reach as far as the checkpoint; a full disk is the save's own to report
                if self.recipe.guards.spike_action == "rollback":
                    self.guards.spikes.in_a_row = 0  # it counts rollbacks to one checkpoint
                self._begin_save(copy=background)
            if not background:
                self._report_save(self.saver.wait())

    def check_save(self) -> None:
        """Let a save in the background get on with its next part; all ranks call it after every step. Raises
        SharedError if it failed."""
        self._report_save(self.saver.poll())

    def _begin_save(self, *, copy: bool) -> None:
        started = time.perf_counter()
        self._report_save(self.saver.wait())  # before memory for another copy is taken
        state = RunState(
            step=self.step,
            samples=self.position.samples_consumed,
            tokens=self.tokens,
            loader=self.position.to_dict(),
            skipped=self.guards.to_dict(),
            layout=self.engine.layout,
            recipe=self.recipe.model_dump(mode="json"),
            tokenizers=self.tokenizers,
            parameters=self.parameters,
        )
        files = {**self.ranks.together(lambda: self._engine_files(copy=copy)), **self._probe_files()}
        self.saver.begin(state, files)
        self.saved_step, self._stopped = self.step, time.perf_counter() - started

    def _engine_files(self, *, copy: bool) -> Files:
        reconstruction = self.engine.reconstruction
        beside = reconstruction.files(copy=copy) if reconstruction else {}
        return {**self.engine.files(copy=copy), **beside}

    def _report_save(self, saved: Saved | None) -> None:
        if saved:
            self.requests.saved()
            text = f"saved {saved.path} in {saved.seconds:.1f} s (training stood still for {self._stopped:.1f} s)"
            self.log.event(
                "save", self.saved_step, text, seconds=round(saved.seconds, 3), stopped_seconds=round(self._stopped, 3)
            )
            if saved.trouble:
                self.log.event("prune", self.saved_step, f"saved, but older checkpoints stay: {saved.trouble}", warn=True)

    def close(self) -> None:
        """End this start of the run, after its last save. A finished run leaves the file that tells batch scripts not to
        start it again."""
        finished = not self.steps_left
        if finished and self.ranks.is_main:
            write_atomically(self.recipe.run_dir / DONE_FILE, f"{self.step}\n".encode())
        outcome = "finished" if finished else "saved; the same command continues it"
        text = f"{self.recipe.name}: {outcome} at step {self.step} of {self.recipe.schedule.steps}"
        self.log.event("finish" if finished else "stop", self.step, text)
        self.watch.beat("finished" if finished else "stopped")
        self.log.close()
        self.lock.release()

    @contextmanager
    def _aside(self, state: State) -> Iterator[None]:
        """Around work that is no step: it counts neither as training time nor as a hang."""
        with self.meter.paused(), self.watch.aside(state):
            yield

    def _probe_files(self) -> Files:
        probes = compute_probes(self.engine.model)
        return {PROBE_FILE: partial(save_probes, probes)} if self.ranks.is_main else {}
