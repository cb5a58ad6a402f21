"""`--profile`: where the time of some training steps goes, as a trace file and a table in the run folder."""

import os
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from models.atomic import atomic_writer, remove_parts
from models.errors import RunFolderError

_TABLE_ROWS = 50


class Profiler(Protocol):
    """Told of every training step; a context manager around the training."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

    def step(self) -> None:
        """Ends a training step."""
        ...


class NoProfiler:
    """The profiler of a training without `--profile`: does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        return None

    def step(self) -> None:
        """Does nothing."""


class StepProfiler:
    """Records some steps of a training and writes `profile/trace.json` and `profile/table.txt`.

    The trace opens in https://ui.perfetto.dev or chrome://tracing. Both files appear whole, as soon as the last step
    is recorded; from then on profiling costs nothing. A training that ends earlier gets what was recorded, if that is
    at least one step; one that fails before gets nothing, and files of an earlier profile stay.

    Args:
        run_dir: the run folder.
        device: where the training computes.
        wait: steps that are skipped first.
        warmup: steps that are recorded and thrown away next, since starting to record slows the first of them.
        active: steps that are kept after those.
    """

    def __init__(self, run_dir: Path, *, device: torch.device, wait: int = 2, warmup: int = 2, active: int = 6) -> None:
        self.trace = run_dir / "profile" / "trace.json"
        """Events in Chrome's format."""
        self.table = run_dir / "profile" / "table.txt"
        """Operators, the most expensive first."""
        self.written = False
        """Whether both files are from this training."""
        self._sort_by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        self._steps = 0
        self._first = wait + warmup
        self._last = wait + warmup + active
        self._profile: profile | None = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])],
            schedule=schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            record_shapes=True,
            profile_memory=True,
            # One cycle is all there is; without this torch warns that it forgets earlier ones.
            acc_events=True,
        )

    def __enter__(self) -> Self:
        """Starts to count steps.

        Raises:
            RunFolderError: when the files will not be writable.
        """
        try:
            self.trace.parent.mkdir(parents=True, exist_ok=True)
            remove_parts(self.trace.parent)
        except OSError as error:
            raise self._cannot_write(error) from error
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """Writes what was recorded, unless the block failed.

        Raises:
            RunFolderError: when the files cannot be written.
        """
        if self._profile is not None:
            self._finish(write=error is None and self._steps > self._first)

    def step(self) -> None:
        """Ends a training step.

        Raises:
            RunFolderError: when the files cannot be written.
        """
        if self._profile is None:
            return
        self._steps += 1
        if self._steps == self._last:
            self._finish(write=True)
        else:
            self._profile.step()

    def _finish(self, *, write: bool) -> None:
        finished, self._profile = self._profile, None
        if finished is None:
            return
        finished.stop()
        if write:
            try:
                self._write(finished)
            except OSError as error:
                raise self._cannot_write(error) from error
            self.written = True

    def _write(self, finished: profile) -> None:
        # torch writes to a path of its own, and only to one that ends as it expects.
        part = self.trace.with_name(f".{self.trace.name}.{os.getpid()}.part")
        try:
            finished.export_chrome_trace(str(part))
            part.replace(self.trace)
        finally:
            part.unlink(missing_ok=True)
        table = finished.key_averages().table(sort_by=self._sort_by, row_limit=_TABLE_ROWS)
        with atomic_writer(self.table) as file:
            file.write(table.encode())

    def _cannot_write(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"The profile {self.trace.parent} cannot be written ({error.strerror}); "
            "free space, choose another folder with --out, or leave out --profile."
        )


def build_profiler(run_dir: Path, *, device: torch.device, enabled: bool) -> Profiler:
    """The profiler that `--profile` asks for, or one that does nothing."""
    return StepProfiler(run_dir, device=device) if enabled else NoProfiler()
