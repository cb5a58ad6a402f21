"""What run folders hold: lists and compares trainings, whatever state they are in."""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from models.errors import RunFolderError

_FORMAT = "torchport-run"
_FORMAT_VERSION = 1
_RUN_FILES = ("run.json", "recipe.yaml", "metrics.jsonl", "checkpoint.pt")


class RunState(StrEnum):
    """How far a training has come."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    RUNNING = "running"
    DAMAGED = "damaged"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """One run folder; None for what it does not tell."""

    path: str
    """Of the folder."""

    name: str
    """Of the run."""

    state: RunState
    """Damaged, if a file cannot be read; the other files are told of all the same."""

    problem: str | None = None
    """What is damaged, in one sentence."""

    started_at: str | None = None
    """ISO 8601, UTC."""

    epochs: int = 0
    """That are finished."""

    planned_epochs: int | None = None
    """That the recipe asks for."""

    split: str | None = None
    """What the three numbers below were measured on: the held-out split, or the latest epoch's validation split."""

    accuracy: float | None = None
    """Share of samples whose largest logit is the label's."""

    loss: float | None = None
    """Mean cross-entropy, in nats."""

    macro_f1: float | None = None
    """Mean F1 of the classes."""

    weights_epoch: int | None = None
    """Whose weights were kept."""

    seconds: float | None = None
    """Spent training."""

    parameters: int | None = None
    """Trainable numbers in the model."""

    device: str | None = None
    """Where it was trained."""

    precision: str | None = None
    """Of the training's arithmetic."""

    git_revision: str | None = None
    """Of torchport's source."""

    data_digest: str | None = None
    """Two runs with the same one saw the same data."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    """As resolved."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON form, without the recipe."""
        values = asdict(self)
        del values["recipe"]
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class RunComparison:
    """Some runs side by side."""

    runs: tuple[RunSummary, ...]
    """In the order asked for."""

    differences: Mapping[str, tuple[Any, ...]]
    """The recipe's keys that are not the same in all runs, with each run's value; None where it has none."""

    same_data: bool | None
    """Whether all saw the same samples; None if one does not tell."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "runs": [run.as_dict() for run in self.runs],
            "differences": {key: list(values) for key, values in self.differences.items()},
            "same_data": self.same_data,
        }


def list_runs(folder: Path) -> list[RunSummary]:
    """Reads the runs in a folder, the newest first; a folder that is a run itself gives that one.

    Raises:
        RunFolderError: when there is no such folder.
    """
    try:
        candidates = [folder] if _is_run(folder) else [path for path in folder.iterdir() if _is_run(path)]
    except OSError as error:
        raise RunFolderError(
            f"The runs in {folder} cannot be listed ({error.strerror}); "
            "train one with torchport train digits, or name another folder with --folder."
        ) from error
    summaries = [read_run(path) for path in sorted(candidates)]
    return sorted(summaries, key=lambda run: run.started_at or "", reverse=True)


def compare_runs(paths: Sequence[Path]) -> RunComparison:
    """Reads some runs and finds what is different in their recipes.

    Raises:
        RunFolderError: when one of them is no run folder.
    """
    runs = tuple(read_run(path) for path in paths)
    recipes = [dict(flatten(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    values = {key: tuple(recipe.get(key) for recipe in recipes) for key in keys}
    digests = {run.data_digest for run in runs}
    return RunComparison(
        runs=runs,
        differences={key: row for key, row in values.items() if any(value != row[0] for value in row)},
        same_data=None if None in digests else len(digests) == 1,
    )


def read_run(path: Path) -> RunSummary:
    """Reads one run folder, also a damaged one.

    Raises:
        RunFolderError: when there is no run at the path.
    """
    if not _is_run(path):
        raise RunFolderError(f"There is no run in {path}; see what there is with torchport runs.")
    reader = _Reader(path)
    run, recipe, epochs = reader.run(), reader.recipe(), reader.epochs()
    data, last = _section(run, "data"), epochs[-1] if epochs else {}
    result = _section(run, "result")
    split = "held_out" if result else "validation" if _section(last, "validation") else None
    measured = result or _section(last, "validation")
    planned = _integer(_section(recipe, "trainer").get("epochs"))
    done = _integer(last.get("epoch")) or 0
    return RunSummary(
        path=str(path),
        name=_string(run.get("name")) or _string(recipe.get("name")) or path.name,
        state=RunState.DAMAGED if reader.problems else _state(path, run, finished=0 < (planned or 0) <= done),
        problem=" ".join(reader.problems) or None,
        started_at=_started_at(path, run),
        epochs=done,
        planned_epochs=planned,
        split=split,
        accuracy=_number(measured.get("accuracy")),
        loss=_number(measured.get("loss")),
        macro_f1=_number(measured.get("macro_f1")),
        weights_epoch=_integer(result.get("weights_epoch")),
        seconds=_seconds(run, epochs),
        parameters=_integer(run.get("parameters")),
        device=_string(run.get("device")),
        precision=_string(run.get("precision")),
        git_revision=_string(run.get("git_revision")),
        data_digest=_string(data.get("digest")),
        recipe=recipe,
    )


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"trainer": {"epochs": 20}} -> ("trainer.epochs", 20)."""
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Reader:
    """Reads the files of a run folder, and collects what is wrong with them."""

    def __init__(self, path: Path) -> None:
        self.problems: list[str] = []
        self._path = path

    def run(self) -> dict[str, Any]:
        """The content of run.json, empty if there is none."""
        text = self._text("run.json")
        if text is None:
            return {}
        document = self._parse_json(text, "run.json is not JSON")
        if document is None:
            return {}
        if not isinstance(document, dict) or document.get("format", _FORMAT) != _FORMAT:
            self.problems.append("run.json is not the summary of a run.")
            return {}
        version = document.get("format_version", _FORMAT_VERSION)
        if version != _FORMAT_VERSION:
            self.problems.append(f"run.json has format version {version}, and this torchport reads {_FORMAT_VERSION}.")
            return {}
        return document

    def recipe(self) -> dict[str, Any]:
        """The content of recipe.yaml, empty if there is none."""
        text = self._text("recipe.yaml")
        if text is None:
            return {}
        try:
            document = yaml.safe_load(text)
            # Dates and the like become text, and numbers that JSON has no word for too.
            document = json.loads(json.dumps(document, default=str), parse_constant=str)
        except (yaml.YAMLError, ValueError, TypeError, RecursionError):
            self.problems.append("recipe.yaml is not YAML.")
            return {}
        if not isinstance(document, dict):
            self.problems.append("recipe.yaml is not a recipe.")
            return {}
        return document

    def epochs(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; the last one may be torn when its training was killed."""
        lines = (self._text("metrics.jsonl") or "").splitlines()
        found: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            torn = number == len(lines)
            entry = self._parse_json(line, None if torn else f"metrics.jsonl is not JSON in line {number}")
            if isinstance(entry, dict):
                found.append(entry)
            elif entry is not None:
                self.problems.append(f"metrics.jsonl is not an epoch in line {number}.")
        return found

    def _text(self, name: str) -> str | None:
        try:
            return (self._path / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            self.problems.append(f"{name} cannot be read ({error.strerror}).")
            return None

    def _parse_json(self, text: str, problem: str | None) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            if problem is not None:
                self.problems.append(f"{problem}.")
            return None


def _is_run(path: Path) -> bool:
    try:
        return path.is_dir() and any((path / name).exists() for name in _RUN_FILES)
    except PermissionError:
        return True  # and a damaged one: nothing in it can be read


def _state(path: Path, run: Mapping[str, Any], *, finished: bool) -> RunState:
    # A finished run is not probed: for a moment that would keep a training out of it.
    if run.get("state") == RunState.FINISHED:
        return RunState.FINISHED
    if _is_locked(path):
        return RunState.RUNNING
    # Without run.json: checkpoint.pt alone may be an earlier training's.
    whole = not run and finished and (path / "checkpoint.pt").exists()
    return RunState.FINISHED if whole else RunState.INTERRUPTED


def _is_locked(path: Path) -> bool:
    """Whether a training holds the lock of `RunFolder.exclusive`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(descriptor)
    return False


def _started_at(path: Path, run: Mapping[str, Any]) -> str | None:
    """From run.json; else when the oldest of the files was written."""
    started = run.get("started_at")
    try:
        if isinstance(started, str):
            moment = datetime.fromisoformat(started)
            return _iso(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
        if isinstance(started, int | float):
            return _iso(datetime.fromtimestamp(started, UTC))
    except (ValueError, OverflowError, OSError):
        pass
    times = []
    for name in _RUN_FILES:
        try:
            times.append((path / name).stat().st_mtime)
        except OSError:
            continue
    return _iso(datetime.fromtimestamp(min(times), UTC)) if times else None


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _seconds(run: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> float | None:
    told = _number(run.get("seconds"))
    if told is not None:
        return told
    spent = [seconds for entry in epochs if (seconds := _number(entry.get("seconds"))) is not None]
    return sum(spent) if spent else None


def _section(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    return value if isinstance(value, Mapping) else {}


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    """JSON has no word for NaN, but Python reads and writes one."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
