"""One transformer block: x + Attention(norm(x)), then x + FFN(norm(x)), as in GPT-2.

With `sandwich_norm` each branch ends in a norm of its own (CogView's Sandwich-LN, 2105.13290 section 2.4): what a branch
adds to the residual stream then keeps its size, whatever its matrices grow to.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vilg.config.schema import ModelConfig, ParallelConfig, Recompute
from vilg.model.attention import Attend, Attention, post_norm
from vilg.parallel.grid import Grid
from vilg.parallel.layers import ColumnParallelLinear, Norm, RowParallelLinear
from vilg.parallel.rng import dropout


class FeedForward(nn.Module):
    """Pre-norm feed-forward branch without its residual: [B, S, C] -> [B, S, C].

    The exact GELU (erf; 1606.08415), not GPT-2's tanh form of it: the tanh costs a CPU a tenth of the training step.
    """

    def __init__(self, config: ModelConfig, *, grid: Grid, device=None, dtype=None):
        super().__init__()
        place = dict(group=grid.tensor_group, device=device, dtype=dtype)
        split = dict(sequence_parallel=grid.sequence_parallel, **place)
        hidden, wide = config.hidden_size, config.ffn_multiple * config.hidden_size
        self.norm = Norm(hidden, config.norm, partial=grid.sequence_parallel, **place)
        self.up = ColumnParallelLinear(hidden, wide, **split)
        self.down = RowParallelLinear(wide, hidden, **split)
        self.post_norm = post_norm(config, grid=grid, device=device, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.post_norm(self.down(F.gelu(self.up(self.norm(hidden)))))


class Block(nn.Module):
    """Block number `index` (from 0) with one attention pattern.

    With sequence parallelism `hidden` holds this rank's slots only; nothing in here knows. recompute: see
    `ParallelConfig`; dropout is a hash of the place, so what is computed again is the same.
    """

    recompute: Recompute = "none"

    def __init__(self, config: ModelConfig, index: int, pattern: str, *, grid: Grid, device=None, dtype=None):
        super().__init__()
        self.index, self.dropout, self.grid = index, config.dropout, grid
        self.attention = Attention(config, pattern, grid=grid, device=device, dtype=dtype)
        self.ffn = FeedForward(config, grid=grid, device=device, dtype=dtype)

    def forward(self, hidden: Tensor, attend: Attend, dropout_seeds: Tensor | None = None) -> Tensor:
        """[B, S, C] -> [B, S, C]. dropout_seeds: int64 [B], needed in training if the model has dropout."""
        if self.recompute == "full" and torch.is_grad_enabled():
            return recomputed(self._branches, hidden, attend, dropout_seeds)
        return self._branches(hidden, attend, dropout_seeds)

    def _branches(self, hidden: Tensor, attend: Attend, dropout_seeds: Tensor | None) -> Tensor:
        if self.recompute == "selective" and torch.is_grad_enabled():
            mixed = recomputed(self.attention, hidden, attend)
        else:
            mixed = self.attention(hidden, attend)
        return self.finish(hidden, mixed, dropout_seeds, self._sites(hidden, dropout_seeds))

    def finish(self, hidden: Tensor, mixed: Tensor, seeds: Tensor | None, sites: Tensor | None) -> Tensor:
        """hidden and the attention branch's result, both [B, S, C], -> the block's result. The same code for every block:
        what differs between them is a tensor."""
        hidden = hidden + self._drop(mixed, seeds, sites, 0)
        return hidden + self._drop(self.ffn(hidden), seeds, sites, 1)

    def _sites(self, hidden: Tensor, seeds: Tensor | None) -> Tensor | None:
        """The dropout sites of both branches, int64 [2]; None where nothing is dropped."""
        if not self.training or self.dropout == 0.0:
            return None
        if seeds is None:
            raise ValueError(f"model.dropout={self.dropout} needs dropout_seeds (parallel/rng.py) in training mode")
        return torch.arange(2 * self.index, 2 * self.index + 2, device=hidden.device)

    def _drop(self, branch: Tensor, seeds: Tensor | None, sites: Tensor | None, number: int) -> Tensor:
        if sites is None:
            return branch
        first_slot = self.grid.tensor_rank * branch.shape[1] if self.grid.sequence_parallel else 0
        return dropout(branch, self.dropout, seeds, site=sites[number], first_slot=first_slot)


def set_recompute(model: nn.Module, config: ParallelConfig) -> None:
    """Tell the blocks of a model, or of a pipeline's stage, which of them compute what again (their numbers count
    through all stages)."""
    for block in model.modules():
        if isinstance(block, Block):
            chosen = (block.index + 1) % config.recompute_every == 0
            block.recompute = config.recompute if chosen else "none"


def compile_blocks(model: nn.Module) -> None:
    """Let `torch.compile` fuse what lies between the matrix products of all blocks of a model, or of a stage: one
    compilation of each of two functions serves every block, whose weights are arguments of it.

    The attention stays outside: its kernels are compiled already. dynamic=False: the shapes of a run are few (the
    training batch, the probes; without gradients once more, if pairs are evaluated), and code for any shape is slower.
    """
    for block in model.modules():
        if isinstance(block, Block):
            block.attention.project = torch.compile(block.attention.project, dynamic=False)
            block.finish = torch.compile(block.finish, dynamic=False)


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), whose intermediate results are dropped and computed again in the backward."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
