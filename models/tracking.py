"""Where the numbers of a training go to be looked at: TensorBoard, and Weights & Biases if asked for."""

import importlib
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import yaml

from models.atomic import atomic_writer
from models.errors import TrackingError

_OFFLINE_MODES = ("offline", "dryrun")
_INIT_TIMEOUT_S = 30
_FINISH_TIMEOUT_S = 60


class MetricsWriter(Protocol):
    """One place where metrics go."""

    def write(self, scalars: Mapping[str, float], epoch: int) -> None:
        """Records an epoch, and makes it visible at once.

        Args:
            scalars: by name, such as "train/loss".
            epoch: from 1; each once, and rising.

        Raises:
            TrackingError: when it cannot be recorded.
        """
        ...

    def close(self, *, failed: bool) -> None:
        """Ends the recording.

        Args:
            failed: whether the training ended with an error.

        Raises:
            TrackingError: when it cannot be ended cleanly.
        """
        ...


class TensorBoardWriter:
    """Writes event files for `tensorboard --logdir`.

    Args:
        folder: of one run alone. Event files of an earlier training are removed, unless it is resumed.
        settings: shown as text.
        after_epoch: the epoch that is resumed after, 0 for a training from the start. What an interrupted training
            recorded beyond it is hidden, so that no curve has two values for an epoch.

    Raises:
        TrackingError: when the folder cannot be written.
    """

    def __init__(self, folder: Path, *, settings: Mapping[str, Any], after_epoch: int = 0) -> None:
        self._folder = folder
        tensorboard = _import("torch.utils.tensorboard")
        with self._writing():
            if not after_epoch:
                for old in folder.glob("events.out.tfevents.*"):
                    old.unlink()
            self._writer = tensorboard.SummaryWriter(str(folder), purge_step=after_epoch + 1 if after_epoch else None)
            if not after_epoch:
                text = yaml.safe_dump(dict(settings), sort_keys=False)
                self._writer.add_text("recipe", f"```yaml\n{text}```", global_step=0)
            self._writer.flush()

    def write(self, scalars: Mapping[str, float], epoch: int) -> None:
        """Records an epoch; see `MetricsWriter`."""
        with self._writing():
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, global_step=epoch)
            self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Closes the event file."""
        with self._writing():
            self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrackingError(
                f"{self._folder} cannot be written ({error.strerror}); free space or choose another folder with --out."
            ) from error


class WandbWriter:
    """Records a run in Weights & Biases; with WANDB_MODE=offline into RUN/wandb, for `wandb sync` later.

    It never asks for a login, and waits for the network no longer than half a minute at the start and a minute at the
    end: what was not uploaded stays in RUN/wandb.

    Args:
        run_dir: the run folder.
        project: in Weights & Biases.
        name: of the run there.
        settings: the run's config there.
        after_epoch: the epoch that is resumed after, 0 for a training from the start. A resumed training continues
            the same run.

    Raises:
        TrackingError: without the wandb package, without an API key unless offline, and when it cannot start.
    """

    def __init__(
        self, run_dir: Path, *, project: str, name: str, settings: Mapping[str, Any], after_epoch: int = 0
    ) -> None:
        self._wandb = _import_wandb()
        self._folder = run_dir / "wandb"
        with self._talking():
            mode = self._wandb.setup(self._wandb.Settings(silent=True)).settings.mode
            offline, disabled = mode in _OFFLINE_MODES, mode == "disabled"
            if not offline and not disabled and not self._wandb.login(prompt=False, verify=False):
                raise TrackingError(
                    "Weights & Biases has no API key on this machine; run wandb login, set WANDB_API_KEY, "
                    "or record offline with WANDB_MODE=offline."
                )
            self._run = self._wandb.init(
                project=project,
                name=name,
                id=None if disabled else self._run_id(resumed=after_epoch > 0),
                # Offline it has nobody to ask whether the run exists, and warns.
                resume="allow" if after_epoch and not offline else None,
                dir=str(run_dir),
                config=dict(settings),
                reinit="create_new",
                settings=self._wandb.Settings(
                    silent=True,
                    console="off",
                    # The run folder's own provenance says which code ran.
                    disable_git=True,
                    save_code=False,
                    init_timeout=_INIT_TIMEOUT_S,
                    finish_timeout=_FINISH_TIMEOUT_S,
                ),
            )

    @property
    def url(self) -> str | None:
        """Where to look at the run; None offline."""
        url: str | None = self._run.url
        return url

    def write(self, scalars: Mapping[str, float], epoch: int) -> None:
        """Records an epoch; see `MetricsWriter`."""
        with self._talking():
            self._run.log(dict(scalars), step=epoch, commit=True)

    def close(self, *, failed: bool) -> None:
        """Ends the run, and waits until it is uploaded, for a minute at most."""
        with self._talking():
            self._run.finish(exit_code=1 if failed else 0)

    def _run_id(self, *, resumed: bool) -> str:
        """The run's identity there, kept in the run folder so that a resumed training finds it."""
        path = self._folder / "run_id"
        if resumed and path.exists():
            return path.read_text(encoding="utf-8").strip()
        self._folder.mkdir(parents=True, exist_ok=True)
        run_id = secrets.token_hex(4)
        with atomic_writer(path) as file:
            file.write(f"{run_id}\n".encode())
        return run_id

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrackingError(
                f"{self._folder} cannot be written ({error.strerror}); free space or choose another folder with --out."
            ) from error
        except self._wandb.errors.Error as error:
            words = " ".join(str(error).split())
            raise TrackingError(
                f"Weights & Biases cannot be used ({words}); mend that, or record offline with WANDB_MODE=offline."
            ) from error


