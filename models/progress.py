"""What a person sees while a training runs: bars for the epochs and for the steps of the present one."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.session import EpochReport
from models.trainer import StepMetrics
from models.training import Observer


@contextmanager
def training_progress(name: str) -> Iterator[Observer]:
    """Shows a training on stderr for the length of the block; elsewhere than on a terminal, a line an epoch.

    Args:
        name: of the recipe.
    """
    console = Console(stderr=True)
    with Progress(
        TextColumn("[bold]{task.description}"),
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(name, total=None, figures="")
        validation = ""

        def on_start(total_steps: int, steps_done: int) -> None:
            progress.update(task, total=total_steps, completed=steps_done)

        def on_step(metrics: StepMetrics) -> None:
            progress.update(task, completed=metrics.step, figures=f"loss {metrics.loss:.4f}{validation}")

        def on_epoch(report: EpochReport) -> None:
            nonlocal validation
            validation = f" · validation accuracy {report.validation.accuracy:.4f}"
            if not console.is_terminal:
                console.print(
                    f"epoch {report.epoch}: loss {report.train.loss:.4f}, validation accuracy "
                    f"{report.validation.accuracy:.4f}, {report.seconds:.1f} s",
                    highlight=False,
                )

        yield Observer(on_start=on_start, on_step=on_step, on_epoch=on_epoch)
