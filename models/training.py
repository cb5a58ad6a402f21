"""From a recipe to a run folder."""

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from models.assembly import build_dataset
from models.checkpoint import Checkpoint, save_checkpoint
from models.dataset import Dataset
from models.device import resolve_device
from models.distributed import Processes, process_group, read_processes
from models.errors import TrainingDivergedError
from models.evaluation import ClassificationReport
from models.model_card import ModelCard, render_model_card
from models.profiling import build_profiler
from models.recipe import Recipe
from models.reproducibility import reproducible
from models.resumption import load_resumable
from models.run_folder import RunFolder
from models.session import EpochReport, Session
from models.tensor_file import write_tensor_file
from models.tracking import Tracker, build_tracker, scalars
from models.trainer import StepMetrics

_RUN_FORMAT_VERSION = 1
_IDS_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """A finished training."""

    checkpoint_path: Path
    """The weights of `weights_epoch`, measured on the held-out split."""

    report: ClassificationReport
    """On the held-out split."""

    weights_epoch: int
    """The epoch whose weights were kept."""

    epochs: int
    """That were trained."""

    resumed_after_epoch: int
    """Whole epochs that a resumed training had behind it; 0 for one from the start."""

    parameters: int
    """Trainable numbers in the model."""

    device: str
    """Where it was trained."""

    skipped_rows: int
    """Bad rows that were left out."""

    seconds: float
    """Of the whole training: a resumed one counts the time that its last.pt had behind it."""

    @property
    def accuracy(self) -> float:
        """On the held-out split."""
        return self.report.accuracy

    @property
    def loss(self) -> float:
        """On the held-out split, in nats."""
        return self.report.loss

    @property
    def samples(self) -> int:
        """In the held-out split."""
        return self.report.samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Observer:
    """Who is told how a training goes; in the main process only."""

    on_start: Callable[[int, int], None] = lambda total_steps, steps_done: None
    """With all steps of the training, and those that a resumed one has behind it."""

    on_step: Callable[[StepMetrics], None] = lambda _: None
    """After each step."""

    on_epoch: Callable[[EpochReport], None] = lambda _: None
    """After each epoch, once it can be resumed from."""


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    profile: bool = False,
    observer: Observer | None = None,
) -> TrainingResult:
    """Trains a recipe; the same recipe gives a byte-identical checkpoint.pt on the same machine.

    Under torchrun each process calls it; the first one writes.

    Args:
        recipe: what to train.
        run_dir: the run folder, created if absent. An earlier training in it is replaced file by file, each in
            one step, and its checkpoint.pt last: a kill at any moment leaves the old one or the new one.
        resume: continue the training that last.pt in `run_dir` holds, to the bits it would have ended with.
            Without a last.pt it starts from the beginning, so that a restarted job can always say `--resume`.
        profile: record where the time of some steps goes; see `models.profiling`.
        observer: is told how it goes.

    Raises:
        ModelsError: see `models.errors`.
    """
    processes = read_processes()
    device = resolve_device(recipe.trainer.device, local_rank=processes.local_rank)
    run = RunFolder(run_dir)
    with (
        process_group(processes, device),
        run.exclusive(needed=processes.is_main),
        reproducible(recipe.seed, device, threads=recipe.trainer.threads),
    ):
        training = _Training(recipe, run, device, processes, observer or Observer())
        return training.run(resume=processes.from_main(resume and run.last.exists()), profile=profile)


