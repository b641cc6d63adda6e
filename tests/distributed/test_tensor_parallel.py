"""Every split layer against the plain torch layer, and the whole model against one process, on gloo ranks."""

import pytest
import torch
import torch.nn.functional as F

from tests.distributed.helpers import run_distributed
from tests.model_support import mixed_batch, tiny_config, tiny_model
from vilg.model.loss import direction_losses
from vilg.parallel import layout
from vilg.parallel.grid import Grid
from vilg.parallel.layers import ColumnParallelLinear, Norm, RowParallelLinear, VocabParallelEmbedding
from vilg.parallel.loss import cross_entropy_sum
from vilg.parallel.ops import copy_to_group, gather_last, gather_slots, split_slots
from vilg.parallel.rng import sequence_seeds
from vilg.tokens.sequence import IGNORE, SequenceSpec

B, S, C, OUT, V = 2, 6, 8, 12, 10
SPEC = SequenceSpec(text_slots=8, grid=(4, 4), text_vocab_size=24, image_vocab_size=16)  # 24 slots: 2 and 4 divide them


def random(*shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(x: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    return x.chunk(size, dim)[rank]


def check_linear_pair(rank: int, size: int, sequence_parallel: bool) -> None:
    """Column- then row-split layer: output and every gradient are those of two plain linear layers."""
    grid = Grid.build(tensor=size, sequence_parallel=sequence_parallel)
    place = dict(group=grid.tensor_group, sequence_parallel=grid.sequence_parallel, dtype=torch.float64)
    first, second = ColumnParallelLinear(C, OUT, **place), RowParallelLinear(OUT, C, **place)
    whole = [random(OUT, C, seed=1), random(OUT, seed=2), random(C, OUT, seed=3), random(C, seed=4)]
    cut_dims = (0, 0, 1, None)
    parameters = (first.weight, first.bias, second.weight, second.bias)
    with torch.no_grad():
        for parameter, value, dim in zip(parameters, whole, cut_dims):
            parameter.copy_(value if dim is None else part(value, dim, rank, size))
    x, grad_out = random(B, S, C, seed=5), random(B, S, C, seed=6)

    w1, b1, w2, b2 = wanted = [value.clone().requires_grad_() for value in whole]
    x_wanted = x.clone().requires_grad_()
    y_wanted = F.linear(F.linear(x_wanted, w1, b1).sin(), w2, b2)
    y_wanted.backward(grad_out)

    def mine(tensor):
        return part(tensor, 1, rank, size) if sequence_parallel else tensor

    x_mine = mine(x).clone().requires_grad_()
    y = second(first(x_mine).sin())
    y.backward(mine(grad_out).contiguous())
    torch.testing.assert_close(y, mine(y_wanted))
    torch.testing.assert_close(x_mine.grad, mine(x_wanted.grad))
    for parameter, value, dim in zip(parameters, wanted, cut_dims):
        torch.testing.assert_close(parameter.grad, value.grad if dim is None else part(value.grad, dim, rank, size))


def check_embedding(rank: int, size: int) -> None:
    """Split table: rows, zeros for foreign ids, and gradients of a plain embedding; repeated ids add up."""
    grid = Grid.build(tensor=size)
    table = VocabParallelEmbedding(V, C, group=grid.tensor_group, dtype=torch.float64)
    whole, ids = random(V, C, seed=1), torch.tensor([[0, 9, 4, 4], [5, 0, V, 3]])
    table.weight.data.copy_(part(whole, 0, rank, size))
    grad_out = random(2, 4, C, seed=2)
    rows = table(ids)
    rows.backward(grad_out)
    wanted = whole.clone().requires_grad_()
    known = (ids < V)[..., None]
    rows_wanted = F.embedding(ids.clamp(max=V - 1), wanted) * known
    rows_wanted.backward(grad_out)
    torch.testing.assert_close(rows, rows_wanted)
    torch.testing.assert_close(table.weight.grad, part(wanted.grad, 0, rank, size))


def check_cross_entropy(rank: int, size: int) -> None:
    """Loss and gradient of torch's cross entropy, with ignored targets, huge logits and a batch without targets."""
    grid = Grid.build(tensor=size)
    for scale, target in ((3.0, [[1, 9, IGNORE], [5, 4, 0]]), (1e4, [[1, 2, 3], [9, 8, 7]]), (1.0, [[IGNORE] * 3] * 2)):
        target = torch.tensor(target)
        logits = random(2, 3, V, seed=1) * scale
        wanted = logits.clone().requires_grad_()
        loss_wanted = F.cross_entropy(wanted.flatten(0, 1), target.flatten(), reduction="sum", ignore_index=IGNORE)
        (loss_wanted * 0.5).backward()
        mine = part(logits, -1, rank, size).clone().requires_grad_()
        loss = cross_entropy_sum(mine, target, group=grid.tensor_group, ignore=IGNORE)
        (loss * 0.5).backward()
        torch.testing.assert_close(loss, loss_wanted)
        torch.testing.assert_close(mine.grad, part(wanted.grad, -1, rank, size))
        assert not torch.isnan(mine.grad).any()
    half = cross_entropy_sum(part(random(2, 3, V, seed=1), -1, rank, size).bfloat16(), target, group=grid.tensor_group)
    assert half.dtype == torch.float32


def check_norm_and_gathers(rank: int, size: int) -> None:
    """A norm on parts of the slots has the whole norm's gradients; split and gather undo each other both ways."""
    group = Grid.build(tensor=size).tensor_group
    x, grad_out = random(B, S, C, seed=1), random(B, S, C, seed=2)
    for kind in ("layernorm", "rmsnorm"):
        plain, split = (Norm(C, kind, dtype=torch.float64, **place) for place in ({}, dict(group=group, partial=True)))
        for parameter in (*plain.parameters(), *split.parameters()):
            parameter.data.copy_(random(C, seed=3))
        plain(x).backward(grad_out)
        y = split(part(x, 1, rank, size))
        y.backward(part(grad_out, 1, rank, size))
        torch.testing.assert_close(y, part(plain(x), 1, rank, size))
        for a, b in zip(split.parameters(), plain.parameters()):
            torch.testing.assert_close(a.grad, b.grad)
    leaf = x.clone().requires_grad_()
    gathered = gather_slots(split_slots(leaf, group), group)
    gathered.backward(grad_out / size)  # every rank's gradient is summed on the way back
    torch.testing.assert_close(gathered, x)
    torch.testing.assert_close(leaf.grad, grad_out)
    columns = part(x, -1, rank, size).clone().requires_grad_()
    gather_last(columns, group).backward(grad_out)
    torch.testing.assert_close(columns.grad, part(grad_out, -1, rank, size))
    shared = x.clone().requires_grad_()
    copy_to_group(shared, group).backward(grad_out * (rank + 1))
    torch.testing.assert_close(shared.grad, grad_out * sum(range(1, size + 1)))


def layer_checks(rank: int, size: int) -> None:
    for sequence_parallel in (False, True):
        check_linear_pair(rank, size, sequence_parallel)
    check_embedding(rank, size)
    check_cross_entropy(rank, size)
    check_norm_and_gathers(rank, size)


def losses_and_gradients(rank: int, size: int, config, sequence_parallel: bool = False, dtype=torch.float32):
    """Both losses and this rank's gradients by name; `size` 1 without process groups is the reference."""
    grid = Grid.build(tensor=size, sequence_parallel=sequence_parallel) if size > 1 else None
    model, batch = tiny_model(config, spec=SPEC, grid=grid, dtype=dtype), mixed_batch(SPEC)
    seeds = sequence_seeds(0, step=1, first=0, count=len(batch)) if config.dropout else None
    logits = model(*batch.inputs(), dropout_seeds=seeds)
    losses = direction_losses(*logits, batch.text_target, batch.image_target, group=model.grid.tensor_group)
    (losses[0] / 7 + losses[1] / 40).backward()
    return torch.stack(losses).detach(), {name: p.grad for name, p in model.named_parameters()}


def test_split_layers_equal_plain_layers_forward_and_backward():
    run_distributed(2, layer_checks)


CASES = {
    "tensor 2": (2, tiny_config(), False),
    "tensor 2, slots split": (2, tiny_config(dropout=0.2), True),
    "tensor 2, rmsnorm, qk_norm, dropout": (2, tiny_config(norm="rmsnorm", qk_norm=True, dropout=0.2), False),
    "tensor 2, dense, qk_norm, slots split": (2, tiny_config(attention="dense", qk_norm=True), True),
    "tensor 4, slots split": (4, tiny_config(row_style="wrap"), True),
}


@pytest.mark.parametrize(("size", "config", "sequence_parallel"), CASES.values(), ids=CASES)
def test_whole_model_has_the_losses_and_gradients_of_one_process(size, config, sequence_parallel):
    wanted_losses, wanted = losses_and_gradients(0, 1, config)
    ranks = run_distributed(size, losses_and_gradients, (config, sequence_parallel))
    for losses, gradients in ranks:
        torch.testing.assert_close(losses, wanted_losses, rtol=1e-5, atol=0)
        for name, gradient in gradients.items():
            if layout.rule_of(name).dim is None:
                assert torch.equal(gradient, ranks[0][1][name]), f"{name}: replicated, but its gradients differ"
    for name, gradient in wanted.items():
        merged = layout.merge(name, [gradients[name] for _, gradients in ranks])
        error = (merged - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def local_weights(rank: int, size: int, tensor: int):
    grid = Grid.build(tensor=tensor)
    state = tiny_model(tiny_config(qk_norm=True), grid=grid).state_dict()
    return grid.tensor_rank, grid.data_rank, state


def test_initial_weights_are_the_same_under_every_tensor_size():
    whole = tiny_model(tiny_config(qk_norm=True)).state_dict()
    for tensor in (2, 4):
        ranks = run_distributed(4, local_weights, (tensor,))
        for data_rank in range(4 // tensor):
            parts = {t: state for t, d, state in ranks if d == data_rank}
            for name, value in whole.items():
                assert torch.equal(layout.merge(name, [parts[t][name] for t in range(tensor)]), value), name
