"""Options for long runs: each does what its source says, and nothing when it is off."""

import pytest
import torch

from tests.distributed.helpers import run_distributed
from tests.model_support import SPEC, mixed_batch, tiny_config, tiny_model
from vilg.model.loss import direction_losses, loss_sums
from vilg.parallel.grid import Grid
from vilg.parallel.loss import cross_entropy_and_z_sums, cross_entropy_sum
from vilg.tokens.sequence import IGNORE

ROWS, VOCABULARY, COEFFICIENT = 12, 16, 0.3


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    targets[::4] = IGNORE
    return logits, targets


def z_loss_by_definition(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Target by target, as the papers write it."""
    total = 0.0
    for row, target in zip(logits, targets.tolist()):
        if target != IGNORE:
            log_z = row.exp().sum().log()
            total = total + (log_z - row[target]) + COEFFICIENT * log_z**2
    return total


def test_z_loss_adds_the_squared_log_partition_of_every_target():
    logits, targets = logits_and_targets()
    logits.requires_grad_()
    cross_entropy, z = cross_entropy_and_z_sums(logits, targets, ignore=IGNORE)
    loss = cross_entropy + COEFFICIENT * z
    (gradient,) = torch.autograd.grad(loss, logits)
    wanted = z_loss_by_definition(logits, targets)
    (wanted_gradient,) = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)
    assert cross_entropy == cross_entropy_sum(logits, targets, ignore=IGNORE)


def split_z_loss(rank: int, size: int) -> tuple:
    grid = Grid.build(tensor=size)
    logits, targets = logits_and_targets()
    mine = logits.chunk(size, 1)[rank].clone().requires_grad_()
    cross_entropy, z = cross_entropy_and_z_sums(mine, targets, group=grid.tensor_group, ignore=IGNORE)
    (both,) = torch.autograd.grad(cross_entropy + COEFFICIENT * z, mine, retain_graph=True)
    (only_z,) = torch.autograd.grad(z, mine)
    return cross_entropy.detach(), z.detach(), both, only_z


def test_z_loss_is_the_same_over_a_split_vocabulary():
    logits, targets = logits_and_targets()
    logits.requires_grad_()
    cross_entropy, z = cross_entropy_and_z_sums(logits, targets, ignore=IGNORE)
    (both,) = torch.autograd.grad(cross_entropy + COEFFICIENT * z, logits, retain_graph=True)
    (only_z,) = torch.autograd.grad(z, logits)
    ranks = run_distributed(2, split_z_loss)
    for own_cross_entropy, own_z, _, _ in ranks:
        torch.testing.assert_close(own_cross_entropy, cross_entropy.detach())
        torch.testing.assert_close(own_z, z.detach())
    torch.testing.assert_close(torch.cat([rank[2] for rank in ranks], 1), both)
    torch.testing.assert_close(torch.cat([rank[3] for rank in ranks], 1), only_z)


def test_without_z_loss_the_sums_are_the_cross_entropies():
    batch, model = mixed_batch(), tiny_model()
    with torch.no_grad():
        logits = model(*batch.inputs())
    targets = batch.text_target, batch.image_target
    sums = loss_sums(*logits, *targets, z_loss=False)
    assert sums.tolist() == [*map(float, direction_losses(*logits, *targets)), 0.0, 0.0, 0.0, 0.0]
    assert loss_sums(*logits, *targets, z_loss=True)[2:4].gt(0).all()


def test_embedding_gradient_scales_the_gradient_of_both_tables_and_nothing_else():
    batch = mixed_batch()

    def gradients(factor: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = tiny_model(tiny_config(embedding_gradient=factor))
        loss = sum(direction_losses(*model(*batch.inputs()), batch.text_target, batch.image_target))
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    loss, whole = gradients(1.0)
    shrunk_loss, shrunk = gradients(0.25)
    assert loss == shrunk_loss  # the values are not rounded anew
    for name, gradient in whole.items():
        factor = 0.25 if name.endswith("_table.weight") else 1.0
        assert torch.equal(shrunk[name], factor * gradient), name


def test_sandwich_norm_keeps_a_branchs_size_however_large_its_matrices_grow():
    batch = mixed_batch()

    def branch_sizes(factor: float) -> list[float]:
        model, sizes = tiny_model(tiny_config(sandwich_norm=True)), []
        for block in model.blocks:
            for branch in (block.attention, block.ffn):
                last = branch.out if branch is block.attention else branch.down
                last.weight.data *= factor
                branch.register_forward_hook(lambda _, __, out: sizes.append(float(out.norm())))
        model(*batch.inputs())
        return sizes

    assert branch_sizes(100.0) == pytest.approx(branch_sizes(1.0), rel=0.05)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_a_bf16_model_takes_statistics_softmax_and_loss_in_fp32(kind):
    """Each on values where sums kept in bf16 (8 bits) would be far off."""
    from vilg.parallel.layers import Norm

    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 4096, generator=generator) + 3).bfloat16()
    norm = Norm(4096, kind, dtype=torch.bfloat16)
    for parameter, value in zip(norm.parameters(), (1.0, 0.0)):
        parameter.data.fill_(value)
    wide = Norm(4096, kind)
    for parameter, value in zip(wide.parameters(), (1.0, 0.0)):
        parameter.data.fill_(value)
    # what remains is the rounding of the result, half a unit of 2**-8
    torch.testing.assert_close(norm(x).float(), wide(x.float()), rtol=2**-8, atol=2**-8)

    logits = torch.randn(64, 8192, generator=generator).bfloat16()
    target = torch.randint(0, 8192, (64,), generator=generator)
    loss = cross_entropy_sum(logits, target)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(cross_entropy_sum(logits.double(), target)), rel=1e-6)


def test_a_bf16_model_attends_with_a_softmax_in_fp32():
    from kernels.attention.op import sparse_attention

    generator = torch.Generator().manual_seed(0)
    slots = SPEC.text_slots + SPEC.image_slots
    q, k = (0.1 * torch.randn(1, 2, slots, 32, generator=generator).bfloat16() for _ in range(2))
    v = (torch.randn(1, 2, slots, 32, generator=generator) + 8).bfloat16()
    call = dict(grid=SPEC.grid, pattern="dense")
    call |= {key: torch.tensor([n], dtype=torch.int32) for key, n in
             (("text_len", SPEC.text_slots), ("text_prefix", SPEC.text_slots), ("image_is_target", 1))}  # fmt: skip
    out = sparse_attention(q, k, v, **call).float()
    exact = sparse_attention(q.double(), k.double(), v.double(), **call).float()
    torch.testing.assert_close(out, exact, rtol=2**-7, atol=0)
