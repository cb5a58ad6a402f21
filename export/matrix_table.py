"""The matrix in a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.matrix_entries import FAILED, PASSED, REFUSED, Entry, Matrix
from export.matrix_format import megabytes, milliseconds, rate, share, small, times
from export.ranking import speed_of, times_as_fast

_COLOURS = {PASSED: "green", FAILED: "red", REFUSED: "yellow"}


def print_matrix(matrix: Matrix, console: Console) -> None:
    """Print what was found: all combinations, their times, why some did not pass, and which is the fastest."""
    console.print(_overview(matrix))
    if matrix.measured:
        console.print(_times(matrix))
    for entry in matrix.entries:
        if entry.reason is not None:
            console.print(
                f"[{_COLOURS[entry.status]}]{entry.name} {entry.status}[/]: {escape(entry.reason)}", soft_wrap=True
            )
    for words in matrix.loosened:
        console.print(f"[yellow]{escape(words)}[/]", soft_wrap=True)
    if not matrix.prepared.requests:
        console.print(
            "No evaluation data: only random inputs were compared. Give --eval DATA to check the task itself."
        )
    if matrix.winner is None:
        console.print("[bold red]nothing passed every gate[/]")
    else:
        console.print(
            f"[bold green]{matrix.winner.name}[/]: {rate(matrix.winner.samples_per_s)} samples/s; "
            f"{escape(matrix.winner.reason)}",
            soft_wrap=True,
        )


def _overview(matrix: Matrix) -> Table:
    title = f"{matrix.name} on {matrix.device}, one thread"
    if matrix.baseline is not None:
        title += f"; speed: times as fast as {matrix.baseline}"
    table = _new_table(title, "MB", "RSS", "diff.", "noise", "top-1", "accuracy", "speed")
    for entry in matrix.entries:
        speed = matrix.advantage(entry, matrix.entry(matrix.baseline or ""))
        table.add_row(
            entry.name,
            f"[{_COLOURS[entry.status]}]{result_of(entry)}",
            megabytes(entry.bytes),
            megabytes(None if entry.memory is None else entry.memory.peak_bytes),
            small(entry.difference),
            small(None if entry.noise is None else entry.noise.measured),
            share(entry.agreement),
            share(entry.accuracy),
            times(None if speed is None else speed.factor),
        )
    return table


def _times(matrix: Matrix) -> Table:
    """Milliseconds a batch, samples a second, and how many times as fast as the fp32 artifact of the same format."""
    shapes = [f"batch {shape.batch}" + "".join(f"\n{k} {v}" for k, v in shape.sizes.items()) for shape in matrix.shapes]
    title = "ms per batch, samples/s, times as fast as fp32 of the same format"
    table = _new_table(title, *shapes, "mean", result=False)
    for entry in matrix.measured:
        fp32 = matrix.fp32_of(entry)
        cells = []
        for i, own in enumerate(entry.timings):
            ratio = None if fp32 is None else times_as_fast(own, fp32.timings[i])
            cells.append(f"{milliseconds(own.ms)}\n{rate(own.samples_per_s)}\n{times(ratio)}")
        mean = matrix.advantage(entry, fp32)
        cells.append(f"\n{rate(speed_of(entry.timings))}\n{times(None if mean is None else mean.factor)}")
        table.add_row(entry.name, *cells)
    return table


def _new_table(title: str, *numbers: str, result: bool = True) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=0)
    for name in ("combination", "result") if result else ("combination",):
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap="\n" not in name)
    return table


def result_of(entry: Entry) -> str:
    """One word; in parentheses, if it was only made to compare with."""
    return entry.status if entry.wanted else f"({entry.status})"
