"""How a run protects itself: non-finite steps are bounded, and a signal ends it after a whole step and a checkpoint."""

import signal
from dataclasses import asdict, dataclass
from types import FrameType

from vilg.config.schema import GuardsConfig
from vilg.parallel.ranks import SharedError
from vilg.train.step import StepResult


@dataclass
class NonFiniteGuard:
    """Counts skipped steps. A skipped step consumes its samples and its place in the schedule; weights, moments and
    AdamW's own count stay as they were. All ranks count the same, for the engine's decision is shared."""

    in_a_row: int = 0
    total: int = 0

    def check(self, step: int, result: StepResult, config: GuardsConfig) -> str | None:
        """A warning if the step was skipped. Raises SharedError, on all ranks, once more than the allowed number follow each other."""
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


class StopSignals:
    """SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (SLURM's early warning) ask for an orderly end instead of killing.

    A context manager; `.asked` is the signal's name or None. A repeated signal changes nothing, because launchers
    forward a Ctrl-C that the terminal has already delivered; SIGKILL is always safe (checkpoint/save.py).
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name
