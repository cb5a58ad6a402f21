"""Training steps: forwards, backwards, step; and the measuring of a model."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from models.batch import Batch
from models.distributed import ALONE, Processes
from models.errors import TrainingDivergedError
from models.evaluation import ClassificationReport, ConfusionMatrix

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The scale of fp16 losses starts high and is halved until gradients fit: some skipped steps are normal, more are not.
_MOST_SKIPPED_IN_A_ROW = 25


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochMetrics:
    """What one epoch of training was like."""

    loss: float
    """Mean over the epoch's samples, in nats: cross-entropy, and what `consistency` adds."""

    grad_norm: float
    """Mean L2 norm of the gradient before clipping, over the steps that were taken: fp16 may skip some, or all (0)."""

    learning_rate: float
    """At the last step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """What one step was like."""

    step: int
    """From 1, over all epochs."""

    loss: float
    """Mean over the batch, in nats: cross-entropy, and what `consistency` adds; of all processes together."""

    grad_norm: float
    """L2 norm of the gradient before clipping; not finite when fp16 skipped the step."""

    learning_rate: float
    """Of this step."""


@dataclass(slots=True)
class _Sums:
    """An epoch's running sums; saved with a checkpoint in its middle."""

    loss: float = 0.0
    samples: int = 0
    grad_norm: float = 0.0
    steps: int = 0
    """That were taken."""
    learning_rate: float = 0.0

    def add(self, metrics: StepMetrics, samples: int) -> None:
        self.loss += metrics.loss * samples
        self.samples += samples
        if math.isfinite(metrics.grad_norm):  # a step that fp16 skips has none
            self.grad_norm += metrics.grad_norm
            self.steps += 1
        self.learning_rate = metrics.learning_rate

    def mean(self) -> EpochMetrics:
        return EpochMetrics(
            loss=self.loss / self.samples,
            grad_norm=self.grad_norm / max(1, self.steps),
            learning_rate=self.learning_rate,
        )


