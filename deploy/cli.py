"""The commands ``serve``, ``doctor`` and ``demo``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.errors import StartError

if TYPE_CHECKING:
    from deploy.server import TorchServe
    from export.archive import Archive

_STATUS_STYLES = {"ok": "green", "absent": "yellow", "missing": "red"}


def serve(
    archives: Annotated[list[Path], typer.Argument(metavar="ARCHIVE", help="The .mar files to serve.")],
    port: Annotated[
        int,
        typer.Option(
            envvar="TORCHPORT_PORT",
            help="First of five ports: predictions, management, metrics, two for gRPC; 0 finds free ones.",
        ),
    ] = 8080,
    host: Annotated[
        str, typer.Option(help="Address for predictions; 0.0.0.0 opens them to other machines.")
    ] = "127.0.0.1",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers for each model.", show_default="what the archive says")
    ] = None,
    scheduling: Annotated[
        str,
        typer.Option(
            help="How requests reach the model: continuous (every request at once; where TorchServe and the archive "
            "allow it) or batches (TorchServe's own way: one batch at a time for each worker).",
        ),
    ] = "continuous",
    timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="How long the workers may take to load.")
    ] = 300,
    drain: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            envvar="TORCHPORT_DRAIN_SECONDS",
            help="How long requests in flight are answered after Ctrl-C or SIGTERM; then they get 503.",
        ),
    ] = 25,
    require_signature: Annotated[
        Path | None,
        typer.Option(
            metavar="PUBLIC_KEY", help="Serve nothing but archives that this key signed (export --sign); a PEM file."
        ),
    ] = None,
) -> dict[str, Any]:
    """Serve archives with TorchServe in the foreground, until Ctrl-C.

    The archives are verified first; workers become ready only when they repeat their golden answers.
    """
    from deploy.ports import Ports  # noqa: PLC0415  # fast --help
    from deploy.server import SCHEDULING, TorchServe, noted_signals  # noqa: PLC0415
    from export.archive import open_archive  # noqa: PLC0415

    if scheduling not in SCHEDULING:
        raise StartError(f"--scheduling is {scheduling!r}; choose {' or '.join(SCHEDULING)}")
    opened = [open_archive(path) for path in archives]
    _refuse_twins(opened)
    if require_signature is not None:
        from export.signing import verify_signature  # noqa: PLC0415  # an extra that others need not install

        for archive in opened:
            verify_signature(archive, require_signature)
    ports = Ports.from_first(port)
    progress = Console(stderr=True)
    # TorchServe runs in a session of its own and would outlive us: SIGTERM of a service manager and SIGHUP of a closed
    # terminal stop it as cleanly as Ctrl-C.
    with (
        noted_signals() as interrupts,
        TorchServe(
            opened, ports, host=host, workers=workers, scheduling=scheduling, echo=sys.stderr, drain_s=drain
        ) as server,
    ):
        with progress.status("starting TorchServe"):
            server.wait_until_ready(timeout, interrupts=interrupts)
        _print_ready(server, opened)
        code = server.wait(interrupts=interrupts)
        if code is not None:
            raise StartError(f"TorchServe ended by itself with exit code {code} (log: {server.log_file})")
        progress.print("stopping; once more ends it at once")
    return {"ok": True, "url": server.state.inference_url, "models": server.state.models}


def _refuse_twins(archives: list[Archive]) -> None:
    names = [archive.name for archive in archives]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise StartError(f"two of the archives are called {twice!r}; export one of them with another --name")


def _print_ready(server: TorchServe, archives: list[Archive]) -> None:
    """Say where the models are, with a curl line for each that works when pasted."""
    # Plain print: Rich would wrap the lines, and a wrapped command cannot be pasted.
    state = server.state
    token = state.inference_token()
    for archive in archives:
        sample = archive.read_json("golden/expected.json")["samples"][0]
        body = server.temporary_folder / f"sample-{archive.name}{Path(sample['file']).suffix}"
        body.write_bytes(archive.read(sample["file"]))
        url = f"{state.inference_url}/predictions/{archive.name}"
        command = [
            *("curl", "-s", url, "-H", f"Authorization: Bearer {token}"),
            *("-H", f"Content-Type: {sample['content_type']}", "--data-binary", f"@{body}"),
        ]
        label = sample.get("label")
        expected = "" if label is None else f" (the answer should be {label!r})"
        place = server.places.get(archive.name)
        where = f" ({place})" if place else ""
        print(f"{archive.name} {archive.version} is ready{where}. Try it{expected}:")
        print(f"  {shlex.join(command)}", flush=True)
    print(f"metrics: {state.metrics_url}/metrics   log: {server.log_file}   stop with Ctrl-C", flush=True)


def doctor() -> dict[str, Any]:
    """Examine this machine: what is there, what is missing, and how to get it."""
    from deploy.doctor import examine  # noqa: PLC0415  # fast --help

    table = Table("what", "status", "found", "remedy")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[2].overflow = table.columns[3].overflow = "fold"
    findings = []
    with Console(stderr=True).status("examining this machine"):
        for finding in examine():
            findings.append(finding)
            style = _STATUS_STYLES[finding.status]
            row = (f"[{style}]{finding.status}", escape(finding.detail), escape(finding.remedy))
            table.add_row(finding.what, *row)
    console = Console()
    console.print(table)
    missing = [finding.what for finding in findings if finding.status == "missing"]
    console.print(
        f"[red]torchport cannot work here yet: {', '.join(missing)} missing."
        if missing
        else "[green]torchport can train, export and serve here."
    )
    return {"ok": not missing, "findings": [finding.to_document() for finding in findings]}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    port: Annotated[int, typer.Option(help="First of five ports for the server; 0 finds free ones.")] = 0,
    duration: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Length of each load test.")] = 10,
) -> dict[str, Any]:
    """Go the whole way on real data: train, export, serve, predict, load-test.

    It runs the commands that you would run and shows each of them.
    """
    from deploy.demo import run_demo  # noqa: PLC0415  # fast --help

    return run_demo(out, port=port, duration_s=duration, console=Console())