class _Training:
    """One call of `train`: what is written when."""

    def __init__(
        self, recipe: Recipe, run: RunFolder, device: torch.device, processes: Processes, observer: Observer
    ) -> None:
        self._clock = time.perf_counter()
        self._seconds_before = 0.0  # of earlier calls, when this one resumes
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._recipe = recipe
        self._run = run
        self._device = device
        self._processes = processes
        self._observer = observer
        self._dataset = build_dataset(recipe)
        self._session = Session(recipe, self._dataset, device, processes=processes)

    def run(self, *, resume: bool, profile: bool) -> TrainingResult:
        """Trains to the end."""
        session, run = self._session, self._run
        if resume:
            self._restore(load_resumable(run, self._recipe, self._dataset, self._processes))
        resumed_after_epoch = session.epoch
        is_main = self._processes.is_main
        if is_main:
            run.start(self._recipe.as_dict(), self._dataset.files, after_epoch=resumed_after_epoch if resume else None)
            run.write_facts(self._facts("running", result=None))
            self._observer.on_start(session.total_steps, session.steps_done)
        tracker = self._build_tracker(after_epoch=resumed_after_epoch) if is_main else Tracker()
        profiler = build_profiler(run.path, device=self._device, enabled=profile and is_main)
        with tracker, profiler:

            def after_step(metrics: StepMetrics) -> None:
                profiler.step()
                every = self._recipe.trainer.save_every_steps
                if every is not None and session.batches_done % every == 0:
                    self._save_resumable()
                if is_main:
                    self._observer.on_step(metrics)

            while not session.is_finished:
                self._run_epoch(after_step, tracker)
        return self._finish(resumed_after_epoch)

    def _run_epoch(self, after_step: Callable[[StepMetrics], None], tracker: Tracker) -> None:
        try:
            report = self._session.run_epoch(on_step=after_step)
        except TrainingDivergedError as error:
            raise self._dump(error) from error
        if self._processes.is_main:
            # Metrics first: a kill in between leaves a line too many, which a resume removes.
            self._run.append_metrics(report.as_dict())
            tracker.write(scalars(report.as_dict()), report.epoch)
            self._save_epoch(report)
        self._save_resumable()
        if self._processes.is_main:
            self._observer.on_epoch(report)

    def _save_epoch(self, report: EpochReport) -> None:
        checkpoint = self._session.epoch_checkpoint()
        if report.improved:
            save_checkpoint(checkpoint, self._run.best)
        if self._recipe.trainer.keep_epochs:
            kept = self._session.keep_epochs()
            if report.epoch in kept:
                save_checkpoint(checkpoint, self._run.epoch(report.epoch))
            self._run.keep_only(kept)

    def _save_resumable(self) -> None:
        checkpoint = self._session.resumable_checkpoint(
            {"data_digest": self._dataset.digest, "started_at": self._started_at, "seconds": self._seconds()}
        )
        if self._processes.is_main:
            save_checkpoint(checkpoint, self._run.last)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._session.restore(checkpoint, self._run.last)
        training = checkpoint.training or {}
        self._started_at, self._seconds_before = training["started_at"], training["seconds"]

    def _seconds(self) -> float:
        """Of the training so far; what a killed call did after its last save is lost, and so is its time."""
        return self._seconds_before + time.perf_counter() - self._clock

    def _finish(self, resumed_after_epoch: int) -> TrainingResult:
        checkpoint, report = self._session.final_checkpoint()
        seconds = self._seconds()
        if self._processes.is_main:
            result = {**report.as_dict(), "weights_epoch": checkpoint.epoch, "epochs": self._session.epoch}
            self._run.write_card(render_model_card(self._card(checkpoint, report, seconds)))
            save_checkpoint(checkpoint, self._run.checkpoint)
            self._run.write_facts(self._facts("finished", result=result))
        return TrainingResult(
            checkpoint_path=self._run.checkpoint,
            report=report,
            weights_epoch=checkpoint.epoch,
            epochs=self._session.epoch,
            resumed_after_epoch=resumed_after_epoch,
            parameters=self._session.parameter_count,
            device=str(self._device),
            skipped_rows=self._dataset.skipped_rows,
            seconds=seconds,
        )

    def _dump(self, error: TrainingDivergedError) -> TrainingDivergedError:
        """Saves what is needed to look into a step that went wrong, and says where it is."""
        ids = error.batch.ids.tolist()
        shown = ", ".join(map(str, ids[:_IDS_SHOWN])) + (
            f" and {len(ids) - _IDS_SHOWN} more" if len(ids) > _IDS_SHOWN else ""
        )
        # Every process has its own share of the batch; the others' are named by its rank.
        path = self._run.diverged
        if not self._processes.is_main:
            path = path.with_name(f"diverged-{self._processes.rank}.pt")
        content = {
            "message": str(error),
            "step": error.step,
            "ids": error.batch.ids,
            "inputs": error.batch.inputs,
            "labels": error.batch.labels,
            "state_dict": self._session.weights(),
            "training": self._session.trainer_state(),
            "recipe": self._recipe.as_dict(),
        }
        write_tensor_file(content, path)
        return TrainingDivergedError(
            f"{error} The batch (training samples {shown}: places in the training split, counted from 0) and the "
            f"weights before the step are in {path}.",
            step=error.step,
            batch=error.batch,
        )

    def _build_tracker(self, *, after_epoch: int) -> Tracker:
        return build_tracker(
            self._run.path,
            name=self._recipe.name,
            settings=self._recipe.as_dict(),
            after_epoch=after_epoch,
            wandb_project=self._recipe.tracking.wandb_project,
        )

    def _facts(self, state: str, *, result: Mapping[str, Any] | None) -> dict[str, Any]:
        """What run.json says."""
        session, dataset = self._session, self._dataset
        return {
            "format": "torchport-run",
            "format_version": _RUN_FORMAT_VERSION,
            "name": self._recipe.name,
            "state": state,
            "command": self._command(),
            "git_revision": session.git_revision,
            "versions": session.versions,
            "data": {
                "name": self._recipe.data.name,
                "digest": dataset.digest,
                "splits": _split_sizes(dataset),
                "skipped_rows": dataset.skipped_rows,
            },
            "device": str(self._device),
            "processes": self._processes.world_size,
            "precision": self._recipe.trainer.precision,
            "parameters": session.parameter_count,
            "started_at": self._started_at,
            "seconds": round(self._seconds(), 3),
            "result": result,
        }

    def _command(self) -> str:
        """What trains the same again: recipe.yaml is the recipe as resolved."""
        words = ["torchport", "train", str(self._run.recipe)]
        words += ["--nproc", str(self._processes.world_size)] if self._processes.world_size > 1 else []
        return shlex.join(words)

    def _card(self, checkpoint: Checkpoint, report: ClassificationReport, seconds: float) -> ModelCard:
        recipe, session = self._recipe, self._session
        optimizer = recipe.optimizer
        return ModelCard(
            name=recipe.name,
            task=str(checkpoint.signature["task"]),
            class_names=self._dataset.class_names,
            architecture=checkpoint.model["factory"],
            model_config=checkpoint.model["config"],
            parameters=session.parameter_count,
            data_name=recipe.data.name,
            splits=_split_sizes(self._dataset),
            data_digest=self._dataset.digest,
            skipped_rows=self._dataset.skipped_rows,
            recipe=recipe.as_dict(),
            epochs=session.epoch,
            weights_epoch=checkpoint.epoch,
            optimizer=f"AdamW, learning rate {optimizer.learning_rate:g}, weight decay {optimizer.weight_decay:g}",
            schedule=f"{optimizer.schedule.replace('_', ' ')}, warm-up {optimizer.warmup_fraction:.0%} of the steps",
            precision=recipe.trainer.precision,
            seed=recipe.seed,
            device=str(self._device),
            seconds=seconds,
            report=report,
            git_revision=session.git_revision,
            versions=session.versions,
            command=self._command(),
        )


def _split_sizes(dataset: Dataset) -> dict[str, int]:
    return {
        "train": len(dataset.train),
        "validation": len(dataset.validation),
        "held_out": len(dataset.held_out),
    }
