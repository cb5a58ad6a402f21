"""The command ``torchport bench``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

RESULTS = "bench.json"


def bench(
    archive: Annotated[Path, typer.Argument(help="The .mar file.")],
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="N,…", help="Batch sizes of the artifact alone.", show_default="1,8,32")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,…",
            help="Sizes of the dynamic axes.",
            show_default="a quarter of the longest, and the longest",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Cores that one batch may use.")] = 1,
    duration: Annotated[float, typer.Option(help="Seconds of each point and each way, over all rounds.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often each takes its turn.")] = 5,
    in_flight: Annotated[str, typer.Option(metavar="N,…", help="Requests that the planner sees at once.")] = "64,256",
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", help="Send this file instead of golden samples; may be repeated.", show_default=False),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Send these texts instead: a .txt file of one a line, or a table (.csv, .tsv, .jsonl).",
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Column of the text in that table, by name or by position from 0.", show_default=False),
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Send random requests over the signature's ranges instead.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of requests, and random ones.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help=f"Write {RESULTS} into this folder.", show_default=False)
    ] = None,
) -> dict[str, Any]:
    """Measure the model alone, in this process: latency, throughput, memory. It is the limit of serving."""
    # torch takes seconds to import, and `--help` needs none of it.
    from export.bench import BenchOptions, count_steps, open_for_bench, run_bench  # noqa: PLC0415
    from export.bench_table import print_bench  # noqa: PLC0415
    from export.errors import MeasurementError  # noqa: PLC0415
    from export.table import Columns  # noqa: PLC0415

    if not 0 < duration <= 3600:  # NaN too
        raise MeasurementError(f"--duration is {duration:g}; give seconds, more than 0 and at most 3600")
    options = BenchOptions(
        archive=archive,
        batch_sizes=() if batch_sizes is None else _numbers(batch_sizes, "--batch-sizes"),
        lengths=() if lengths is None else _numbers(lengths, "--lengths"),
        threads=threads,
        duration_s=duration,
        rounds=rounds,
        in_flight=_numbers(in_flight, "--in-flight"),
        inputs=tuple(inputs or ()),
        texts=texts,
        columns=None if columns is None else Columns.parse(columns),
        random=random,
        seed=seed,
    )
    if out is not None:
        _check_folder(out)
    inspection = open_for_bench(options)
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        bar = progress.add_task("starting", total=count_steps(options, inspection.signature))

        def step(words: str) -> None:
            progress.update(bar, advance=1, description=escape(words))

        result = run_bench(options, inspection, step=step)
    console = Console()
    print_bench(result, console)
    document = {**result.to_document(), "command": shlex.join(["torchport", *sys.argv[1:]])}
    if out is not None:
        path = _write(document, out)
        console.print(f"wrote {escape(str(path))}", soft_wrap=True)
        document["results"] = str(path)
    return {"ok": True, **document}


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers from 1, separated by commas.

    Raises:
        MeasurementError: If they are something else.
    """
    from export.errors import MeasurementError  # noqa: PLC0415
    from handlers.document import shown  # noqa: PLC0415

    words = [word.strip() for word in text.split(",")]
    # Far more than any machine computes at once, and few enough digits to read.
    if not all(word.isascii() and word.isdecimal() and len(word) <= 6 and int(word) > 0 for word in words):
        raise MeasurementError(f"{option} is {shown(text)}; give whole numbers from 1 to 999999, such as 1,8,32")
    return tuple(dict.fromkeys(map(int, words)))


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, before any of the slow steps."""
    from export.errors import MeasurementError  # noqa: PLC0415

    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise MeasurementError(f"nothing can be written to {folder}; give another folder with --out")


def _write(document: dict[str, Any], folder: Path) -> Path:
    from export.atomic import replacing  # noqa: PLC0415
    from export.errors import MeasurementError  # noqa: PLC0415

    path = folder / RESULTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise MeasurementError(f"cannot write {path}: {error.strerror}; give another folder with --out") from error
    return path
