"""Which rank holds the others up: every rank's own times, compared at each console line.

A step takes the same time everywhere, because collectives wait for the slowest. What a rank does alone is its forward
passes (without tensor parallelism or ZeRO 3, which make their group one) and its wait for data; these are measured.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vilg.parallel.ranks import Ranks


@dataclass(frozen=True)
class RankTimes:
    """Seconds per step of one rank since the last report. stage: of the pipeline; stages have different layers."""

    step: float
    forward: float
    data_wait: float
    stage: int = 0


class ForwardClock:
    """Adds up the time of a model's forward passes in training: by the device's own clock on a GPU, without waiting."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def take(self) -> float:
        """Seconds since the last call. On a GPU it waits for the last forward pass, which a step's end has awaited."""
        spans, self._spans = self._spans, []
        if self.on_gpu:
            if spans:
                spans[-1][1].synchronize()
            return sum(begin.elapsed_time(end) for begin, end in spans) / 1000
        return sum(end - begin for begin, end in spans)

    def _begin(self, module: nn.Module, inputs: object) -> None:
        if module.training:
            self._started = self._now()

    def _end(self, module: nn.Module, inputs: object, outputs: object) -> None:
        if module.training:
            self._spans.append((self._started, self._now()))

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StragglerReport:
    """Names the slowest rank when it is slow in two reports running: once may be anybody's chance."""

    def __init__(self, hosts: Sequence[str], *, percent: float) -> None:
        self.hosts, self.percent = hosts, percent
        self._before: set[tuple[int, str]] = set()

    @classmethod
    def build(cls, ranks: Ranks, host: str, *, percent: float) -> "StragglerReport":
        """All ranks call it: it gathers the hosts' names."""
        return cls(ranks.gather(host), percent=percent)

    def check(self, times: Sequence[RankTimes]) -> list[str]:
        """One sentence for each way in which a rank is slow, from the times of all ranks in rank order."""
        slow = find_stragglers(times, percent=self.percent)
        seen = {(rank, what) for rank, what, *_ in slow}
        known, self._before = self._before & seen, seen
        return [
            f"rank {rank} on {self.hosts[rank]} is a straggler: {what} {own * 1000:.0f} ms a step, median "
            f"{middle * 1000:.0f} ms"
            for rank, what, own, middle in slow
            if (rank, what) in known
        ]


def find_stragglers(times: Sequence[RankTimes], *, percent: float) -> list[tuple[int, str, float, float]]:
    """(rank, what, its seconds, median) of the slowest rank of each pipeline stage in forward passes and of all ranks in
    waiting for data, where it is more than `percent` of a step over the median; 0: never. Of an even number of ranks the
    lower median is taken."""
    found = []
    if percent <= 0:
        return found
    everyone = range(len(times))
    stages = [[rank for rank in everyone if times[rank].stage == stage] for stage in sorted({t.stage for t in times})]
    # In shares of the forward time for the work, of the whole step for a wait whose median is often zero.
    looks = [("forward", "forward", "forward", ranks) for ranks in stages]
    for what, key, unit_key, ranks in [*looks, ("data wait", "data_wait", "step", everyone)]:
        values = {rank: getattr(times[rank], key) for rank in ranks}
        worst, middle = max(values, key=values.__getitem__), statistics.median_low(values.values())
        unit = statistics.median_low(getattr(times[rank], unit_key) for rank in ranks)
        if len(values) > 1 and unit > 0 and values[worst] - middle > percent / 100 * unit:
            found.append((worst, what, values[worst], middle))
    return found
