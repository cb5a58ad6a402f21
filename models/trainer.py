"""One pass over the data: forwards, backwards, step; and the measuring of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from models.errors import TrainingDivergedError

Batches = Iterable[tuple[Tensor, Tensor]]
"""(inputs [B, ...], labels [B] int64) each; a DataLoader is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochMetrics:
    """What one epoch of training was like."""

    loss: float
    """Mean cross-entropy over the epoch's samples, in nats."""

    grad_norm: float
    """Mean L2 norm of the gradient over the epoch's steps, before clipping."""

    learning_rate: float
    """At the last step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How well a classifier does on a set of samples."""

    accuracy: float
    """Share of samples whose largest logit is the label's."""

    loss: float
    """Mean cross-entropy, in nats."""

    samples: int
    """How many were measured."""


class Trainer:
    """Trains a classifier with cross-entropy, a step per batch.

    Args:
        model: maps inputs [B, ...] to logits [B, K]; moved to the device.
        optimizer: of the model's parameters.
        scheduler: stepped after every batch.
        max_grad_norm: longer gradients are clipped to this L2 norm.
        device: where batches go.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        max_grad_norm: float,
        device: torch.device,
    ) -> None:
        self.model = model.to(device)
        self.steps = 0
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._max_grad_norm = max_grad_norm
        self._device = device

    def train_epoch(self, batches: Batches) -> EpochMetrics:
        """Takes one step per batch.

        Raises:
            TrainingDivergedError: when a loss or gradient is not finite; that step is not taken.
        """
        self.model.train()
        losses: list[tuple[float, int]] = []
        grad_norms: list[float] = []
        learning_rate = 0.0
        for inputs, labels in batches:
            learning_rate = float(self._optimizer.param_groups[0]["lr"])
            loss, grad_norm = self._step(inputs, labels)
            losses.append((loss, len(labels)))
            grad_norms.append(grad_norm)
        return EpochMetrics(
            loss=sum(loss * count for loss, count in losses) / sum(count for _, count in losses),
            grad_norm=sum(grad_norms) / len(grad_norms),
            learning_rate=learning_rate,
        )

    def evaluate(self, batches: Batches) -> Evaluation:
        """Measures the model without changing it."""
        self.model.eval()
        loss, correct, samples = 0.0, 0, 0
        with torch.inference_mode():
            for inputs, cpu_labels in batches:
                labels = cpu_labels.to(self._device)
                logits = self.model(inputs.to(self._device))
                loss += F.cross_entropy(logits, labels, reduction="sum").item()
                correct += int((logits.argmax(dim=1) == labels).sum().item())
                samples += len(labels)
        return Evaluation(accuracy=correct / samples, loss=loss / samples, samples=samples)

    def state_dict(self) -> dict[str, Any]:
        """All but the weights that the next step depends on."""
        return {
            "steps": self.steps,
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from where `state_dict` was called; the model's weights are loaded separately."""
        self.steps = state["steps"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])

    def _step(self, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """Returns the loss and the norm of its gradient before clipping."""
        self._optimizer.zero_grad(set_to_none=True)
        logits = self.model(inputs.to(self._device))
        loss = F.cross_entropy(logits, labels.to(self._device))
        self._require_finite("loss", loss)
        loss.backward()  # type: ignore[no-untyped-call]
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        self._require_finite("gradient norm", grad_norm)
        self._optimizer.step()
        self._scheduler.step()
        self.steps += 1
        return loss.item(), grad_norm.item()

    def _require_finite(self, quantity: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise TrainingDivergedError(
                f"The {quantity} became {value.item()} at step {self.steps + 1}, with a learning rate of "
                f"{self._optimizer.param_groups[0]['lr']:.3g}; lower optimizer.learning_rate or look for bad inputs."
            )
