"""`torchport train --nproc N`: one training in several processes, started by torchrun's launcher."""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from models.errors import LaunchError, TerminatedError
from models.progress import training_progress
from models.recipe import Recipe
from models.training import Observer, TrainingResult, train

# The launcher logs what every process printed already, in dozens of lines.
_NOISY_LOGGERS = (
    "torch.distributed.elastic",
    "torch.distributed.launcher",
    "torch.distributed.run",
    "torch.multiprocessing.spawn",
)
_LAUNCHER_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def train_in_processes(
    recipe: Recipe, run_dir: Path, *, processes: int, resume: bool = False, profile: bool = False
) -> TrainingResult:
    """Trains a recipe in several processes of this machine; each shows progress as a single one would.

    Args:
        recipe: what to train.
        run_dir: the run folder.
        processes: how many; each computes its share of every batch.
        resume: see `models.training.train`.
        profile: see `models.training.train`.

    Raises:
        LaunchError: with the sentence of the process that failed first.
        KeyboardInterrupt: on SIGINT, as one process would raise it.
        TerminatedError: on another signal that ends it, such as SIGTERM.
    """
    with tempfile.TemporaryDirectory(prefix="torchport-train-") as folder, _quiet_launcher(), _signal_handlers_kept():
        report = Path(folder) / "error"
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=recipe.name,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
        )
        try:
            results = elastic_launch(config, _train_one)(recipe.as_dict(), str(run_dir), resume, profile, str(report))
        except ChildFailedError as error:
            sentence = report.read_text(encoding="utf-8") if report.exists() else _describe(error)
            raise LaunchError(sentence) from error
        except SignalException as error:  # the launcher has ended the processes
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from error
            raise TerminatedError(
                f"The training was ended by {error.sigval.name}; continue it with --resume.",
                signal_number=error.sigval,
            ) from error
    result: TrainingResult = results[0]
    return result


def _train_one(recipe: dict[str, Any], run_dir: str, resume: bool, profile: bool, report: str) -> TrainingResult:
    """What each process does."""
    signal.signal(signal.SIGINT, _interrupt_once)
    parsed = Recipe.model_validate(recipe)
    try:
        if int(os.environ["RANK"]):
            return train(parsed, Path(run_dir), resume=resume, profile=profile, observer=Observer())
        with training_progress(parsed.name) as observer:
            return train(parsed, Path(run_dir), resume=resume, profile=profile, observer=observer)
    except KeyboardInterrupt:
        # Everything is closed; an ordinary exit, with the other processes gone, may print lines of torch's own.
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        if getattr(error, "user_facing", False):
            _report_first(Path(report), str(error))
            raise SystemExit(1) from error  # without a traceback; the others are then ended
        raise


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Ctrl-C comes twice, from the terminal and from the launcher; the second must not cut short what the first closes.

    The launcher kills a process that has not ended 30 s later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _report_first(path: Path, sentence: str) -> None:
    """Leaves the sentence for the launcher, unless another process was first."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(sentence, encoding="utf-8")
    try:
        os.link(part, path)  # fails when it exists; never half-written
    except FileExistsError:
        part.unlink()


def _describe(error: ChildFailedError) -> str:
    rank, failure = error.get_first_failure()
    return (
        f"Training process {rank} ended with exit code {failure.exitcode}; what it printed above says why. "
        "Train with --nproc 1 to see it alone."
    )


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    # It warns when it chooses the number of threads itself; the recipe sets them in each process.
    unset = "OMP_NUM_THREADS" not in os.environ
    if unset:
        os.environ["OMP_NUM_THREADS"] = "1"
    # With those below them, each of which the launcher has given a level of its own.
    below = [name for name in logging.root.manager.loggerDict if name.startswith(_NOISY_LOGGERS)]
    levels = {name: logging.getLogger(name).level for name in (*_NOISY_LOGGERS, *below)}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if unset:
            del os.environ["OMP_NUM_THREADS"]


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Puts back what handles signals: the launcher leaves handlers of its own behind."""
    if threading.current_thread() is not threading.main_thread():  # it then sets none, and nobody else may
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _LAUNCHER_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