class Tracker:
    """Passes what it is told on to all writers; a context manager that closes them, also after an error.

    In a training of several processes, rank 0 alone has writers.
    """

    def __init__(self, writers: Sequence[MetricsWriter] = ()) -> None:
        self._writers = tuple(writers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            close_all(self._writers, failed=kind is not None)
        except TrackingError:
            # The error of the training says more.
            if kind is None:
                raise

    def write(self, scalars: Mapping[str, float], epoch: int) -> None:
        """Records an epoch with every writer.

        Args:
            scalars: by name, such as "train/loss".
            epoch: from 1.

        Raises:
            TrackingError: when one cannot.
        """
        for writer in self._writers:
            writer.write(scalars, epoch)


def build_tracker(
    run_dir: Path,
    *,
    name: str,
    settings: Mapping[str, Any],
    after_epoch: int = 0,
    wandb_project: str | None = None,
) -> Tracker:
    """Tracks a run with TensorBoard, in RUN/tensorboard, and with Weights & Biases if a project is named.

    Args:
        run_dir: the run folder.
        name: of the run.
        settings: the resolved recipe.
        after_epoch: the epoch that is resumed after, 0 for a training from the start.
        wandb_project: in Weights & Biases; None leaves it out.

    Raises:
        TrackingError: when one of them cannot be used.
    """
    writers: list[MetricsWriter] = []
    # The one that can refuse comes first: nothing of an earlier training is removed then.
    if wandb_project is not None:
        writers.append(
            WandbWriter(run_dir, project=wandb_project, name=name, settings=settings, after_epoch=after_epoch)
        )
    try:
        writers.append(TensorBoardWriter(run_dir / "tensorboard", settings=settings, after_epoch=after_epoch))
    except TrackingError:
        close_all(writers, failed=True)
        raise
    return Tracker(writers)


def close_all(writers: Sequence[MetricsWriter], *, failed: bool) -> None:
    """Closes every writer, even when some of them fail, and then raises the error of one that did."""
    with ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close, failed=failed)


def scalars(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in a nested document: {"train": {"loss": 0.5}} gives {"train/loss": 0.5}.

    Lists, such as a confusion matrix, and the number of the epoch are left out.
    """
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and prefix + key != "epoch":
            found[prefix + key] = float(value)
    return found


def _import_wandb() -> Any:
    try:
        wandb = _import("wandb")
    except ImportError as error:
        raise _without_wandb() from error
    # Where it is not installed, a folder named wandb beside the caller is imported in its place.
    if not hasattr(wandb, "init"):
        raise _without_wandb()
    return wandb


def _without_wandb() -> TrackingError:
    return TrackingError(
        "Weights & Biases is not installed; install it with pip install 'torchport[wandb]', or train without it."
    )


def _import(name: str) -> Any:
    """Imports a large library that may use something deprecated: that is its makers' business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return importlib.import_module(name)
