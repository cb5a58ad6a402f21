"""`torchport train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from models.recipe import Recipe
    from models.training import TrainingResult


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A built-in recipe (digits, tickets, sst2, ag_news, image_folder) or the path of a YAML file.",
            show_default=False,
        ),
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
        bool, typer.Option("--resume", help="Continue an interrupted run from where it was last saved.")
    ] = False,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes that train together, one core or GPU each at least.")
    ] = 1,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows and images that cannot be used, and count them.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Record where the time of some steps goes, into RUN/profile.")
    ] = False,
) -> dict[str, object]:
    """Train a recipe into a run folder."""
    # torch and scikit-learn take seconds to import, and `--help` needs neither.
    from models.recipe import load_recipe  # noqa: PLC0415

    skip = ["data.skip_bad_rows=true"] if skip_bad_rows else []
    loaded = load_recipe(recipe, [*(overrides or []), *skip])
    run_dir = out or Path("runs") / loaded.name
    result = _train(loaded, run_dir, resume=resume, nproc=nproc, profile=profile)
    _print_result(loaded, result)
    return {
        "ok": True,
        "run": str(run_dir),
        "checkpoint": str(result.checkpoint_path),
        "accuracy": result.accuracy,
        "macro_f1": result.report.macro_f1,
        "loss": result.loss,
        "samples": result.samples,
        "epochs": result.epochs,
        "weights_epoch": result.weights_epoch,
        "resumed_after_epoch": result.resumed_after_epoch,
        "parameters": result.parameters,
        "device": result.device,
        "skipped_rows": result.skipped_rows,
        "seconds": round(result.seconds, 3),
    }


def _train(recipe: "Recipe", run_dir: Path, *, resume: bool, nproc: int, profile: bool) -> "TrainingResult":
    if nproc > 1:
        from models.errors import TerminatedError  # noqa: PLC0415
        from models.launch import train_in_processes  # noqa: PLC0415

        try:
            return train_in_processes(recipe, run_dir, processes=nproc, resume=resume, profile=profile)
        except TerminatedError as error:
            # Its own exit code, by which schedulers tell an ended job from a failed one.
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
    from models.progress import training_progress  # noqa: PLC0415
    from models.training import train as train_here  # noqa: PLC0415

    with training_progress(recipe.name) as observer:
        return train_here(recipe, run_dir, resume=resume, profile=profile, observer=observer)


def _print_result(recipe: "Recipe", result: "TrainingResult") -> None:
    table = Table(show_header=False, title=f"Trained {recipe.name}", title_justify="left")
    table.add_row("held-out accuracy", f"{result.accuracy:.4f} of {result.samples} samples")
    table.add_row("macro F1", f"{result.report.macro_f1:.4f}")
    stopped = result.epochs < recipe.trainer.epochs
    table.add_row(
        "epochs", f"{result.epochs}{' (stopped early)' if stopped else ''}, weights of epoch {result.weights_epoch}"
    )
    if result.resumed_after_epoch:
        table.add_row("resumed", f"after epoch {result.resumed_after_epoch}")
    if result.skipped_rows:
        table.add_row("skipped rows", f"{result.skipped_rows:,}")
    table.add_row("parameters", f"{result.parameters:,}")
    table.add_row("time", f"{result.seconds:.1f} s on {result.device}")
    table.add_row("checkpoint", str(result.checkpoint_path))
    table.add_row("model card", str(result.checkpoint_path.with_name("model_card.md")))
    Console().print(table)
