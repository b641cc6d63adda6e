"""Speed, memory and remaining time of a run, measured between two console lines.

    MFU = operations of the model in a step / (seconds * ranks * peak)
    HFU = (those + what is computed again) / (seconds * ranks * peak)

Operations: forward and backward of every sequence, as model/size.py counts them: visible pairs, full text segments. MFU
is PaLM's (2204.02311, appendix B), so that a run that recomputes less does not look worse; HFU adds what
`parallel.recompute` does again (2205.05198). The peak is the GPU's for bf16 without sparsity; a CPU has none in the
table, so neither is given there. Seconds include the wait for data, not checkpoints, evaluations and sample sheets.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vilg.config.schema import Recipe
from vilg.model.size import recomputed_costs, sequence_flops
from vilg.tokens.sequence import SequenceSpec

# Dense bf16 peak in FLOP/s by the name torch reports (NVIDIA data sheets, without sparsity).
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "A800": 312e12, "L40S": 362e12}


@dataclass(frozen=True)
class Window:
    """Means over the steps since the last line. tokens_per_second: filled slots per rank. data_wait: share of the time
    spent waiting for the loader. mfu, hfu: None where the device's peak is unknown. memory: this process' peak, bytes."""

    seconds_per_step: float
    tokens_per_second: float
    data_wait: float
    memory: int
    mfu: float | None
    hfu: float | None
    eta_seconds: float


class Meter:
    """Clock of a run. `flops_per_step`, `recomputed_flops`, `world_size` give the share of the peak that is reached."""

    def __init__(
        self, *, world_size: int, flops_per_step: float, device: torch.device, recomputed_flops: float = 0.0
    ) -> None:
        self.world_size, self.device = world_size, device
        self.flops_per_step, self.recomputed_flops = flops_per_step, recomputed_flops
        self.peak = peak_flops(device)
        self._reset()

    def _reset(self) -> None:
        self.start, self.waited, self.tokens, self.steps = time.perf_counter(), 0.0, 0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the loader."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is no step (a checkpoint, an evaluation, a sample sheet), so that speed and ETA are those of steps."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def count(self, tokens: int) -> None:
        """A step over `tokens` filled slots of all ranks is done."""
        self.tokens += tokens
        self.steps += 1

    def window(self, steps_left: int) -> Window:
        """Figures since the last call."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        per_step = seconds / max(1, self.steps)
        window = Window(
            seconds_per_step=per_step,
            tokens_per_second=self.tokens / seconds / self.world_size,
            data_wait=self.waited / seconds,
            memory=peak_memory(self.device),
            mfu=self._utilization(self.flops_per_step, per_step),
            hfu=self._utilization(self.flops_per_step + self.recomputed_flops, per_step),
            eta_seconds=per_step * steps_left,
        )
        self._reset()
        return window

    def _utilization(self, flops: float, seconds: float) -> float | None:
        return flops / seconds / self.world_size / self.peak if self.peak else None


def step_flops(recipe: Recipe, spec: SequenceSpec) -> float:
    """Operations of one optimizer step, forward and backward, without recomputation: MFU's numerator."""
    return _of_step(recipe, lambda is_target: sequence_flops(recipe.model, spec, image_is_target=is_target))


def step_recomputed_flops(recipe: Recipe, spec: SequenceSpec) -> float:
    """Operations of one optimizer step that `parallel.recompute` does twice: HFU's numerator has them on top."""
    return _of_step(
        recipe, lambda is_target: sum(recomputed_costs(recipe.model, spec, recipe.parallel, image_is_target=is_target))
    )


def _of_step(recipe: Recipe, of_sequence: Callable[[bool], float]) -> float:
    """A figure of one sequence (image_is_target -> figure) over all sequences of a step."""
    drawn, written = of_sequence(True), of_sequence(False)
    share, per_pair = recipe.data.drawn_share, 2 if recipe.data.directions == "both" else 1
    return recipe.batch.global_size * per_pair * (share * drawn + (1 - share) * written)


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device in FLOP/s, None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
