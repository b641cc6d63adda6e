"""AdamW's parameter groups and the learning rate, both pure functions of the recipe."""

import math

import torch
from torch import Tensor, nn

from vilg.config.schema import OptimizerConfig, ScheduleConfig
from vilg.parallel.layout import rule_of


def learning_rate(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Linear warm-up that reaches the peak at step `warmup_steps`, then half a cosine that reaches
    `min_lr_ratio` x peak at step `steps` (SGDR, 1608.03983, eq. 5, without restarts) and stays there.
    A step that is skipped for non-finite numbers keeps its place: the rate depends on the step's number alone.
    """
    if step < schedule.warmup_steps:
        return optimizer.lr * step / schedule.warmup_steps
    span = max(1, schedule.steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    ratio = schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.lr * ratio


def parameter_groups(named: list[tuple[str, Tensor]], weight_decay: float) -> list[dict]:
    """Two AdamW groups, decayed matrices and the rest (norms, biases, embeddings), as parallel/layout.py says."""
    decayed = [p for name, p in named if rule_of(name).decay]
    others = [p for name, p in named if not rule_of(name).decay]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_adamw(groups: list[dict], config: OptimizerConfig, device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    """AdamW (1711.05101) and the name of its implementation: apex's on GPUs where it is installed, else torch's."""
    options = dict(lr=config.lr, betas=config.betas, eps=config.eps)
    if device.type == "cuda":
        try:
            from apex.optimizers import FusedAdam
        except Exception:  # absent, built for another torch, or another package called apex: torch's own is as good
            pass
        else:
            return FusedAdam(groups, adam_w_mode=True, **options), "apex FusedAdam"
    return torch.optim.AdamW(groups, fused=True, **options), "torch AdamW (fused)"


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups for the step that follows."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def restore_settings(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Put the recipe's settings back after loading a state, whose groups carry those of the run that saved it."""
    for group, decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
        group.update(betas=config.betas, eps=config.eps, weight_decay=decay)


def gradient_norm(parameters: list[nn.Parameter] | list[Tensor]) -> Tensor:
    """2-norm of all gradients together, fp32 scalar; a parameter without a gradient counts as zero."""
    norms = [p.grad.detach().float().norm() for p in parameters if p.grad is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())


def clip_gradients(parameters: list[nn.Parameter] | list[Tensor], norm: Tensor, largest: float) -> None:
    """Scale gradients down so that their norm is at most `largest`; the formula is DeepSpeed's, for equal numbers."""
    divisor = ((norm + 1e-6) / largest).clamp(min=1.0)
    for p in parameters:
        if p.grad is not None:
            p.grad.div_(divisor)
