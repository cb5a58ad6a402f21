"""A training in progress: everything that changes from epoch to epoch, and how to save and restore it."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models import digits
from models.checkpoint import Checkpoint, load_weights
from models.convnet import build_conv_classifier
from models.errors import RecipeError
from models.factories import CONV_CLASSIFIER
from models.images import ImageDataset, LabelledImages
from models.loader import OrderedBatches, ShuffledBatches
from models.optimization import build_one_cycle, build_optimizer
from models.provenance import git_revision, versions
from models.recipe import Recipe
from models.reproducibility import restore_rng_state, rng_state
from models.signature import image_classification_signature
from models.trainer import EpochMetrics, Evaluation, Trainer

_EVALUATION_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport:
    """One epoch, for progress bars and metrics.jsonl."""

    epoch: int
    """From 1."""

    train: EpochMetrics
    validation: Evaluation

    seconds: float
    """Training and validation together."""


class Session:
    """Trains epoch by epoch and remembers the best one.

    Call it inside `reproducible`: the first weights and dropout draw on torch's generators.
    """

    def __init__(self, recipe: Recipe, dataset: ImageDataset, device: torch.device) -> None:
        self.epoch = 0
        self._recipe = recipe
        self._dataset = dataset
        self._device = device
        self._model_config: dict[str, Any] = {
            "in_channels": dataset.channels,
            "num_classes": len(dataset.class_names),
            "widths": list(recipe.model.widths),
            "blocks_per_stage": recipe.model.blocks_per_stage,
            "dropout": recipe.model.dropout,
        }
        self._batches = self._shuffled_batches()
        self._trainer = self._build_trainer()
        self._best: dict[str, Any] = {}
        self._versions = versions()
        self._git_revision = git_revision()

    @property
    def parameter_count(self) -> int:
        """Trainable numbers in the model."""
        return sum(parameter.numel() for parameter in self._trainer.model.parameters())

    def run_epoch(self) -> EpochReport:
        """Trains one epoch and measures it on the validation split."""
        started = time.perf_counter()
        train = self._trainer.train_epoch(self._batches)
        validation = self._evaluate(self._dataset.validation)
        self.epoch += 1
        if not self._best or self._rank(validation) > self._rank(Evaluation(**self._best["validation"])):
            weights = {key: tensor.clone() for key, tensor in self._trainer.model.state_dict().items()}
            self._best = {
                "epoch": self.epoch,
                "validation": dataclasses.asdict(validation),
                "state_dict": weights,
            }
        return EpochReport(epoch=self.epoch, train=train, validation=validation, seconds=time.perf_counter() - started)

    def resumable_checkpoint(self, report: EpochReport) -> Checkpoint:
        """The state after the latest epoch; its metrics are the validation split's."""
        training = {
            "trainer": self._trainer.state_dict(),
            "batches": self._batches.state_dict(),
            "rng": rng_state(self._device),
            "best": self._best,
        }
        return self._checkpoint(report.validation, split="validation", epoch=self.epoch, training=training)

    def final_checkpoint(self) -> Checkpoint:
        """The best epoch's weights, measured on the held-out split."""
        self._trainer.model.load_state_dict(self._best["state_dict"])
        held_out = self._evaluate(self._dataset.held_out)
        return self._checkpoint(held_out, split="held_out", epoch=self._best["epoch"], training=None)

    def restore(self, checkpoint: Checkpoint, path: Path) -> None:
        """Continues from a `resumable_checkpoint` of the same recipe, to the same bits.

        Args:
            checkpoint: what to continue from.
            path: where it comes from, for messages.
        """
        training = checkpoint.training or {}
        load_weights(self._trainer.model, checkpoint.state_dict, path)
        self._trainer.load_state_dict(training["trainer"])
        self._batches.load_state_dict(training["batches"])
        self._best = training["best"]
        self.epoch = checkpoint.epoch
        restore_rng_state(training["rng"], self._device)

    def _shuffled_batches(self) -> ShuffledBatches:
        samples, batch_size = len(self._dataset.train), self._recipe.trainer.batch_size
        if batch_size > samples:
            raise RecipeError(
                f"trainer.batch_size is {batch_size}, and the training split has {samples} samples; lower it."
            )
        images, labels = self._dataset.to_tensors(self._dataset.train)
        return ShuffledBatches(images, labels, batch_size=batch_size, seed=self._recipe.seed)

    def _build_trainer(self) -> Trainer:
        options = self._recipe.optimizer
        model = build_conv_classifier(**self._model_config).to(self._device)
        optimizer = build_optimizer(model, learning_rate=options.learning_rate, weight_decay=options.weight_decay)
        scheduler = build_one_cycle(
            optimizer,
            max_learning_rate=options.learning_rate,
            total_steps=self._recipe.trainer.epochs * len(self._batches),
            warmup_fraction=options.warmup_fraction,
        )
        return Trainer(
            model,
            optimizer=optimizer,
            scheduler=scheduler,
            max_grad_norm=self._recipe.trainer.max_grad_norm,
            device=self._device,
        )

    def _evaluate(self, split: LabelledImages) -> Evaluation:
        images, labels = self._dataset.to_tensors(split)
        return self._trainer.evaluate(OrderedBatches(images, labels, batch_size=_EVALUATION_BATCH_SIZE))

    @staticmethod
    def _rank(validation: Evaluation) -> tuple[float, float]:
        # On a small split many epochs share the highest accuracy; the loss tells them apart.
        return validation.accuracy, -validation.loss

    def _checkpoint(
        self, metrics: Evaluation, *, split: str, epoch: int, training: dict[str, Any] | None
    ) -> Checkpoint:
        data = self._recipe.data
        return Checkpoint(
            model={"factory": CONV_CLASSIFIER, "config": self._model_config},
            state_dict=self._trainer.model.state_dict(),
            signature=image_classification_signature(self._dataset),
            evaluation={
                "source": digits.EVALUATION_SOURCE,
                "options": {
                    "seed": self._recipe.seed,
                    "held_out_fraction": data.held_out_fraction,
                    "validation_fraction": data.validation_fraction,
                    "split": split,
                },
            },
            metrics=dataclasses.asdict(metrics),
            epoch=epoch,
            recipe=self._recipe.as_dict(),
            versions=self._versions,
            git_revision=self._git_revision,
            training=training,
        )
