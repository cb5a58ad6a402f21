"""The command `torchport compare`."""

import os
import shlex
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest.compare_plan import (
    DEFAULT_DURATION_S,
    DEFAULT_ROUNDS,
    DEFAULT_USERS,
    DEFAULT_WARM_UP_S,
    ComparePlan,
    parse_users,
)
from loadtest.compare_systems import DEFAULT_PEERS, TORCHPORT, parse_peers

if TYPE_CHECKING:
    from loadtest.compare_breakdown import Breakdown
    from loadtest.compare_environment import PeerEnvironment
    from loadtest.compare_report import CompareFiles
    from loadtest.compare_result import Comparison
    from loadtest.compare_whole import Whole

# Beside TORCHPORT_THREADS: they reach torchport's workers as they are. See `handlers/settings.py`.
WORKER_SETTINGS = ("TORCHPORT_COMPUTING", "TORCHPORT_MAX_BATCH")

_WIDTH = 120
_DEFAULT_PEERS = ",".join(DEFAULT_PEERS)
_DEFAULT_USERS = ",".join(map(str, DEFAULT_USERS))


def compare(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="The .mar file that torchport serves.")],
    peers: Annotated[
        str, typer.Option(help="Who else: names with commas, all (TorchServe with its own log too), or none.")
    ] = _DEFAULT_PEERS,
    users: Annotated[str, typer.Option(help="Requests in flight; each number is measured by itself.")] = _DEFAULT_USERS,
    duration: Annotated[
        float, typer.Option(help="Measured seconds a system, number of users and round.")
    ] = DEFAULT_DURATION_S,
    warm_up: Annotated[float, typer.Option(help="Seconds of load before that, not counted.")] = DEFAULT_WARM_UP_S,
    rounds: Annotated[int, typer.Option(help="How often every system takes its turn.")] = DEFAULT_ROUNDS,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="The archive whose artifact the peers run: what everybody would, say fp32.",
            show_default="ARCHIVE itself",
        ),
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", help="Send this file, one sample; may be repeated.", show_default=False),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Send the texts of this file, one a line.", show_default=False)
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Shortest and longest dynamic axis of generated tensors, like 8-64.", show_default="all it may be"
        ),
    ] = None,
    pictures: Annotated[
        str | None,
        typer.Option(
            help="Send generated JPEG photographs of this width and height, like 224x224.", show_default=False
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of one batch, in all systems and the limit.", show_default="what the archive says"),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that compute, in all systems; FastAPI has threads on all cores.")
    ] = 1,
    cores: Annotated[
        int | None,
        typer.Option(help="Bind servers and client to so many cores together.", show_default="all, not bound"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides generated requests and the order of all.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the report.", show_default="reports/NAME-compare")] = None,
) -> dict[str, object]:
    """Put the same model behind other serving frameworks, load them all alike in turn, and compare.

    The frameworks are installed on first use, into an environment of their own in your cache folder.
    """
    names, counts = parse_peers(peers), parse_users(users)
    # Imported here: NumPy, psutil and matplotlib take a second.
    from loadtest.compare_archive import check_reference, unpack  # noqa: PLC0415
    from loadtest.compare_environment import PeerEnvironment  # noqa: PLC0415
    from loadtest.compare_report import write_comparison  # noqa: PLC0415
    from loadtest.compare_requests import parse_lengths, parse_pictures, read_bodies  # noqa: PLC0415
    from loadtest.compare_run import Run, reports_folder, steps_of  # noqa: PLC0415
    from loadtest.report import check_folder  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="torchport-compare-") as work:
        ours = unpack(archive, Path(work) / "archive")
        theirs = ours
        if reference is not None and reference.absolute() != archive.absolute():
            theirs = unpack(reference, Path(work) / "reference")
            check_reference(ours, theirs)
        plan = ComparePlan(
            archive=ours.path,
            reference=theirs.path,
            peers=names,
            users=counts,
            duration_s=duration,
            warm_up_s=warm_up,
            rounds=rounds,
            threads=ours.threads if threads is None else threads,
            workers=workers,
            cores=cores,
            seed=seed,
        )
        out = out or reports_folder(ours.name)
        check_folder(out)
        bounds = None if lengths is None else parse_lengths(lengths)
        bodies, source = read_bodies(
            ours.signature,
            archive,
            inputs=inputs or (),
            texts=texts,
            lengths=bounds,
            pictures=None if pictures is None else parse_pictures(pictures),
            seed=seed,
        )
        environment = PeerEnvironment.default()
        _install(environment, plan.packages)
        more = {"reference": reference, "texts": texts, "lengths": lengths, "pictures": pictures, "out": out}
        words = [word for name, value in more.items() if value is not None for word in (f"--{name}", str(value))]
        words += [word for path in inputs or () for word in ("--input", str(path))]
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=steps_of(plan))

            def show(text: str, done: int) -> None:
                progress.update(bar, advance=done, description=text or None)

            run = Run(plan, ours, theirs, bodies, environment=environment, on_step=show)
            comparison = run.measure(requests=source, command=shlex.join([*command_of(plan, os.environ), *words]))
    files = write_comparison(comparison, out)
    _print_comparison(comparison, files)
    return {**comparison.to_json(whole=False), "report": str(files.page), "results": str(files.results)}


