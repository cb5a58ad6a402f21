"""The optimizer and its learning-rate schedules."""

import math
from typing import Literal

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from models.errors import RecipeError

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_MIN_STEPS = 4

ScheduleName = Literal["one_cycle", "warmup_cosine"]


def build_optimizer(model: nn.Module, *, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW that decays weights, but no bias and no parameter of a norm.

    Norms are recognised by module type: matching names misses `layer_norm1.weight` or `features.0.bn.weight`.
    """
    exempt_ids = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, _NORMS) or name.endswith("bias")
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in exempt_ids], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in exempt_ids], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate)


def build_scheduler(
    name: ScheduleName, optimizer: Optimizer, *, max_learning_rate: float, total_steps: int, warmup_fraction: float
) -> LRScheduler:
    """Builds a schedule that is stepped after every optimizer step.

    Args:
        name: which one.
        optimizer: whose learning rate it sets.
        max_learning_rate: the peak.
        total_steps: of the whole training.
        warmup_fraction: share of them until the peak.

    Raises:
        RecipeError: when there are too few steps.
    """
    build = {"one_cycle": build_one_cycle, "warmup_cosine": build_warmup_cosine}[name]
    return build(
        optimizer, max_learning_rate=max_learning_rate, total_steps=total_steps, warmup_fraction=warmup_fraction
    )


def build_warmup_cosine(
    optimizer: Optimizer, *, max_learning_rate: float, total_steps: int, warmup_fraction: float
) -> LambdaLR:
    """A straight line up to the peak, then half a cosine down to zero (Loshchilov and Hutter, arXiv:1608.03983).

    Unlike one-cycle it leaves the momentum alone, and starts lower: the first of W steps of warm-up is 1/W of the peak.
    """
    warmup_steps = max(1, round(warmup_fraction * total_steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = max_learning_rate
    return LambdaLR(optimizer, factor)


def build_one_cycle(
    optimizer: Optimizer, *, max_learning_rate: float, total_steps: int, warmup_fraction: float
) -> OneCycleLR:
    """Cosine up to the peak, cosine down to almost zero (Smith and Topin, https://arxiv.org/abs/1708.07120).

    Raises:
        RecipeError: when there are too few steps for a cycle.
    """
    if total_steps < _MIN_STEPS:
        raise RecipeError(
            f"The training has {total_steps} steps and needs at least {_MIN_STEPS}; "
            "raise trainer.epochs or lower trainer.batch_size."
        )
    # Below two steps of warm-up OneCycleLR divides by zero, or starts past the peak.
    pct_start = max(warmup_fraction, 2 / total_steps)
    return OneCycleLR(optimizer, max_lr=max_learning_rate, total_steps=total_steps, pct_start=pct_start)
