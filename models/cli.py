"""`torchport train`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def train(
    recipe: Annotated[
        str, typer.Argument(help="A built-in recipe (digits) or the path of a YAML file.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="Change a key of the recipe, such as trainer.epochs=5; repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder; an earlier run in it is replaced.", show_default="runs/RECIPE"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its last finished epoch.")
    ] = False,
) -> dict[str, object]:
    """Train a recipe into a run folder."""
    # torch and scikit-learn take seconds to import, and `--help` needs neither.
    from models.recipe import load_recipe  # noqa: PLC0415
    from models.session import EpochReport  # noqa: PLC0415
    from models.training import train as run_training  # noqa: PLC0415

    loaded = load_recipe(recipe, overrides or [])
    run_dir = out or Path("runs") / loaded.name
    with _progress() as progress:
        task = progress.add_task(loaded.name, total=loaded.trainer.epochs, loss="-", accuracy="-")

        def show(report: EpochReport) -> None:
            progress.update(
                task,
                completed=report.epoch,
                loss=f"{report.train.loss:.4f}",
                accuracy=f"{report.validation.accuracy:.4f}",
            )

        result = run_training(loaded, run_dir, resume=resume, on_epoch=show)

    table = Table(show_header=False, title=f"Trained {loaded.name}", title_justify="left")
    table.add_row("held-out accuracy", f"{result.accuracy:.4f} of {result.samples} samples")
    table.add_row("epochs", f"{loaded.trainer.epochs}, the best was {result.best_epoch}")
    if result.resumed_after_epoch:
        table.add_row("resumed", f"after epoch {result.resumed_after_epoch}")
    table.add_row("parameters", f"{result.parameters:,}")
    table.add_row("time", f"{result.seconds:.1f} s on {result.device}")
    table.add_row("checkpoint", str(result.checkpoint_path))
    Console().print(table)
    return {
        "ok": True,
        "run": str(run_dir),
        "checkpoint": str(result.checkpoint_path),
        "accuracy": result.accuracy,
        "loss": result.loss,
        "samples": result.samples,
        "best_epoch": result.best_epoch,
        "resumed_after_epoch": result.resumed_after_epoch,
        "parameters": result.parameters,
        "device": result.device,
        "seconds": round(result.seconds, 3),
    }


def _progress() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("validation accuracy {task.fields[accuracy]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
