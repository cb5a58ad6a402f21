"""The command line of torchport.

Every command is a plain function in its package's ``cli`` module, which returns a JSON-serialisable mapping. This
module registers them and gives them all the same boundary: ``--json``, ``--debug``, errors and exit codes.
"""

from __future__ import annotations

import functools
import inspect
import json as jsonlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Annotated, Any

import typer

import deploy.cli
import export.bench_cli
import export.cli
import loadtest.cli
import loadtest.compare_cli
import models.cli
import models.runs_cli

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2  # Typer's, for a wrong command line
EXIT_DEFECT = 70  # EX_SOFTWARE of sysexits.h: our fault, not the user's
EXIT_INTERRUPTED = 130

CommandFunction = Callable[..., dict[str, Any]]

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on the last line.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# In the order in which a newcomer meets them. The cli modules import their heavy parts when they run.
COMMANDS: tuple[tuple[str, CommandFunction], ...] = (
    ("demo", deploy.cli.demo),
    ("doctor", deploy.cli.doctor),
    ("train", models.cli.train),
    ("runs", models.runs_cli.runs),
    ("export", export.cli.export),
    ("inspect", export.cli.inspect),
    ("bench", export.bench_cli.bench),
    ("serve", deploy.cli.serve),
    ("predict", loadtest.cli.predict),
    ("loadtest", loadtest.cli.loadtest),
    ("compare", loadtest.compare_cli.compare),
)


def with_boundary(function: CommandFunction) -> Callable[..., None]:
    """Wrap a command: add ``--json`` and ``--debug``, print its result, turn its errors into sentences.

    Args:
        function: Raises errors with a true ``user_facing`` attribute for what the user can mend; returns a mapping,
            whose ``"ok"``, if false, makes the exit code 1. With ``--json``, an error becomes a document too:
            ``{"ok": false, "error": {"type": …, "message": …}}``.
    """

    def run(*, json: bool, debug: bool, **arguments: Any) -> None:
        try:
            result = function(**arguments)
            document = jsonlib.dumps(result, allow_nan=False)
            code = EXIT_OK if result.get("ok", True) else EXIT_FAILED
        except (typer.Exit, BrokenPipeError):  # nobody reads our output any more: Typer ends without a word
            raise
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            code, message = _describe(error)
            print(f"Error: {message}", file=sys.stderr, flush=True)
            details = error.to_document() if hasattr(error, "to_document") else {}
            document = _failure(type(error).__name__, message, details)
        if json:
            print(document)
        sys.stdout.flush()  # here, where a closed pipe is still told apart from a defect
        raise typer.Exit(code)

    signature = inspect.signature(function, eval_str=True)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("json", JsonOption), ("debug", DebugOption))
    ]
    parameters = [*signature.parameters.values(), *extra]
    functools.update_wrapper(run, function)
    del run.__wrapped__  # type: ignore[attr-defined]  # Typer must see the parameters added here
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _describe(error: BaseException) -> tuple[int, str]:
    """The exit code and the one plain sentence for an error."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if getattr(error, "user_facing", False):
        return EXIT_FAILED, str(error)
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return EXIT_FAILED, reason if error.filename is None else f"{error.filename}: {reason}"
    words = " ".join(str(error).split())
    return EXIT_DEFECT, f"unexpected {type(error).__name__}: {words} (a defect of torchport: run again with --debug)"


def _failure(kind: str, message: str, details: Mapping[str, Any] | None = None) -> str:
    """What ``--json`` prints when a command fails; an error that has a document adds it."""
    return jsonlib.dumps({"ok": False, "error": {"type": kind, "message": message}, **(details or {})})


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"torchport {metadata.version('torchport')}")
        raise typer.Exit


def build_app() -> typer.Typer:
    """The Typer application with every command."""
    app = typer.Typer(
        help="From a PyTorch checkpoint to a verified, tuned TorchServe endpoint.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        """From a PyTorch checkpoint to a verified, tuned TorchServe endpoint."""

    for name, function in COMMANDS:
        app.command(name)(with_boundary(function))
    return app


def main() -> None:
    """Entry point of the ``torchport`` command."""
    # By default OpenMP's idle threads spin. Where other work wants the cores, that work then waits for nothing, and so
    # do we: `train digits` took 14 to 33 s spinning and 8 to 9 s not, on 2 cores with another training beside it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        build_app()()
    except SystemExit as end:
        if end.code == EXIT_USAGE and "--json" in sys.argv:  # Typer has said on stderr what is wrong
            print(_failure("UsageError", "the command line is wrong; stderr says where"), flush=True)
        raise


if __name__ == "__main__":
    main()
