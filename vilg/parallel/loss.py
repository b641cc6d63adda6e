"""Cross entropy over a vocabulary split over a tensor group; the logits are never gathered (1909.08053 section 3)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vilg.parallel.ops import Group, group_rank


def cross_entropy_sum(logits: Tensor, target: Tensor, *, group: Group = None, ignore: int = -100) -> Tensor:
    """Sum of -log softmax(logits)[target], a scalar in fp32 (fp64 for fp64 logits); 0 if all targets are `ignore`.

    logits: any float dtype [..., V / size]: this rank's columns of the vocabulary. target: int64 [...], ids of the
    whole vocabulary, equal on all ranks of the group.
    """
    logits, target = _wide(logits), target.flatten()
    if group is None:
        return F.cross_entropy(logits, target, ignore_index=ignore, reduction="sum")
    return _SplitCrossEntropy.apply(logits, target, group, ignore)[0]


def cross_entropy_and_z_sums(
    logits: Tensor, target: Tensor, *, group: Group = None, ignore: int = -100
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_sum`, and the sum over the same targets of log^2 Z, Z = sum exp(logits): the z-loss before its
    coefficient (PaLM 2204.02311 section 5; Chameleon 2405.09818 section 2.2)."""
    logits, target = _wide(logits), target.flatten()
    if group is None:
        log_z = logits.logsumexp(-1).masked_fill(target == ignore, 0)
        return F.cross_entropy(logits, target, ignore_index=ignore, reduction="sum"), log_z.square().sum()
    return _SplitCrossEntropy.apply(logits, target, group, ignore)


def _wide(logits: Tensor) -> Tensor:
    """[..., V] -> [R, V] in fp32, or fp64."""
    return logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))


class _SplitCrossEntropy(torch.autograd.Function):
    """log Z = max + log(sum exp(x - max)). -log p = log Z - x_target, whose gradient is softmax(x) - onehot(target);
    that of log^2 Z is 2 log Z softmax(x)."""

    @staticmethod
    def forward(ctx, logits, target, group, ignore):
        ctx.set_materialize_grads(False)
        num_local = logits.shape[-1]
        largest = logits.amax(-1)  # [R]
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - largest[:, None]
        local = target - group_rank(group) * num_local
        counts = target != ignore
        here = counts & (local >= 0) & (local < num_local)
        local = local.clamp(0, num_local - 1)
        own_logit = shifted.gather(1, local[:, None])[:, 0].masked_fill(~here, 0)
        exp = shifted.exp_()
        both = torch.stack([exp.sum(-1), own_logit])
        dist.all_reduce(both, group=group)
        total, own_logit = both
        log_total = total.log()
        log_z = (log_total + largest).masked_fill(~counts, 0)
        ctx.save_for_backward(exp.div_(total[:, None]), local, here, counts, log_z)
        return (log_total - own_logit).masked_fill(~counts, 0).sum(), log_z.square().sum()

    @staticmethod
    def backward(ctx, grad, grad_z):
        softmax, local, here, counts, log_z = ctx.saved_tensors
        grad_logits = None
        if grad is not None:
            grad_logits = softmax * counts[:, None]
            grad_logits.scatter_add_(1, local[:, None], -here[:, None].to(grad_logits.dtype))
            grad_logits *= grad
        if grad_z is not None:
            of_z = softmax * (2 * grad_z * log_z)[:, None]
            grad_logits = of_z if grad_logits is None else grad_logits.add_(of_z)
        return grad_logits, None, None, None
