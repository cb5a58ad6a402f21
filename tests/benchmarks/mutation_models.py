"""A model for the mutation test that no recipe trains: two inputs, two outputs, any length."""

import torch
from torch import Tensor, nn

SIGNATURE = {
    "format_version": 1,
    "task": "tensor",
    "inputs": [
        {
            "name": "steps",
            "dtype": "float32",
            "shape": ["batch", "length", 8],
            "minimum": -2,
            "maximum": 2,
            "padding": 0,
        },
        {"name": "mask", "dtype": "int64", "shape": ["batch", "length"], "minimum": 1, "maximum": 1, "padding": 0},
        {"name": "context", "dtype": "float32", "shape": ["batch", 6], "minimum": -1, "maximum": 1},
    ],
    "axes": {"length": {"minimum": 1, "maximum": 24}},
    "outputs": [
        {"name": "scores", "dtype": "float32", "shape": ["batch", 5]},
        {"name": "states", "dtype": "float32", "shape": ["batch", "length", 16]},
    ],
}


class Mixer(nn.Module):
    """Mixes steps with a context; padding has no influence.

    Shapes (B = batch, T = steps):
        input  steps [B, T, 8], mask [B, T] int64, context [B, 6]
        output scores [B, 5], states [B, T, 16]
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.lift = nn.Linear(8, width)
        self.condition = nn.Linear(6, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.state = nn.Linear(width, 16)
        self.head = nn.Linear(width, 5)

    def forward(self, steps: Tensor, mask: Tensor, context: Tensor) -> dict[str, Tensor]:
        """Maps steps to a state each, and to scores of the whole."""
        states = torch.tanh(self.lift(steps) + self.condition(context).unsqueeze(1))
        states = states + nn.functional.gelu(self.first(states))
        states = self.norm(states + torch.sigmoid(self.second(states)))
        weights = mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        return {"scores": self.head(pooled), "states": self.state(states)}


def build_mixer(width: int = 16) -> Mixer:
    """The model with fresh weights."""
    return Mixer(width)
