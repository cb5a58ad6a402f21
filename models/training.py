"""From a recipe to a run folder."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.device import resolve_device
from models.digits import load_digits_dataset
from models.errors import CheckpointFormatError, ResumeError
from models.recipe import Recipe
from models.reproducibility import reproducible
from models.run_folder import RunFolder
from models.session import EpochReport, Session


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """A finished training."""

    checkpoint_path: Path
    """The best epoch's weights."""

    accuracy: float
    """On the held-out split."""

    loss: float
    """On the held-out split, in nats."""

    samples: int
    """In the held-out split."""

    best_epoch: int
    """The epoch whose weights were kept."""

    resumed_after_epoch: int
    """0 for a training from the start."""

    parameters: int
    """Trainable numbers in the model."""

    device: str
    """Where it was trained."""

    seconds: float
    """All of this call."""


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochReport], None] = lambda _: None,
) -> TrainingResult:
    """Trains a recipe; the same recipe gives a byte-identical checkpoint.pt on the same machine.

    Args:
        recipe: what to train.
        run_dir: the run folder, created if absent. An earlier training in it is replaced file by file, each in
            one step, and its checkpoint.pt last: a kill at any moment leaves the old one or the new one.
        resume: continue the training that last.pt in `run_dir` holds, to the bits it would have ended with.
            Without a last.pt it starts from the beginning, so that a restarted job can always say `--resume`.
        on_epoch: called after each epoch, once it can be resumed from.

    Raises:
        ModelsError: see `models.errors`.
    """
    started = time.perf_counter()
    device = resolve_device(recipe.trainer.device)
    run = RunFolder(run_dir)
    with run.exclusive(), reproducible(recipe.seed, device, threads=recipe.trainer.threads):
        dataset = load_digits_dataset(
            seed=recipe.seed,
            held_out_fraction=recipe.data.held_out_fraction,
            validation_fraction=recipe.data.validation_fraction,
        )
        session = Session(recipe, dataset, device)
        if resume and run.last.exists():
            session.restore(_load_resumable(run, recipe), run.last)
        resumed_after_epoch = session.epoch
        run.start(recipe.as_dict(), after_epoch=resumed_after_epoch)
        while session.epoch < recipe.trainer.epochs:
            report = session.run_epoch()
            # Metrics first: a kill in between leaves a line too many, which a resume removes.
            run.append_metrics(dataclasses.asdict(report))
            save_checkpoint(session.resumable_checkpoint(report), run.last)
            on_epoch(report)
        checkpoint = session.final_checkpoint()
        save_checkpoint(checkpoint, run.checkpoint)
    return TrainingResult(
        checkpoint_path=run.checkpoint,
        **checkpoint.metrics,
        best_epoch=checkpoint.epoch,
        resumed_after_epoch=resumed_after_epoch,
        parameters=session.parameter_count,
        device=str(device),
        seconds=time.perf_counter() - started,
    )


def _load_resumable(run: RunFolder, recipe: Recipe) -> Checkpoint:
    """Loads last.pt, if it belongs to this recipe.

    Raises:
        ResumeError: naming what differs.
        CheckpointError: when last.pt cannot be read or holds no training state.
    """
    checkpoint = load_checkpoint(run.last)
    before, now = dict(_flatten(checkpoint.recipe)), dict(_flatten(recipe.as_dict()))
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            raise ResumeError(
                f"{run.path} was started with {key} = {before.get(key)}, and the recipe now says {now.get(key)}; "
                "resume with the same recipe, or train into another folder with --out."
            )
    if checkpoint.training is None:
        raise CheckpointFormatError(f"{run.last} holds no training state; train again without --resume.")
    return checkpoint


def _flatten(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"trainer": {"epochs": 20}} -> ("trainer.epochs", 20)."""
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
