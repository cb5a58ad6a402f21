"""A training in progress: everything that changes from step to step, and how to save and restore it."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from models.assembly import build_model, describe_model
from models.checkpoint import Checkpoint, load_weights
from models.dataloader import build_loader
from models.dataset import Dataset, Split
from models.distributed import ALONE, Processes
from models.errors import RecipeError
from models.evaluation import ClassificationReport
from models.optimization import build_optimizer, build_scheduler
from models.provenance import git_revision, versions
from models.recipe import ConvnetSection, Recipe
from models.reproducibility import restore_rng_state, rng_state
from models.sampler import EvaluationSampler, TrainingSampler
from models.splits import SplitName
from models.trainer import EpochMetrics, StepMetrics, Trainer

_EVALUATION_BATCH_SIZE = 256
# Of one sample at one place there is no variance.
_BATCH_NORM_SAMPLES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport:
    """One epoch, for progress bars and metrics.jsonl."""

    epoch: int
    """From 1."""

    train: EpochMetrics
    validation: ClassificationReport

    improved: bool
    """Whether it is the best epoch so far."""

    seconds: float
    """Training and validation together."""

    def as_dict(self) -> dict[str, Any]:
        """The line of metrics.jsonl: figures only."""
        return {
            "epoch": self.epoch,
            "train": dataclasses.asdict(self.train),
            "validation": headline(self.validation),
            "seconds": self.seconds,
        }


def headline(report: ClassificationReport) -> dict[str, float | int]:
    """The figures of a report that do not grow with the number of classes."""
    return {
        "accuracy": report.accuracy,
        "loss": report.loss,
        "macro_f1": report.macro_f1,
        "weighted_f1": report.weighted_f1,
        "samples": report.samples,
    }


class Session:
    """Trains epoch by epoch and remembers the best one.

    Call it inside `reproducible`: the first weights and dropout draw on torch's generators.

    Args:
        recipe: what to train.
        dataset: what to learn from.
        device: where.
        processes: those that train together.

    Raises:
        RecipeError: when the batch size does not fit the data, the processes or the model.
        ModelConfigError: when the model's options do not go together.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, device: torch.device, *, processes: Processes = ALONE) -> None:
        self.epoch = 0
        """Whole epochs trained."""

        self.batches_done = 0
        """Batches trained of the epoch in progress."""

        self._recipe = recipe
        self._dataset = dataset
        self._device = device
        self._processes = processes
        self._model_description = describe_model(recipe, dataset)
        self._sampler = TrainingSampler(
            len(dataset.train),
            batch_size=recipe.trainer.batch_size,
            seed=recipe.seed,
            lengths=dataset.train.lengths if recipe.trainer.bucketing else None,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        _require_batch_norm(recipe, processes)
        self._loader = self._build_loader(dataset.train, self._sampler)
        # Kept from epoch to epoch, as its workers are.
        self._validation_loader = self._build_evaluation_loader(dataset.validation)
        self._trainer = self._build_trainer()
        self._best: dict[str, Any] = {}
        self._kept: list[tuple[float, float, int]] = []
        self._latest_validation: dict[str, float | int] = {}
        self.versions = versions()
        """Of what decides the bytes of a checkpoint."""

        self.git_revision = git_revision()
        """Of torchport's source; None outside a repository."""

        if processes.rank:
            # Equal weights, which are built by now, but dropout of its own.
            torch.manual_seed(recipe.seed + processes.rank)

    @property
    def parameter_count(self) -> int:
        """Trainable numbers in the model."""
        return sum(parameter.numel() for parameter in self._trainer.model.parameters() if parameter.requires_grad)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training, without early stopping."""
        return self._recipe.trainer.epochs * len(self._sampler)

    @property
    def steps_done(self) -> int:
        """Steps taken, those before a resume included."""
        return self._trainer.steps

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are trained, or too many have passed without a better one."""
        patience = self._recipe.trainer.early_stopping
        stopped = patience is not None and bool(self._best) and self.epoch - self._best["epoch"] >= patience
        return self.epoch >= self._recipe.trainer.epochs or stopped

    def run_epoch(self, *, on_step: Callable[[StepMetrics], None] = lambda _: None) -> EpochReport:
        """Trains an epoch, or the rest of one that was resumed, and measures it on the validation split.

        Args:
            on_step: called after each step, when the session can be saved.

        Raises:
            TrainingDivergedError: when a loss or gradient is not finite.
        """
        started = time.perf_counter()

        def count(metrics: StepMetrics) -> None:
            self.batches_done += 1
            on_step(metrics)

        self._sampler.set_position(self.epoch, skip=self.batches_done)
        train = self._trainer.train_epoch(self._loader, on_step=count)
        validation = self._evaluate(self._validation_loader)
        self.epoch += 1
        self.batches_done = 0
        self._latest_validation = headline(validation)
        improved = not self._best or _rank(self._latest_validation) > _rank(self._best["validation"])
        if improved:
            self._best = {
                "epoch": self.epoch,
                "validation": self._latest_validation,
                "state_dict": {key: tensor.clone() for key, tensor in self._trainer.model.state_dict().items()},
            }
        return EpochReport(
            epoch=self.epoch,
            train=train,
            validation=validation,
            improved=improved,
            seconds=time.perf_counter() - started,
        )

    def resumable_checkpoint(self, facts: Mapping[str, Any]) -> Checkpoint:
        """The state after the latest step; its metrics are those of the latest validation. All processes call it.

        Args:
            facts: what the caller wants kept beside the session's own state, as plain values.
        """
        training = {
            **facts,
            "trainer": self._trainer.state_dict(),
            "batches_done": self.batches_done,
            "rng": self._processes.gather(rng_state(self._device)),
            "best": self._best,
            "kept": self._kept,
        }
        return self._checkpoint(self._latest_validation, split="validation", epoch=self.epoch, training=training)

    def epoch_checkpoint(self) -> Checkpoint:
        """The weights after the latest epoch, measured on the validation split."""
        return self._checkpoint(self._latest_validation, split="validation", epoch=self.epoch, training=None)

    def keep_epochs(self) -> list[int]:
        """The best epochs so far, the latest included if it is one of them, as many as the recipe keeps."""
        accuracy, loss = _rank(self._latest_validation)
        self._kept = sorted([*self._kept, (accuracy, loss, -self.epoch)], reverse=True)
        self._kept = self._kept[: self._recipe.trainer.keep_epochs]
        return [-epoch for _, _, epoch in self._kept]

    def final_checkpoint(self) -> tuple[Checkpoint, ClassificationReport]:
        """The weights that the recipe asks for, the best epoch's or the last one's, measured on the held-out split."""
        epoch = self.epoch
        if self._recipe.trainer.final_weights == "best":
            epoch = self._best["epoch"]
            self._trainer.model.load_state_dict(self._best["state_dict"])
        held_out = self._evaluate(self._build_evaluation_loader(self._dataset.held_out))
        checkpoint = self._checkpoint(headline(held_out), split="held_out", epoch=epoch, training=None)
        return checkpoint, held_out

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's weights as they are, on the CPU."""
        return {key: tensor.detach().cpu() for key, tensor in self._trainer.model.state_dict().items()}

    def trainer_state(self) -> dict[str, Any]:
        """Optimizer, schedule and scaler as they are."""
        return self._trainer.state_dict()

    def restore(self, checkpoint: Checkpoint, path: Path) -> None:
        """Continues from a `resumable_checkpoint` of the same recipe and processes, to the same bits.

        Args:
            checkpoint: what to continue from.
            path: where it comes from, for messages.
        """
        training = checkpoint.training or {}
        load_weights(self._trainer.model, checkpoint.state_dict, path)
        self._trainer.load_state_dict(training["trainer"])
        self._best = training["best"]
        self._kept = [tuple(entry) for entry in training["kept"]]
        self._latest_validation = dict(checkpoint.metrics)
        self.epoch = checkpoint.epoch
        self.batches_done = training["batches_done"]
        restore_rng_state(training["rng"][self._processes.rank], self._device)

    def _build_loader(self, split: Split, sampler: TrainingSampler | EvaluationSampler) -> "DataLoader[Any]":
        return build_loader(
            split, sampler, self._dataset.collate, device=self._device, workers=self._recipe.trainer.workers
        )

    def _build_trainer(self) -> Trainer:
        options, trainer = self._recipe.optimizer, self._recipe.trainer
        model = build_model(self._model_description).to(self._device)
        optimizer = build_optimizer(model, learning_rate=options.learning_rate, weight_decay=options.weight_decay)
        scheduler = build_scheduler(
            options.schedule,
            optimizer,
            max_learning_rate=options.learning_rate,
            total_steps=self.total_steps,
            warmup_fraction=options.warmup_fraction,
        )
        return Trainer(
            model,
            optimizer=optimizer,
            scheduler=scheduler,
            max_grad_norm=trainer.max_grad_norm,
            device=self._device,
            precision=trainer.precision,
            accumulation=trainer.accumulation,
            consistency=trainer.consistency,
            processes=self._processes,
        )

    def _build_evaluation_loader(self, split: Split) -> "DataLoader[Any]":
        sampler = EvaluationSampler(
            len(split),
            batch_size=_EVALUATION_BATCH_SIZE,
            lengths=split.lengths,
            rank=self._processes.rank,
            world_size=self._processes.world_size,
        )
        return self._build_loader(split, sampler)

    def _evaluate(self, loader: "DataLoader[Any]") -> ClassificationReport:
        return self._trainer.evaluate(loader, class_names=self._dataset.class_names)

    def _checkpoint(
        self,
        metrics: dict[str, float | int],
        *,
        split: SplitName,
        epoch: int,
        training: dict[str, Any] | None,
    ) -> Checkpoint:
        evaluation = self._dataset.evaluation
        return Checkpoint(
            model=self._model_description,
            state_dict=self._trainer.model.state_dict(),
            signature=dict(self._dataset.signature),
            evaluation={"source": evaluation["source"], "options": {**evaluation["options"], "split": split}},
            files={name: content.decode() for name, content in self._dataset.files.items()},
            metrics=metrics,
            epoch=epoch,
            recipe=self._recipe.as_dict(),
            versions=self.versions,
            git_revision=self.git_revision,
            training=training,
        )


def _require_batch_norm(recipe: Recipe, processes: Processes) -> None:
    """Refuses parts of a batch too small for batch normalisation.

    Only whole batches are trained on (see `TrainingSampler`), so no part is smaller than this one.
    """
    trainer = recipe.trainer
    smallest = trainer.batch_size // (trainer.accumulation * processes.world_size)
    if isinstance(recipe.model, ConvnetSection) and smallest < _BATCH_NORM_SAMPLES:
        least = _BATCH_NORM_SAMPLES * trainer.accumulation * processes.world_size
        raise RecipeError(
            f"trainer.batch_size is {trainer.batch_size}, and trainer.accumulation = {trainer.accumulation} in "
            f"{processes.world_size} {'process' if processes.world_size == 1 else 'processes'} leaves parts of one "
            f"sample, which batch normalisation cannot use; raise trainer.batch_size to {least} or lower "
            "trainer.accumulation."
        )


def _rank(metrics: dict[str, float | int]) -> tuple[float, float]:
    # On a small split many epochs share the highest accuracy; the loss tells them apart.
    return metrics["accuracy"], -metrics["loss"]
