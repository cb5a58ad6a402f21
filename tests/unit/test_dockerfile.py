import fnmatch
import re
import shlex
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _instructions():
    """The Dockerfile's instructions, continued lines joined and comments dropped."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def _arguments(name):
    return [rest for instruction, rest in _instructions() if instruction == name]


def _copied():
    """Paths that COPY takes from the build context."""
    words = [shlex.split(rest) for rest in _arguments("COPY")]
    return [source for line in words if not line[0].startswith("--from=") for source in line[:-1]]


def _ignored(path):
    """Whether .dockerignore leaves a path out: the last pattern that matches it, or a folder above it, decides."""
    places = [str(place) for place in [PurePosixPath(path), *PurePosixPath(path).parents][:-1]]
    verdict = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            body = pattern.removeprefix("!").strip("/").split("/")
            for place in places:
                parts = place.split("/")
                if len(parts) == len(body) and all(map(fnmatch.fnmatchcase, parts, body)):
                    verdict = not pattern.startswith("!")
    return verdict


def _requirements():
    """What the image's pip installs, with each build argument's default in its place."""
    command = next(rest for rest in _arguments("RUN") if " install --no-cache-dir" in rest)
    words = shlex.split(command.partition(" -c /tmp/constraints.txt ")[2].partition(" || ")[0])
    defaults = dict(rest.split("=", 1) for rest in _arguments("ARG") if "=" in rest)
    return [re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], word) for word in words]


def test_every_copied_file_reaches_the_builder():
    assert _copied()
    assert [path for path in _copied() if not (ROOT / path).is_file()] == []
    assert [path for path in _copied() if _ignored(path)] == []


@pytest.mark.parametrize("path", [".git", ".venv/bin/python", "runs/1/checkpoint.pt", "model_store/digits.mar"])
def test_nothing_else_reaches_the_builder(path):
    assert _ignored(path)


def test_what_the_entry_point_and_the_health_check_run_is_copied():
    names = {PurePosixPath(path).name for path in _copied()}
    entry_point = (ROOT / "deploy/entrypoint.sh").read_text(encoding="utf-8")
    used = re.findall(r"/opt/torchport/([\w.]+)", " ".join(_arguments("ENTRYPOINT") + _arguments("HEALTHCHECK")))
    used += re.findall(r"\$home/([\w.]+)", entry_point)
    assert len(used) >= 5
    assert set(used) <= names


def test_the_server_does_not_run_as_root():
    instructions = _instructions()
    last_stage = max(i for i, (instruction, _) in enumerate(instructions) if instruction == "FROM")
    users = [rest for instruction, rest in instructions[last_stage:] if instruction == "USER"]
    # A number: Kubernetes' runAsNonRoot cannot judge a name.
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])


def test_java_finds_the_folder_that_its_package_needs():
    # Debian's slim images have no manual pages, and openjdk's post-installation script fails where man1 is missing.
    command = next(rest for rest in _arguments("RUN") if "openjdk" in rest)
    assert "/usr/share/man/man1" in command.partition("apt-get")[0]


def test_the_working_folder_can_be_a_tmpfs_or_anybody_s():
    # A tmpfs takes the folder's mode but belongs to root; with --user, or on OpenShift, the process has another id.
    folder = _arguments("WORKDIR")[-1]
    command = next(rest for rest in _arguments("RUN") if f" {folder} " in rest and "install -d" in rest)
    assert f"install -d -m 1777 {folder} " in command


def test_every_package_that_is_asked_for_is_pinned():
    # As the Dockerfile reads the constraints: without their markers.
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    wanted = _requirements()
    assert {"torch", "torchserve", "onnxruntime"} <= set(wanted)
    assert [name for name in [*wanted, "onnxruntime-gpu"] if name not in pinned] == []


def test_torchport_and_its_tools_stay_outside():
    allowed = {"torch", "torchserve", "onnxruntime", "numpy", "pillow", "pyyaml", "tokenizers"}
    assert set(_requirements()) == allowed
    sources = {PurePosixPath(path).parts[0] for path in _copied() if len(PurePosixPath(path).parts) > 1}
    assert sources == {"deploy"}


def test_no_package_index_is_named():
    assert "://" not in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_onnx_runtime_sends_nothing_home():
    assert "ORT_DISABLE_TELEMETRY=1" in " ".join(_arguments("ENV")).split()
