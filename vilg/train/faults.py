"""Faults planted on purpose, for tests and rehearsals of a cluster: the environment variable VILG_FAULT.

    VILG_FAULT=nan@step3:rank1            that rank's gradients are NaN in that step
    VILG_FAULT=spike@step40:rank0         its logits are many times too large: the loss jumps, and stays finite
    VILG_FAULT=kill@step5:rank2           the rank kills itself (SIGKILL) before the step
    VILG_FAULT=stop@step5:rank2           the rank stops itself (SIGSTOP) before the step, as a hanging node does

Several are joined by commas. A fault happens at its step of the first start of a run only: not after a restart that
SLURM counts (SLURM_RESTART_COUNT), so that a requeued job can be seen to go on. Without the variable nothing of this
exists.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vilg.errors import UserError

VARIABLE = "VILG_FAULT"
SPIKE_FACTOR = 50.0
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_FORM = re.compile(r"(nan|spike|kill|stop)@step(\d+):rank(\d+)")


@dataclass(frozen=True)
class Fault:
    """kind: nan, spike, kill or stop."""

    kind: str
    step: int
    rank: int

    def __str__(self) -> str:
        return f"{self.kind}@step{self.step}:rank{self.rank}"


def read_faults(environment: Mapping[str, str], *, world_size: int) -> list[Fault]:
    """The faults that the environment asks for; none after SLURM has restarted the job. Raises UserError."""
    text = environment.get(VARIABLE, "").strip()
    if not text or int(environment.get("SLURM_RESTART_COUNT") or 0) > 0:
        return []
    faults = []
    for part in text.split(","):
        match = _FORM.fullmatch(part.strip())
        if not match:
            raise UserError(f"{VARIABLE}: {part!r} is no fault; write nan, spike, kill or stop as in nan@step3:rank1")
        faults.append(Fault(match[1], int(match[2]), int(match[3])))
        if faults[-1].rank >= world_size:
            raise UserError(f"{VARIABLE}: {part!r} names a rank that is not there; ranks are 0 to {world_size - 1}")
    return faults


class FaultPlan:
    """Lets the faults of one rank happen to the model it trains."""

    def __init__(self, faults: list[Fault], model: nn.Module, *, rank: int) -> None:
        self.faults, self.model, self.armed = [fault for fault in faults if fault.rank == rank], model, None

    def before_step(self, step: int) -> Iterator[Fault]:
        """Called before each step, and run to its end; each fault of the step happens after it was yielded: at once, or
        in the step's forward passes."""
        if self.armed is not None:
            self.armed.remove()
            self.armed = None
        for fault in [fault for fault in self.faults if fault.step == step]:
            self.faults.remove(fault)  # a run that goes back and comes past this step again is spared
            yield fault
            if fault.kind in _SIGNALS:
                os.kill(os.getpid(), _SIGNALS[fault.kind])
            else:
                spoil = _with_nan_gradient if fault.kind == "nan" else _too_large
                self.armed = self.model.register_forward_hook(
                    lambda module, inputs, outputs, spoil=spoil: _spoiled(outputs, spoil)
                )


def _spoiled(outputs: object, spoil: Callable[[Tensor], Tensor]) -> object:
    if isinstance(outputs, Tensor):
        return spoil(outputs) if outputs.is_floating_point() and outputs.requires_grad else outputs
    return tuple(_spoiled(x, spoil) for x in outputs)


def _too_large(x: Tensor) -> Tensor:
    return x * SPIKE_FACTOR


def _with_nan_gradient(x: Tensor) -> Tensor:
    """The same values, with a gradient that is not finite."""
    same = x * 1.0  # a new node of the graph, so that the hook leaves no trace on what others hold
    same.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    return same
