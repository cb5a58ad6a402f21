"""The folder of one training: its checkpoints, recipe, metrics, and what is known about it."""

import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from models.atomic import atomic_writer, remove_parts
from models.errors import RunFolderError

_LOCK_RETRY_S = 0.2


class RunFolder:
    """Where a training writes; every file appears whole or not at all.

    `checkpoint.pt` and `model_card.md` are written once, when the training ends, and the checkpoint holds its own
    recipe: until then they are the earlier training's. All else belongs to the training in progress: `last.pt`, which
    it can be resumed from; `best.pt`, the best epoch so far; `epoch-N.pt`, the epochs that are kept; `recipe.yaml`,
    `run.json`, `metrics.jsonl`, and the files of the data set, such as `tokenizer.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.diverged = path / "diverged.pt"
        self.card = path / "model_card.md"
        self.facts = path / "run.json"
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"

    @contextmanager
    def exclusive(self, *, needed: bool = True) -> Iterator[None]:
        """Creates the folder and keeps other trainings out of it for the length of the block.

        Args:
            needed: whether to do so; of several processes of one training, the first one does.

        Raises:
            RunFolderError: when another training is in it, or it cannot be created.
        """
        if not needed:
            yield
            return
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

    def start(self, recipe: Mapping[str, Any], files: Mapping[str, bytes], *, after_epoch: int | None) -> None:
        """Writes what is known from the start; of an earlier training, only what is resumed stays.

        Args:
            recipe: as resolved.
            files: of the data set, by name.
            after_epoch: epochs that a resumed training has behind it, whose metrics stay; None for one from the start.
        """
        if after_epoch is None:
            # First: as long as it is there, --resume would continue the earlier training.
            self._remove(self.last)
        for path in (self.diverged, *self.path.glob("diverged-*.pt")):
            self._remove(path)
        if after_epoch is None:
            for path in (self.best, *self.path.glob("epoch-*.pt")):
                self._remove(path)
        lines = [json.dumps(entry) for entry in self._read_metrics() if entry["epoch"] <= (after_epoch or 0)]
        self._write(self.metrics, "".join(f"{line}\n" for line in lines))
        self._write(self.recipe, yaml.safe_dump(dict(recipe), sort_keys=False))
        for name, content in files.items():
            self._write(self.path / name, content.decode())

    def epoch(self, number: int) -> Path:
        """The checkpoint of an epoch that is kept."""
        return self.path / f"epoch-{number}.pt"

    def keep_only(self, epochs: Collection[int]) -> None:
        """Removes the checkpoints of all other epochs."""
        wanted = {self.epoch(number) for number in epochs}
        for path in self.path.glob("epoch-*.pt"):
            if path not in wanted:
                self._remove(path)

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Writes run.json, which `torchport runs` reads."""
        self._write(self.facts, json.dumps(dict(facts), indent=1) + "\n")

    def write_card(self, text: str) -> None:
        """Writes the model card."""
        self._write(self.card, text)

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
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # `torchport runs` holds the lock for an instant, to see whether anybody else does.
                time.sleep(_LOCK_RETRY_S)
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

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._cannot_write(path, error) from error

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
