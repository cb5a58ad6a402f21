"""The same checkpoint, exported in other surroundings: are the archives the same, byte by byte?

    python tests/benchmarks/byte_identity.py
    python tests/benchmarks/byte_identity.py --run runs/digits --formats torchscript,onnx,eager --precision fp32

One export a format in plain surroundings, then one in each of the others: a copy of the code, the checkpoint and the
model store in another folder; another user (as root only); another time zone, language, hash seed and umask; a clock
that is years ahead (where there is a C compiler); and all of that together. SOURCE_DATE_EPOCH is the same everywhere.
Exit code 1 unless every archive of a format has the same SHA-256; the last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("models", "handlers", "export", "loadtest", "deploy", "torchport.py")
NOBODY = 65534
PLAIN = "plain"

# Moves the wall clock of whatever is started with it; monotonic clocks stay.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#define AHEAD (5L * 365 * 86400 + 12345)
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(id, t);
  if (!result && id == CLOCK_REALTIME) t->tv_sec += AHEAD;
  return result;
}
int gettimeofday(struct timeval *t, void *zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  t->tv_sec = now.tv_sec;
  t->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *t) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (t) *t = now.tv_sec;
  return now.tv_sec;
}
"""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where and how one export runs.

    Attributes:
        code: Folder with torchport's packages.
        run: The checkpoint's run folder.
        folder: A folder of its own for the archive, temporary files and the home.
        environment: Variables that differ.
        umask: File mode mask.
        user: User id; None for this one.
    """

    code: Path
    run: Path
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    umask: int = 0o022
    user: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder to export; digits is trained if there is none")
    parser.add_argument("--formats", default="torchscript,onnx,eager")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--surroundings", default=None, help="some of them only, separated by commas")
    options = parser.parse_args()
    formats = options.formats.split(",")
    with tempfile.TemporaryDirectory(prefix="torchport-bytes-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)  # another user reads the checkpoint and the copy of the code
        run = folder / "run"
        if options.run is None:
            command = [sys.executable, "-m", "torchport", "train", "digits", "--out", str(run)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        else:
            shutil.copytree(options.run, run)
        chosen = {PLAIN: plain(folder, run)}
        others = all_surroundings(folder, run)
        for name in others if options.surroundings is None else options.surroundings.split(","):
            chosen[name] = others[name]
        found = {name: export_all(surroundings, formats, options.precision) for name, surroundings in chosen.items()}
    print_table(found, formats)
    identical = {format: len({digests[format] for digests in found.values()}) == 1 for format in formats}
    result = {
        "identical": identical,
        "sha256": found[PLAIN],
        "precision": options.precision,
        "surroundings": list(found),
        "machine": platform.machine(),
        "versions": {name: metadata.version(name) for name in ("torch", "onnx", "onnxscript")},
    }
    print(json.dumps(result))
    sys.exit(not all(identical.values()))


def plain(folder: Path, run: Path) -> Surroundings:
    # Not the repository itself: eager archives hold source, which somebody may edit meanwhile.
    return Surroundings(code=copy_code(ROOT, folder / "code"), run=run, folder=folder / PLAIN)


def all_surroundings(folder: Path, run: Path) -> dict[str, Surroundings]:
    """What differs from plain surroundings, by name; without what this machine does not allow."""
    changes: dict[str, Callable[[Surroundings], Surroundings]] = {
        "folder": lambda one: replace(
            one, code=copy_code(one.code, folder / "an other place" / "code"), run=copy_run(folder, run)
        ),
        "locale": lambda one: replace(
            one,
            environment={**one.environment, "TZ": "Pacific/Chatham", "LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8"},
        ),
        "hash seed": lambda one: replace(one, environment={**one.environment, "PYTHONHASHSEED": "4242"}),
        "umask": lambda one: replace(one, umask=0o077),
    }
    if os.geteuid() == 0 and shutil.which("setpriv"):
        changes["user"] = lambda one: replace(one, user=NOBODY, environment={**one.environment, "USER": "somebody"})
    if shutil.which("cc"):
        library = folder / "clock.so"
        (folder / "clock.c").write_text(CLOCK)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(folder / "clock.c"), "-ldl"], check=True)
        changes["clock"] = lambda one: replace(one, environment={**one.environment, "LD_PRELOAD": str(library)})
    found = {name: change(replace(plain(folder, run), folder=folder / name)) for name, change in changes.items()}
    everything = replace(plain(folder, run), folder=folder / "everything")
    for change in changes.values():
        everything = change(everything)
    return {**found, "everything": everything}


def copy_code(source: Path, copy: Path) -> Path:
    """Torchport's packages in another place, from which Python imports them when started there."""
    if not copy.exists():
        copy.mkdir(parents=True)
        for name in CODE:
            if (source / name).is_dir():
                shutil.copytree(source / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source / name, copy / name)
    return copy


def copy_run(folder: Path, run: Path) -> Path:
    copy = folder / "an other place" / "run of somebody"
    if not copy.exists():
        shutil.copytree(run, copy)
    return copy


def export_all(surroundings: Surroundings, formats: list[str], precision: str) -> dict[str, str]:
    """Export in every format; SHA-256 of the archives by format."""
    home = surroundings.folder / "home"
    temporary = surroundings.folder / "tmp"
    store = surroundings.folder / "store"
    for folder in (home, temporary, store):
        folder.mkdir(parents=True)
        if surroundings.user is not None:
            os.chown(folder, surroundings.user, surroundings.user)
    if surroundings.user is not None:
        os.chown(surroundings.folder, surroundings.user, surroundings.user)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("LC_", "PYTHON"))},
        **{"SOURCE_DATE_EPOCH": "1700000000", "HOME": str(home), "TMPDIR": str(temporary), "LANG": "C.UTF-8"},
        **{"XDG_CACHE_HOME": str(home / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor")},
        **surroundings.environment,
    }
    digests = {}
    for format in formats:
        started = time.monotonic()
        # Python may lie in a home that others cannot enter: the other user keeps the right to read.
        command = [] if surroundings.user is None else as_user(surroundings.user)
        command += [sys.executable, "-m", "torchport", "export", str(surroundings.run), "--name", "model"]
        command += ["--format", format, "--precision", precision, "--out", str(store), "--allow-slower", "--json"]
        done = subprocess.run(
            command,
            cwd=surroundings.code,
            env=environment,
            umask=surroundings.umask,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{surroundings.folder.name}: {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        digests[format] = hashlib.sha256((store / "model.mar").read_bytes()).hexdigest()
        print(f"{surroundings.folder.name}: {format} {time.monotonic() - started:.0f} s", file=sys.stderr)
    return digests


def as_user(user: int) -> list[str]:
    rights = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *rights]


def print_table(found: dict[str, dict[str, str]], formats: list[str]) -> None:
    print("".join(f"{text:<20}" for text in ("surroundings", *formats)))
    for name, digests in found.items():
        cells = [
            digests[format][:12] + ("" if digests[format] == found[PLAIN][format] else " differs") for format in formats
        ]
        print("".join(f"{text:<20}" for text in (name, *cells)))


if __name__ == "__main__":
    main()
