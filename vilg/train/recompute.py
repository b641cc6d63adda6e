"""A check for silent data corruption: one micro-batch's logits, computed twice, must be the same in every bit.

A core or a memory cell that now and then computes wrongly raises no error; about one machine in a thousand does
(Dixit et al., 2102.11245). The same numbers in the same order on the same device give the same bits, so any
difference is the hardware's, or a kernel's that is not deterministic.
"""

import socket

import torch
from torch import Tensor, nn

from vilg.config.schema import Recipe
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks, SharedError
from vilg.tokens.sequence import SequenceBatch
from vilg.train.step import StepPlan, dropout_seeds


@torch.no_grad()
def check_recomputation(
    model: nn.Module, batch: SequenceBatch, plan: StepPlan, *, recipe: Recipe, grid: Grid, ranks: Ranks
) -> None:
    """Compute the step's first micro-batch twice, without gradients; weights and random numbers stay as they are.

    All ranks call it. Raises SharedError naming the ranks and hosts whose bits differ; the loss, a sum over thousands
    of them, would hide the last ones.
    """
    inputs = batch.to(next(model.parameters()).device).inputs()
    seeds = dropout_seeds(recipe, grid, plan, 0, batch)
    first, second = (model(*inputs, dropout_seeds=seeds) for _ in range(2))
    same = all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second))
    found = ranks.gather((same, socket.gethostname()))
    wrong = [f"rank {rank} on {host}" for rank, (same, host) in enumerate(found) if not same]
    if wrong:
        raise SharedError(
            f"step {plan.step}: the same micro-batch gave two results on {', '.join(wrong)} (guards.recompute_every="
            f"{recipe.guards.recompute_every}). Tensor ranks of one group fail together: test the GPUs of all that are "
            "named, and leave them out; checkpoints since the last check that passed may be damaged"
        )


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers, for which NaN is equal to itself and 0.0 is not -0.0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