class Trainer:
    """Trains a classifier with cross-entropy, one step a batch.

    Args:
        model: maps a batch's inputs to logits [B, K]; in training perhaps to [B, H, K], those of H parts that each
            learn on their own. Moved to the device.
        optimizer: of the model's parameters.
        scheduler: stepped after every step; None for a constant learning rate.
        max_grad_norm: longer gradients are clipped to this L2 norm.
        device: where batches go.
        precision: fp32; bf16, or fp16 with a scaled loss, for what torch's autocast deems safe in them.
        accumulation: parts that a batch is computed in, one after the other, to need less memory. The step is that
            of the whole batch: each part counts by its samples.
        consistency: weight of the divergence between two passes over the same samples, which differ by dropout, beside
            their cross-entropy (R-Drop, Liang et al., arXiv:2106.14448); 0 for a single pass.
        processes: those that share each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        max_grad_norm: float,
        device: torch.device,
        precision: Precision = "fp32",
        accumulation: int = 1,
        consistency: float = 0.0,
        processes: Processes = ALONE,
    ) -> None:
        self.model = model.to(device)
        self.steps = 0
        self._parallel = processes.wrap(self.model, device)
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._max_grad_norm = max_grad_norm
        self._device = device
        self._autocast_dtype = _AUTOCAST_DTYPES.get(precision)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._accumulation = accumulation
        self._consistency = consistency
        self._processes = processes
        self._skipped_in_a_row = 0
        self._sums = _Sums()

    def train_epoch(
        self, batches: Iterable[Batch], *, on_step: Callable[[StepMetrics], None] = lambda _: None
    ) -> EpochMetrics:
        """Takes one step per batch.

        Args:
            batches: an epoch, or what is left of one after `load_state_dict`.
            on_step: called after each step, when the trainer can be saved.

        Raises:
            TrainingDivergedError: when a loss or gradient is not finite; that step is not taken.
        """
        self.model.train()
        for batch in batches:
            metrics = self._step(batch)
            self._sums.add(metrics, len(batch))
            on_step(metrics)
        epoch = self._sums.mean()
        self._sums = _Sums()
        return epoch

    def evaluate(self, batches: Iterable[Batch], *, class_names: Sequence[str]) -> ClassificationReport:
        """Measures the model without changing it; over the batches of all processes, with the same result on each."""
        self.model.eval()
        confusion = ConfusionMatrix(class_names, device=self._device)
        with torch.inference_mode():
            for batch in batches:
                moved = batch.to(self._device)
                confusion.update(self._forward(self.model, moved), moved.labels)
        confusion.counts.copy_(self._processes.sum(confusion.counts))
        confusion.loss_sum.copy_(self._processes.sum(confusion.loss_sum))
        return confusion.report()

    def state_dict(self) -> dict[str, Any]:
        """All but the weights that the next step depends on."""
        return {
            "steps": self.steps,
            "optimizer": self._optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "skipped_in_a_row": self._skipped_in_a_row,
            "sums": asdict(self._sums),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from where `state_dict` was called; the model's weights are loaded separately."""
        self.steps = state["steps"]
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self._sums = _Sums(**state["sums"])

    def _forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's logits."""
        with torch.autocast(self._device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None):
            logits: Tensor = model(**batch.inputs)
        return logits

    def _step(self, batch: Batch) -> StepMetrics:
        learning_rate = float(self._optimizer.param_groups[0]["lr"])
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batch.to(self._device))
        self._scaler.unscale_(self._optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        mean_loss = self._processes.sum(loss) / self._processes.world_size
        self._require_finite(batch, mean_loss, grad_norm)
        if self._optimizer_step(grad_norm) and self._scheduler is not None:
            self._scheduler.step()
        self.steps += 1
        return StepMetrics(
            step=self.steps, loss=mean_loss.item(), grad_norm=grad_norm.item(), learning_rate=learning_rate
        )

    def _backward(self, batch: Batch) -> Tensor:
        """Adds up the gradients of all parts of a batch; returns its mean loss, detached."""
        total = torch.zeros((), device=self._device)
        parts = batch.split(self._accumulation)
        for number, part in enumerate(parts, start=1):
            with self._no_sync(last=number == len(parts)):
                loss = self._loss(part) * (len(part) / len(batch))
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _loss(self, batch: Batch) -> Tensor:
        if not self._consistency:
            return _mean_loss(self._forward(self._parallel, batch).float(), batch.labels)
        both = batch.twice()
        logits = self._forward(self._parallel, both).float()
        return _mean_loss(logits, both.labels) + self._consistency * _mean_divergence(*logits.chunk(2))

    def _no_sync(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Processes exchange gradients once a step, with the last part."""
        if isinstance(self._parallel, DistributedDataParallel) and not last:
            return self._parallel.no_sync()
        return contextlib.nullcontext()

    def _optimizer_step(self, grad_norm: Tensor) -> bool:
        """Takes the step unless fp16 gradients overflowed; tells whether it did."""
        self._scaler.step(self._optimizer)
        self._scaler.update()
        taken = not self._scaler.is_enabled() or bool(torch.isfinite(grad_norm))
        self._skipped_in_a_row = 0 if taken else self._skipped_in_a_row + 1
        return taken

    def _require_finite(self, batch: Batch, loss: Tensor, grad_norm: Tensor) -> None:
        overflows = self._scaler.is_enabled() and self._skipped_in_a_row < _MOST_SKIPPED_IN_A_ROW
        for quantity, value in (("loss", loss), ("gradient norm", grad_norm)):
            if torch.isfinite(value) or (quantity == "gradient norm" and overflows):
                continue
            raise TrainingDivergedError(
                f"The {quantity} became {value.item()} at step {self.steps + 1}, with a learning rate of "
                f"{self._optimizer.param_groups[0]['lr']:.3g}; lower optimizer.learning_rate or look for bad inputs.",
                step=self.steps + 1,
                batch=batch,
            )


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, K], or of each part's in [B, H, K]."""
    if logits.dim() == 3:
        labels = labels.repeat_interleave(logits.size(1))
        logits = logits.flatten(end_dim=1)
    return F.cross_entropy(logits, labels)


def _mean_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Mean over samples, and parts if there are some, of (KL(p, q) + KL(q, p)) / 2 for the softmax of two logits."""
    p, q = F.log_softmax(first, dim=-1), F.log_softmax(second, dim=-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(dim=-1).mean() / 2
