"""What the serving benchmarks of one model share: its archives, made once by `torchport export`, and the comparison."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

FP32, BEST = "fp32", "best"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, and what it is exported and compared with.

    Attributes:
        name: Of its archives.
        factory: Import path of what builds it.
        write: Puts weights.pt, config.json, signature.yaml, and the data into a folder.
        evaluation: Name of the evaluation data in that folder.
        calibration: Name of the calibration data there.
        requests: Options of `torchport compare` that say what is sent.
    """

    name: str
    factory: str
    write: Callable[[Path], None]
    evaluation: str
    calibration: str
    requests: Sequence[str]


def compare(subject: Subject, description: str) -> None:
    """Read the command line, make the archives that are not there yet, and end with the exit code of the comparison."""
    parser = argparse.ArgumentParser(
        description=description, epilog="Every other option is one of `torchport compare`.", allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="where the archives and reports go; made when missing")
    parser.add_argument(
        "--serve",
        default=FP32,
        metavar="WHAT",
        help="what torchport serves: fp32 TorchScript, as everybody (default); best, the fastest artifact that passes "
        "its gates here; or a format and a precision, as torchscript-int8",
    )
    arguments, options = parser.parse_known_args()
    folder, serve = arguments.folder, arguments.serve
    plain, served = (archive_path(folder, subject, what) for what in (FP32, serve))
    if not plain.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subject.write(folder)
        export(folder, subject, FP32)
    if not served.exists():
        export(folder, subject, serve)
    reference = [] if serve == FP32 else ["--reference", str(plain)]
    words = ["compare", str(served), *reference, *subject.requests, "--out", str(folder / f"report-{serve}")]
    sys.exit(torchport(*words, *options))


def archive_path(folder: Path, subject: Subject, what: str) -> Path:
    """Where an archive of a subject lies."""
    return folder / "store" / f"{subject.name}-{what}.mar"


def export(folder: Path, subject: Subject, what: str) -> None:
    """Export with this project's own road; its gates judge."""
    words = [str(folder / "weights.pt"), "--model", subject.factory, "--config", str(folder / "config.json")]
    words += ["--signature", str(folder / "signature.yaml"), "--eval", str(folder / subject.evaluation)]
    words += ["--out", str(folder / "store"), "--name", f"{subject.name}-{what}"]
    if what == BEST:
        words += ["--best", "--report", str(folder / "matrix")]
    else:
        format, _, precision = "torchscript-fp32".partition("-") if what == FP32 else what.partition("-")
        words += ["--format", format, "--precision", precision or "fp32"]
    if what == BEST or what.endswith("-int8"):
        words += ["--calibration", str(folder / subject.calibration)]
    if torchport("export", *words):
        sys.exit("the export failed")


def torchport(*words: str) -> int:
    """Run a command of torchport; returns its exit code."""
    return subprocess.run([sys.executable, "-m", "torchport", *words], check=False).returncode