def command_of(plan: ComparePlan, environment: Mapping[str, str]) -> list[str]:
    """The words of a command line that repeats a comparison, without its requests.

    Args:
        plan: The comparison.
        environment: Whose settings of torchport's workers count, threads excepted, which the plan has.
    """
    words = [f"{name}={environment[name]}" for name in WORKER_SETTINGS if environment.get(name)]
    words += ["torchport", "compare", str(plan.archive), "--peers", ",".join(plan.peers) or "none"]
    words += ["--users", ",".join(map(str, plan.users)), "--duration", f"{plan.duration_s:g}"]
    words += ["--warm-up", f"{plan.warm_up_s:g}", "--rounds", str(plan.rounds), "--threads", str(plan.threads)]
    words += ["--workers", str(plan.workers), "--seed", str(plan.seed)]
    return words if plan.cores is None else [*words, "--cores", str(plan.cores)]


def _install(environment: "PeerEnvironment", packages: tuple[str, ...]) -> None:
    """Installs what is missing, and says that and where: it takes a minute and a few hundred megabytes."""
    missing = environment.missing(packages)
    if not missing:
        return
    console = Console(stderr=True)
    console.print(
        f"installing {', '.join(missing)} into {environment.folder}", markup=False, highlight=False, soft_wrap=True
    )
    with console.status("installing the peers"):
        environment.install(packages)


def _print_comparison(comparison: "Comparison", files: "CompareFiles") -> None:
    from loadtest.compare_breakdown import break_down  # noqa: PLC0415  # NumPy

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width, and Rich would take 80 for it
        console = Console(width=_WIDTH)
    for users in comparison.plan.users:
        console.print(_table(comparison, users))
        breakdown = break_down(comparison, users)
        if breakdown is not None:
            _print_breakdown(console, breakdown)
    one = comparison.one_artifact
    for ours, whose in ((False, "" if one else "the peers' artifact: "), *(() if one else ((True, "torchport's: "),))):
        arrival, grouped = (comparison.limit(ours=ours, grouped=grouped) for grouped in (False, True))
        console.print(
            f"limit in process, {whose}{arrival:,.0f} samples/s in arrival order, {grouped:,.0f} grouped by length",
            highlight=False,
        )
        console.print(_whole_line(comparison.whole(ours=ours), comparison.plan.threads), highlight=False)
    console.print(f"report: {escape(str(files.page))}", highlight=False, soft_wrap=True)
    console.print("[bold green]VALID[/]" if comparison.ok else "[bold red]NOT ALL VALID[/]")
    for reason in comparison.invalid:
        console.print(f"  {escape(reason)}", highlight=False, soft_wrap=True)


def _whole_line(whole: "Sequence[Whole]", threads: int) -> str:
    first = whole[0]
    one, everything, alone_ms = (
        statistics.median(getattr(each, name) for each in whole) for name in ("one_per_s", "all_per_s", "alone_ms")
    )
    return (
        f"  with decoding and encoding: {one:,.0f} requests/s on {threads} thread{'s' if threads > 1 else ''} "
        f"(batches of {first.one_batch}), {everything:,.0f} on all cores ({first.lanes} such batches at a time, of "
        f"{first.all_batch}); {alone_ms:.2f} ms alone"
    )


def _print_breakdown(console: Console, breakdown: "Breakdown") -> None:
    title = f"where torchport's time goes, {breakdown.users} in flight, ms a request"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    table.add_column(f"in process, batches of {breakdown.batch}", justify="right", no_wrap=True)
    table.add_column("served", justify="right", no_wrap=True)
    for row in breakdown.rows:
        cells = ("" if value is None else f"{value:.2f}" for value in (row.in_process_ms, row.served_ms))
        table.add_row(row.stage, *cells)
    for name, spent_ms in breakdown.cpu_ms.items():
        table.add_row(f"CPU time: {name}", "", f"{spent_ms:.2f}")
    console.print(table)


def _table(comparison: "Comparison", users: int) -> Table:
    from loadtest.compare_plots import ranked  # noqa: PLC0415  # matplotlib
    from loadtest.report import format_ms  # noqa: PLC0415

    table = Table(title=f"{users} in flight", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("system", no_wrap=True)
    # Batches say nothing about one request at a time, and being alone nothing about many.
    last = ("added ms",) if users == 1 else ("limit", "one", "all")
    for heading in ("req/s", "p50 ms", "p99 ms", "ours is", *last, "CPU ms", "failed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for system, cell in ranked(comparison, users):
        table.add_row(
            f"[bold]{system.title}[/]" if system.name == TORCHPORT else system.title,
            f"{cell.rps:,.1f}",
            format_ms(cell.p50_ms),
            format_ms(cell.p99_ms),
            "—" if cell.torchport_ratio is None else f"{cell.torchport_ratio:.2f} x",
            *(
                ("—" if cell.added_ms is None else f"{cell.added_ms:.2f}",)
                if users == 1
                else ("—" if value is None else f"{value:.0%}" for value in (cell.of_limit, cell.of_one, cell.of_all))
            ),
            f"{cell.cpu_ms:.2f}",
            f"[red]{cell.failed:,}[/]" if cell.failed else "0",
        )
    for system in comparison.plan.systems:
        if system.name in comparison.failures:
            table.add_row(system.title, "[red]not measured[/]")
    return table
