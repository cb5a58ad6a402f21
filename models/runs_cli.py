"""`torchport runs`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from models.runs import RunComparison, RunSummary

_NONE = "-"


def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="Runs to compare, by name or path; none lists all.", show_default=False),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the runs are.")] = Path("runs"),
) -> dict[str, Any]:
    """List the runs in a folder, the newest first, or compare two or more of them."""
    from models.runs import compare_runs, list_runs  # noqa: PLC0415 - `--help` needs no YAML

    console = Console()
    if names and len(names) > 1:
        comparison = compare_runs([_find(name, folder) for name in names])
        _print_comparison(console, comparison)
        return {"ok": True, **comparison.as_dict()}
    found = list_runs(_find(names[0], folder) if names else folder)
    _print_list(console, found)
    return {"ok": True, "runs": [run.as_dict() for run in found]}


def _find(name: str, folder: Path) -> Path:
    """A run in the folder, or else any path."""
    inside = folder / name
    return inside if inside.is_dir() else Path(name)


def _print_list(console: Console, found: Sequence[RunSummary]) -> None:
    if not found:
        console.print("No runs here yet; train one with torchport train digits.")
        return
    # On a narrow terminal names are folded: half a number is worse than a name in two lines.
    numbers = ("state", "epochs", "accuracy", "loss", "F1", "time", "source", "data")
    columns = [Column("run", overflow="fold"), *(Column(name, no_wrap=True) for name in numbers)]
    table = _table("Runs, the newest first", *columns)
    for run in found:
        # Numbers of the validation split chose the epoch: they must not pass for the held-out ones.
        mark = "*" if run.split == "validation" else ""
        table.add_row(
            _plain(Path(run.path).name),
            run.state.value,
            _epochs(run),
            _digits(run.accuracy, mark),
            _digits(run.loss, mark),
            _digits(run.macro_f1, mark),
            _time(run),
            _plain(_short(run.git_revision).replace("-dirty", "+")),
            _plain(_short(run.data_digest)),
        )
    console.print(table)
    if any(run.split == "validation" for run in found):
        console.print("* on the validation split, not on the held-out one")
    if any((run.git_revision or "").endswith("-dirty") for run in found):
        console.print("+ with uncommitted changes")
    _print_problems(console, found)


def _print_comparison(console: Console, comparison: RunComparison) -> None:
    names: list[str | Text] = ["", *(_plain(Path(run.path).name) for run in comparison.runs)]
    metrics = _table("Results", *(Column(name, overflow="fold") for name in names))
    for label, cells in (
        ("state", [run.state.value for run in comparison.runs]),
        ("measured on", [_split(run) for run in comparison.runs]),
        ("accuracy", [_digits(run.accuracy) for run in comparison.runs]),
        ("loss", [_digits(run.loss) for run in comparison.runs]),
        ("macro F1", [_digits(run.macro_f1) for run in comparison.runs]),
        ("epochs", [_epochs(run) for run in comparison.runs]),
        ("weights of epoch", [_value(run.weights_epoch) for run in comparison.runs]),
        ("parameters", [_NONE if run.parameters is None else f"{run.parameters:,}" for run in comparison.runs]),
        ("time", [_time(run) for run in comparison.runs]),
        ("started", [_moment(run) for run in comparison.runs]),
        ("device", [_value(run.device) for run in comparison.runs]),
        ("precision", [_value(run.precision) for run in comparison.runs]),
        ("source", [_short(run.git_revision) for run in comparison.runs]),
        ("data", [_short(run.data_digest) for run in comparison.runs]),
    ):
        metrics.add_row(label, *(_plain(cell) for cell in cells))
    console.print(metrics)
    if comparison.differences:
        recipes = _table("Recipe, where it differs", *(Column(name, overflow="fold") for name in names))
        for key, values in comparison.differences.items():
            recipes.add_row(_plain(key), *(_plain(_value(value)) for value in values))
        console.print(recipes)
    else:
        console.print("The recipes are the same.")
    if comparison.same_data is False:
        console.print("They saw different data: their results do not compare.")
    _print_problems(console, comparison.runs)


def _print_problems(console: Console, found: Sequence[RunSummary]) -> None:
    for run in found:
        if run.problem is not None:
            console.print(_plain(f"{run.path} is damaged: {run.problem}"))


def _table(title: str, *columns: Column) -> Table:
    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)


def _plain(text: str) -> Text:
    """Names come from folders and files: they are no markup, and may hold bytes that are no text."""
    return Text(" ".join(text.encode("utf-8", errors="replace").decode().split()))


def _epochs(run: RunSummary) -> str:
    return f"{run.epochs}/{_NONE if run.planned_epochs is None else run.planned_epochs}"


def _digits(value: float | None, mark: str = "") -> str:
    return _NONE if value is None else f"{value:.4f}{mark}"


def _split(run: RunSummary) -> str:
    return _NONE if run.split is None else run.split.replace("_", "-")


def _time(run: RunSummary) -> str:
    return _NONE if run.seconds is None else f"{run.seconds:,.0f} s"


def _moment(run: RunSummary) -> str:
    if run.started_at is None:
        return _NONE
    return datetime.fromisoformat(run.started_at).astimezone().strftime("%Y-%m-%d %H:%M")


def _short(digest: str | None) -> str:
    """Enough of a digest to tell two apart; "-dirty" stays visible."""
    if digest is None:
        return _NONE
    head, dash, mark = digest.partition("-")
    return head[:7] + dash + mark


def _value(value: Any) -> str:
    return _NONE if value is None else str(value)
