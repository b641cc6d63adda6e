"""A moving average of weights, which decodes better than the weights of any one step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Of given parameters, held beside them in fp32: average = d * average + (1 - d) * weight after each step.

    d = min(decay, (1 + n) / (10 + n)) at the n-th update, so that the start is forgotten (as in TensorFlow's
    ExponentialMovingAverage and, for VQGAN, in LlamaGen and latent diffusion).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self.decay, self.updates = decay, 0
        self.values: list[Tensor] = [p.detach().float().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values in."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.values, [p.detach().float() for p in self._parameters], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters hold the average; afterwards what they held before."""
        before = [p.detach().clone() for p in self._parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, before, strict=True):
                    parameter.copy_(value)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Put the average where the weights are, for good."""
        for parameter, value in zip(self._parameters, self.values, strict=True):
            parameter.copy_(value)
