"""An archive needs nothing of torchport where it is served: stock TorchServe, torch and ONNX Runtime are enough."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deploy.java import find_java
from deploy.ports import Ports
from export.archive import Archive, open_archive
from handlers.model import ServedModel
from handlers.request import Part

from .conftest import READY_TIMEOUT_S, STOP_TIMEOUT_S

# What a user installs to serve archives: the README says so. PyYAML is imported, undeclared, by torchserve.
SERVING_PACKAGES = ("torch", "torchserve", "numpy", "pillow", "pyyaml")
ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def distributions_with_dependencies(names: Iterator[str] | tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """The named distributions and all that they declare to need, without extras."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # a requirement for other platforms
        for requirement in found[name].requires or []:
            if "extra ==" not in requirement:
                waiting.append(re.split(r"[ ;<>=!~\[(]", requirement, maxsplit=1)[0])
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment that has what TorchServe needs, by links, and nothing else."""
    environment = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = environment / "lib" / version / "site-packages"
    runtime = tuple(name for name in ONNX_RUNTIMES if _is_installed(name))
    for distribution in distributions_with_dependencies((*SERVING_PACKAGES, *runtime)).values():
        for file in distribution.files or []:
            top = file.parts[0]
            link = site_packages / top
            if top not in ("..", "__pycache__") and not link.is_symlink():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return environment / "bin" / "python"


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@contextmanager
def bare_torchserve(python: Path, archives: list[Path], folder: Path) -> Iterator[tuple[Ports, dict[str, Any], Path]]:
    """Stock TorchServe with its own defaults, but for the ports, until the block ends."""
    ports = Ports.free()
    config = folder / "ports.properties"
    config.write_text(
        f"inference_address=http://127.0.0.1:{ports.inference}\n"
        f"management_address=http://127.0.0.1:{ports.management}\n"
        f"metrics_address=http://127.0.0.1:{ports.metrics}\n"
        f"grpc_inference_port={ports.grpc_inference}\ngrpc_management_port={ports.grpc_management}\n"
    )
    temporary = folder / "tmp"
    temporary.mkdir()
    models = [f"{path.stem}={path.name}" for path in archives]
    log = folder / "torchserve.out"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(str(python), "-m", "ts.model_server", "--start", "--foreground", "--no-config-snapshots"),
                *("--ts-config", str(config), "--model-store", str(archives[0].parent), "--models", *models),
            ],
            cwd=folder,
            env={
                "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
                "JAVA_HOME": str(find_java().home),
                "TMPDIR": str(temporary),
                "TEMP": str(temporary),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield ports, _wait_for_workers(process, ports, [path.stem for path in archives], folder, log), log
        finally:
            # The launcher dies of a signal at once and leaves Java behind: end the whole family.
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for member in family:
                if member.is_running():
                    member.terminate()
            process.wait(timeout=STOP_TIMEOUT_S)
            psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)


def _wait_for_workers(
    process: subprocess.Popen[bytes], ports: Ports, models: list[str], folder: Path, log: Path
) -> dict[str, Any]:
    """Wait until every worker is READY; returns the tokens."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)
        try:
            keys: dict[str, Any] = json.loads((folder / "key_file.json").read_text())
            states = [_worker_states(ports, keys, model) for model in models]
        except (OSError, ValueError, httpx.TransportError):  # not written, or not listening yet
            continue
        if all(each and set(each) == {"READY"} for each in states):
            return keys
    raise AssertionError(log.read_text()[-3000:])


def _worker_states(ports: Ports, keys: dict[str, Any], model: str) -> list[str]:
    response = httpx.get(
        f"http://127.0.0.1:{ports.management}/models/{model}",
        headers={"Authorization": f"Bearer {keys['management']['key']}"},
    )
    return [worker["status"] for worker in response.json()[0]["workers"]] if response.is_success else []


def in_process_answers(archive: Archive, folder: Path) -> list[dict[str, Any]]:
    """The bodies that the archive's golden samples are answered with here, without TorchServe."""
    archive.extract(folder)
    identity = {"model": archive.name, "version": archive.version}
    model = ServedModel.load(folder, threads=1, identity=identity)
    return [
        model.answer([[Part(value=archive.read(sample["file"]), content_type=sample["content_type"])]])[0].body
        for sample in archive.read_json("golden/expected.json")["samples"]
    ]


def probabilities(body: dict[str, Any]) -> dict[str, float]:
    return {entry["label"]: entry["probability"] for entry in body["top_k"]}


def test_archives_answer_the_same_under_bare_torchserve(
    bare_python: Path, archives: dict[str, Path], tmp_path: Path
) -> None:
    imports = subprocess.run(
        [str(bare_python), "-c", "import handlers, models, export, torchport"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert b"No module named 'handlers'" in imports.stderr
    with bare_torchserve(bare_python, list(archives.values()), tmp_path) as (ports, keys, log):
        for path in archives.values():
            archive = open_archive(path)
            expected = in_process_answers(archive, tmp_path / archive.name)
            samples = archive.read_json("golden/expected.json")["samples"]
            for sample, body in zip(samples, expected, strict=True):
                response = httpx.post(
                    f"http://127.0.0.1:{ports.inference}/predictions/{archive.name}",
                    content=archive.read(sample["file"]),
                    headers={
                        "Content-Type": sample["content_type"],
                        "Authorization": f"Bearer {keys['inference']['key']}",
                    },
                )
                assert response.status_code == 200, log.read_text()[-3000:]
                answer = response.json()
                assert answer["label"] == body["label"] == sample["label"]
                assert probabilities(answer) == pytest.approx(probabilities(body), abs=1e-5)
                assert (answer["model"], answer["version"]) == (archive.name, archive.version)
