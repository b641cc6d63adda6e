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
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    target = target.flatten()
    if group is None:
        return F.cross_entropy(logits, target, ignore_index=ignore, reduction="sum")
    return _SplitCrossEntropy.apply(logits, target, group, ignore)


class _SplitCrossEntropy(torch.autograd.Function):
    """-log p = log(sum exp(x - max)) - (x_target - max); its gradient is softmax(x) - onehot(target)."""

    @staticmethod
    def forward(ctx, logits, target, group, ignore):
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
        ctx.save_for_backward(exp.div_(total[:, None]), local, here, counts)
        return (total.log() - own_logit).masked_fill(~counts, 0).sum()

    @staticmethod
    def backward(ctx, grad):
        softmax, local, here, counts = ctx.saved_tensors
        grad_logits = softmax * counts[:, None]
        grad_logits.scatter_add_(1, local[:, None], -here[:, None].to(grad_logits.dtype))
        return grad_logits * grad, None, None, None
