"""A network trained beside the engine's model: whole on every rank that has it, with an optimizer of its own.

The engine cuts and clips its parameters as one; decoder and discriminator need a rate, a limit and a moving average of
their own, and are small beside the transformer. Their gradients are summed over the data ranks, so weights stay equal.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vilg.checkpoint.reconstructor_file import entries
from vilg.errors import UserError
from vilg.parallel.grid import Grid
from vilg.tokens.vqgan.ema import Average
from vilg.train import optim

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_UPDATES = "ema_updates"


class Beside:
    """AdamW without decay over a module's parameters. owner: its name in checkpoints. ema: decay per step, 0 for none."""

    def __init__(
        self, owner: str, module: nn.Module, *, betas: tuple[float, float], grad_clip: float, ema: float = 0.0
    ) -> None:
        self.owner, self.module, self.grad_clip = owner, module, grad_clip
        self.names, self.weights = map(list, zip(*module.named_parameters()))
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.0, betas=betas, weight_decay=0.0, fused=True)
        self.average = Average(self.weights, ema) if ema else None

    @property
    def gradients(self) -> list[Tensor]:
        """Of all parameters, after `begin`."""
        return [p.grad for p in self.weights]

    def begin(self) -> None:
        """A new step: gradients of zero, there on every rank whatever it is given."""
        for p in self.weights:
            p.grad = torch.zeros_like(p)

    def step(self, lr: float) -> tuple[float, bool]:
        """Norm of the gradients before clipping, and whether an update was done: not for one that is not finite.

        Once `sum_over_data` has made gradients equal, all ranks decide alike.
        """
        norm = optim.gradient_norm(self.weights)
        if not bool(norm.isfinite()):
            return float(norm), False
        optim.clip_gradients(self.weights, norm, self.grad_clip)
        optim.set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        if self.average:
            self.average.update()
        return float(norm), True

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint keeps of it, under the keys of `reconstructor_file.py`; not copied."""
        kept = {"weight": [p.detach() for p in self.weights]}
        if self.average:
            kept["ema"] = self.average.values
        for moment in _MOMENTS:
            kept[moment] = [self.optimizer.state[p][moment] for p in self.weights if p in self.optimizer.state]
        found = {
            f"{self.owner}.{entry}.{name}": tensor
            for entry, tensors in kept.items()
            for name, tensor in zip(self.names, tensors)
        }
        if self.average:
            found[f"{self.owner}.{_UPDATES}"] = torch.tensor(self.average.updates)
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], source: object) -> None:
        """Continue exactly from the `state` of a checkpoint. Raises UserError if it is of other shapes."""
        for name, p in zip(self.names, self.weights):
            self._fill(p, entries(tensors, self.owner, "weight").get(name), name, source)
        if self.average:
            for name, average in zip(self.names, self.average.values):
                self._fill(average, entries(tensors, self.owner, "ema").get(name), name, source)
            self.average.updates = int(tensors[f"{self.owner}.{_UPDATES}"])
        moments = {moment: entries(tensors, self.owner, moment) for moment in _MOMENTS}
        self.optimizer.state.clear()
        if moments["step"]:
            for name, p in zip(self.names, self.weights):
                self.optimizer.state[p] = {moment: moments[moment][name].to(p.device) for moment in _MOMENTS}

    def _fill(self, target: Tensor, found: Tensor | None, name: str, source: object) -> None:
        if found is None or found.shape != target.shape:
            shape = "none" if found is None else tuple(found.shape)
            raise UserError(
                f"{source}: {self.owner}'s {name} is {shape} there and {tuple(target.shape)} here; the recipe's "
                "model.reconstructor or image tokenizer is another than the checkpoint's"
            )
        target.copy_(found)


def sum_over_data(tensors: Sequence[Tensor], grid: Grid, *, stages: bool = False) -> None:
    """Replace tensors by their sums over the data ranks, in one message; the same on all tensor ranks, bit by bit.

    stages: all stages of a pipeline have done the work, and get the same too.
    """
    copies = [(grid.tensor_group, grid.tensor_size), *([(grid.pipeline_group, grid.pipeline_size)] if stages else [])]
    if grid.data_group is None and not any(group for group, _ in copies):
        return
    flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
    if grid.data_group is not None:
        dist.all_reduce(flat, group=grid.data_group)
    for group, size in copies:  # they did the same work; convolutions on GPUs may differ in a last bit
        if group is not None:
            dist.all_reduce(flat, group=group)
            flat /= size
    for tensor, found in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(found.view_as(tensor))
