"""The commands `torchport loadtest` and `torchport predict`."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtest.client import DEFAULT_URL, Client
from loadtest.errors import PlanError
from loadtest.payloads import Payload, read_files, read_golden_samples
from loadtest.plan import DEFAULT_MAX_SEND_LAG_MS, Plan
from loadtest.predict import predict_all, read_input
from loadtest.tokens import find_token

if TYPE_CHECKING:
    from loadtest.report import ReportFiles
    from loadtest.result import Result

Url = Annotated[str, typer.Option(envvar="TORCHPORT_URL", help="Where the server answers predictions.")]
Token = Annotated[
    str | None,
    typer.Option(
        envvar="TORCHPORT_TOKEN",
        help="Bearer token; looked up for a server that torchport started on this machine.",
        show_default=False,
    ),
]


def predict(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    inputs: Annotated[list[str], typer.Argument(help="Files, JSON or text; each is one request.", metavar="INPUT")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    content_type: Annotated[
        str | None, typer.Option(help="Content-Type of every input; guessed by default.", show_default=False)
    ] = None,
) -> dict[str, object]:
    """Send files, text or JSON to a running model and print its answers."""
    payloads = [read_input(given, content_type=content_type) for given in inputs]
    with Client(url, token=find_token(url, token)) as client:
        answers = predict_all(client, name, payloads)
    console = Console()
    for given, answer in zip(inputs, answers, strict=True):
        console.print(f"[bold]{_escape(given)}[/bold]  {_describe_answer(answer)}")
    return {"ok": True, "model": name, "answers": answers}


def loadtest(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    rate: Annotated[
        float | None,
        typer.Option(help="Open loop: requests per second at random times. For latency.", show_default=False),
    ] = None,
    users: Annotated[
        int | None, typer.Option(help="Closed loop: requests kept in flight. For capacity.", show_default=False)
    ] = None,
    duration: Annotated[float, typer.Option(help="Measured seconds.")] = 30.0,
    warm_up: Annotated[float, typer.Option(help="Seconds of load before that, not counted.")] = 2.0,
    slo_p99_ms: Annotated[
        float | None,
        typer.Option(help="Fail unless 99 % of the requests are answered within this.", show_default=False),
    ] = None,
    processes: Annotated[int, typer.Option(help="Load processes; one core each at most.")] = 1,
    max_send_lag_ms: Annotated[
        float, typer.Option(help="Invalid when the client sent 1% of the requests later than planned by more.")
    ] = DEFAULT_MAX_SEND_LAG_MS,
    archive: Annotated[
        Path | None,
        typer.Option(help="Send the golden samples of this archive.", show_default="model_store/NAME.mar"),
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", help="Send this file instead; may be repeated.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report.", show_default="reports/NAME")] = None,
    seed: Annotated[int, typer.Option(help="Decides send times and order of the samples.")] = 0,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> dict[str, object]:
    """Load a running model with Locust, check every answer, and report how it did."""
    plan = Plan(
        model=name,
        url=url,
        rate_rps=rate,
        users=users,
        duration_s=duration,
        warm_up_s=warm_up,
        slo_p99_ms=slo_p99_ms,
        processes=processes,
        seed=seed,
        max_send_lag_ms=max_send_lag_ms,
    )
    from loadtest.report import check_folder, write_report  # noqa: PLC0415  # matplotlib takes half a second to import

    payloads, source = _read_payloads(name, archive, inputs)
    out = out or Path("reports") / name
    check_folder(out)
    token = find_token(url, token)
    with Client(url, token=token) as client:
        client.predict(name, payloads[0])  # a wrong name or token is worth one clear sentence, not a report
    result = _measure(plan, payloads, token, f"{plan.command} {shlex.join([*source, '--out', str(out)])}")
    files = write_report(result, out)
    _print_result(result, files)
    return _summarise(result, files)


def _read_payloads(name: str, archive: Path | None, inputs: list[Path] | None) -> tuple[list[Payload], list[str]]:
    """The request bodies, and the options that name where they come from."""
    if inputs and archive is None:
        return read_files(inputs), [word for path in inputs for word in ("--input", str(path))]
    if inputs:
        raise PlanError("give --archive or --input, not both")
    archive = archive or Path("model_store") / f"{name}.mar"
    return read_golden_samples(archive), ["--archive", str(archive)]


def _measure(plan: Plan, payloads: list[Payload], token: str | None, command: str) -> "Result":
    """Runs the load behind a progress bar."""
    from loadtest.result import measure  # noqa: PLC0415  # keeps psutil and hdrhistogram out of `--help`

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"loading {plan.model}", total=plan.total_s + 3)  # 3 s: Locust starts and ends

        def show(elapsed_s: float) -> None:
            progress.update(bar, completed=elapsed_s)

        return measure(plan, payloads, token=token, command=command, on_progress=show)


def _print_result(result: "Result", files: "ReportFiles") -> None:
    from loadtest.report import format_ms  # noqa: PLC0415

    plan, tally, verdict = result.plan, result.tally, result.verdict
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if plan.rate_rps is not None:
        table.add_row("load", f"open loop, {plan.rate_rps:g} req/s for {plan.duration_s:g} s")
        table.add_row("sent", f"{result.sent_rps:.1f} req/s of {result.planned_rps:.1f} planned")
    else:
        table.add_row("load", f"closed loop, {plan.users} in flight for {plan.duration_s:g} s (capacity, not latency)")
    table.add_row("right answers", f"{tally.right:,} of {tally.requests:,} · {result.throughput_rps:.1f} req/s")
    for kind, fault in result.faults:
        table.add_row(f"[red]{_escape(kind)}[/red]", f"{fault.count:,} · {_escape(fault.example)}")
    if verdict.valid:  # an invalid measurement has no latency worth printing
        latency, service = result.latency, result.service
        for label, value in (
            ("p50", latency.p50),
            ("p90", latency.p90),
            ("p99", latency.p99),
            ("p99.9", latency.p99_9),
            ("max", latency.max),
        ):
            table.add_row(label, "beyond every answer: too many failed" if value is None else f"{format_ms(value)} ms")
        if plan.open_loop:
            table.add_row("service time p99", f"{format_ms(service.p99)} ms (from the actual send)")
            table.add_row("send lag p99", f"{format_ms(result.send_lag.p99)} ms")
    table.add_row("client CPU", ", ".join(f"{share:.0%}" for share in tally.cpu_shares))
    table.add_row("report", str(files.page))
    console = Console()
    console.print(table)
    console.print(f"[bold {'green' if verdict.ok else 'red'}]{verdict.headline}[/]")
    for reason in (*verdict.invalid, *verdict.missed):
        console.print(f"  {_escape(reason)}")


def _summarise(result: "Result", files: "ReportFiles") -> dict[str, object]:
    """The result without its histograms, which lie in results.json."""
    summary: dict[str, object] = {key: value for key, value in result.to_json().items() if key != "tally"}
    return {**summary, "report": str(files.page), "results": str(files.results)}


def _describe_answer(answer: Any) -> str:
    """One line for an answer: the label of a classifier, else the JSON as it is."""
    if isinstance(answer, dict) and "label" in answer and isinstance(answer.get("probability"), float):
        return f"{_escape(str(answer['label']))}  [dim]{answer['probability']:.1%}[/dim]"
    return _escape(json.dumps(answer, ensure_ascii=False))


def _escape(text: str) -> str:
    from rich.markup import escape  # noqa: PLC0415

    return escape(text)
