"""The folder of one training: checkpoint.pt, last.pt, recipe.yaml, metrics.jsonl."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from models.atomic import atomic_writer, remove_parts
from models.errors import RunFolderError


class RunFolder:
    """Where a training writes; every file appears whole or not at all.

    `checkpoint.pt` is written once, when the training ends, and holds its own recipe: until then it is the
    earlier training's. `last.pt`, `recipe.yaml` and `metrics.jsonl` belong to the training in progress.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.last = path / "last.pt"
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Creates the folder and keeps other trainings out of it for the length of the block.

        Raises:
            RunFolderError: when another training is in it, or it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise RunFolderError(
                f"The run folder {self.path} cannot be used ({error.strerror}); choose another with --out."
            ) from error
        try:
            self._lock(descriptor)
            remove_parts(self.path)
            yield
        finally:
            os.close(descriptor)

    def start(self, recipe: Mapping[str, Any], *, after_epoch: int) -> None:
        """Writes the recipe, and keeps the metrics of the epochs that a resumed training has behind it."""
        lines = [json.dumps(entry) for entry in self._read_metrics() if entry["epoch"] <= after_epoch]
        self._write(self.metrics, "".join(f"{line}\n" for line in lines))
        self._write(self.recipe, yaml.safe_dump(dict(recipe), sort_keys=False))

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """Adds one epoch's line."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(entry)) + "\n")
        except OSError as error:
            raise self._cannot_write(self.metrics, error) from error

    def _lock(self, descriptor: int) -> None:
        """Locks the folder itself: such a lock ends with its process, however it ends, and leaves no file."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"Another training is writing to {self.path}; wait for it, or choose another folder with --out."
            ) from error
        except OSError:
            # Some network file systems cannot lock a folder; a training there goes unguarded.
            return

    def _read_metrics(self) -> Iterator[dict[str, Any]]:
        """Yields the whole lines; the last one may be torn when its training was killed."""
        if not self.metrics.exists():
            return
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                return
            if isinstance(entry, dict) and isinstance(entry.get("epoch"), int):
                yield entry

    def _write(self, path: Path, text: str) -> None:
        try:
            with atomic_writer(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise self._cannot_write(path, error) from error

    def _cannot_write(self, path: Path, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"{path} cannot be written ({error.strerror}); free space or choose another folder with --out."
        )
