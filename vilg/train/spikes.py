"""Loss spikes: what counts as one, judged against the median and the spread of the last losses.

The median and the median absolute deviation (MAD) of a window do not move with the few wild values that they are to
find; 1.4826 MAD is the standard deviation of a normal distribution (Hampel, JASA 69, 1974). GLM-130B and PaLM went back
to a checkpoint and left out the batches around a spike (2210.02414, 2204.02311 section 5.1).
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from vilg.config.schema import GuardsConfig
from vilg.parallel.ranks import SharedError

MAD_TO_DEVIATION = 1.4826
LEAST_SPREAD = 0.01  # of the median: a loss that hardly moves must not make every tremor a spike


def spike_limit(losses: list[float], threshold: float) -> float:
    """The loss above which a step is a spike: median + threshold robust standard deviations, in nats."""
    middle = statistics.median(losses)
    deviation = MAD_TO_DEVIATION * statistics.median(abs(loss - middle) for loss in losses)
    return middle + threshold * max(deviation, LEAST_SPREAD * abs(middle))


@dataclass
class SpikeGuard:
    """Keeps the window and counts. All ranks feed it the same losses, so all of them know the same limit.

    in_a_row: spikes skipped one after another, or rollbacks to one checkpoint. left_out: [first, end) global sample
    indices that rollbacks went past.
    """

    window: deque[float] = field(default_factory=deque)
    in_a_row: int = 0
    total: int = 0
    left_out: list[list[int]] = field(default_factory=list)

    def limit(self, config: GuardsConfig) -> float:
        """Above which the next step's loss is a spike; infinite while the window is not half full, or with `off`."""
        if config.spike_action == "off" or len(self.window) < (config.spike_window + 1) // 2:
            return math.inf
        return spike_limit(list(self.window), config.spike_threshold)

    def add(self, loss: float, config: GuardsConfig) -> None:
        """Take the finite loss of a step into the window."""
        self.window.append(loss)
        while len(self.window) > config.spike_window:
            self.window.popleft()

    def count(self, step: int, loss: float, config: GuardsConfig) -> None:
        """Count a spike that is answered. Raises SharedError, on all ranks, when there are too many in a row."""
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row > config.max_spikes:
            what = "rollbacks to one checkpoint" if config.spike_action == "rollback" else "spikes in a row"
            raise SharedError(
                f"step {step}: loss {loss:.3f}; that would be {self.in_a_row} {what} (allowed: guards.max_spikes="
                f"{config.max_spikes}). Other samples do not help: lower optimizer.lr, lengthen schedule.warmup_steps, "
                "set model.qk_norm in a new run, or continue with guards.spike_action=log"
            )

    def to_dict(self) -> dict[str, Any]:
        return dict(window=list(self.window), in_a_row=self.in_a_row, total=self.total, left_out=list(self.left_out))

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "SpikeGuard":
        return cls(deque(state["window"]), state["in_a_row"], state["total"], list(state["left_out"]))
