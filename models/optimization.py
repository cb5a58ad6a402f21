"""The optimizer and its learning-rate schedule."""

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

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
