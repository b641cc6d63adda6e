"""How a run judges its steps (non-finite ones and spikes are left out, and bounded), and the signals that end it."""

import math
import signal
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

from vilg.config.schema import GuardsConfig
from vilg.data.children import STOP_SIGNALS
from vilg.parallel.ranks import Ranks, SharedError
from vilg.train.log import RunLog
from vilg.train.spikes import SpikeGuard
from vilg.train.step import StepPlan, StepResult


@dataclass
class NonFiniteGuard:
    """Counts skipped steps. A skipped step consumes its samples and its place in the schedule; weights, moments and
    AdamW's own count stay as they were. All ranks count the same, for the engine's decision is shared."""

    in_a_row: int = 0
    total: int = 0

    def check(self, step: int, result: StepResult, config: GuardsConfig) -> str | None:
        """A warning if the step was skipped. Raises SharedError, on all ranks, when too many follow each other."""
        if not result.skipped:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row > config.max_nonfinite_steps:
            raise SharedError(
                f"step {step}: the {self.in_a_row}th step in a row with a non-finite loss or gradient (allowed: "
                f"guards.max_nonfinite_steps={config.max_nonfinite_steps}). The last checkpoint is from before; lower "
                "optimizer.lr or optimizer.grad_clip, lengthen schedule.warmup_steps, or leave fp16"
            )
        return f"step {step}: non-finite loss or gradient; step skipped ({self.in_a_row} in a row, {self.total} in all)"

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class StepGuards:
    """Both judges of a step. going_back: the last step was a spike and the recipe wants the run to go back for it."""

    config: GuardsConfig
    ranks: Ranks
    nonfinite: NonFiniteGuard = field(default_factory=NonFiniteGuard)
    spikes: SpikeGuard = field(default_factory=SpikeGuard)
    going_back: bool = False

    @property
    def loss_limit(self) -> float:
        """For the next step's plan: above it the step is left out; infinite unless spikes are."""
        return self.spikes.limit(self.config) if self.config.spike_action in ("skip", "rollback") else math.inf

    def judge(self, plan: StepPlan, result: StepResult, log: RunLog) -> float | None:
        """Count and report what was wrong with a step; its loss if the host knows it and it is finite. All ranks call it.

        Raises SharedError, on all ranks, when too much was wrong in a row.
        """
        self.going_back = False
        if self.config.spike_action == "off" and not result.skipped:
            self.nonfinite.check(plan.step, result, self.config)
            return None  # the loss stays on the device
        loss, limit = float(result.loss), self.spikes.limit(self.config)
        # That a step was left out is agreed on. Why is asked only then: losses may differ in a last bit between ranks.
        above = math.isfinite(loss) and loss > plan.loss_limit
        if result.skipped and self.ranks.sum(above)[0]:
            self._answer_spike(plan, loss, log)
        elif warning := self.nonfinite.check(plan.step, result, self.config):
            log.event("nonfinite", plan.step, warning, warn=True)
        elif not result.skipped:
            if loss > limit:
                text = f"step {plan.step}: loss spike, {loss:.3f} where {limit:.3f} is the limit"
                log.event("spike", plan.step, text, warn=True, loss=loss, limit=limit, action="log")
            elif self.config.spike_action == "skip":
                self.spikes.in_a_row = 0
        if math.isfinite(loss):
            self.spikes.add(loss, self.config)
            return loss
        return None

    def _answer_spike(self, plan: StepPlan, loss: float, log: RunLog) -> None:
        action = self.config.spike_action
        self.going_back = action == "rollback"
        what = "going back to the last checkpoint" if self.going_back else "step skipped"
        text = f"step {plan.step}: loss spike, {loss:.3f} where {plan.loss_limit:.3f} is the limit; {what}"
        log.event("spike", plan.step, text, warn=True, loss=loss, limit=plan.loss_limit, action=action)
        if not self.going_back:
            self.spikes.count(plan.step, loss, self.config)

    def to_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {**self.nonfinite.to_dict(), "spikes": self.spikes.to_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """As they were when the checkpoint was made. Checkpoints from before there was a spike guard have none."""
        self.nonfinite = NonFiniteGuard(state["in_a_row"], state["total"])
        self.spikes = SpikeGuard.from_dict(state["spikes"]) if "spikes" in state else SpikeGuard()


class StopSignals:
    """SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (SLURM's early warning) ask for an orderly end instead of killing.

    A context manager; `.asked` is the signal's name or None. A repeated signal changes nothing, because launchers
    forward a Ctrl-C that the terminal has already delivered; SIGKILL is always safe (checkpoint/save.py).
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name
