"""Archives that were packed by hand, signed or damaged, under a real TorchServe."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from deploy.errors import StartError
from deploy.ports import Ports
from deploy.server import TorchServe
from export.archive import Archive, open_archive
from export.signing import MAKE_PRIVATE_KEY, MAKE_PUBLIC_KEY, sign_archive
from handlers.digests import file_sha256

from .conftest import FORMATS, READY_TIMEOUT_S, serving, torchport

SCRIPTS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("keys")
    for command in (MAKE_PRIVATE_KEY, MAKE_PUBLIC_KEY):
        subprocess.run(shlex.split(command), cwd=folder, check=True, capture_output=True)
    return folder / "private.pem", folder / "public.pem"


@pytest.fixture(scope="module")
def packed_by_hand(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Archives by format that torch-model-archiver packed, by the command that the export printed."""
    store = tmp_path_factory.mktemp("by-hand")
    packed = {}
    for format in (*FORMATS, "eager"):
        name = f"hand-{format}"
        options = ("--format", format, "--name", name, "--out", str(store), "--staging-only")
        staged = torchport("export", str(run_folder), *options)["staged"]
        folder = shutil.move(staged["folder"], store / f"moved {format}")
        command = f"{SCRIPTS}/{staged['command']} --export-path {store}"
        # The archiver deletes a folder of the model's name in the temporary folder.
        environment = {**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("scratch"))}
        subprocess.run(command, shell=True, check=True, cwd=folder, env=environment)
        packed[format] = store / f"{name}.mar"
    return packed


def test_archives_that_were_packed_by_hand_serve_the_same(
    packed_by_hand: dict[str, Path], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    for path in packed_by_hand.values():
        inspected = torchport("inspect", str(path), "--verify")
        assert inspected["packed_by_hand"]
        sign_archive(path, keys[0])
    with serving(list(packed_by_hand.values()), tmp_path, "--require-signature", str(keys[1])) as server:
        for path in packed_by_hand.values():
            archive = open_archive(path)
            with server.client() as client:
                for sample in archive.read_json("golden/expected.json")["samples"]:
                    response = client.post(
                        f"/predictions/{archive.name}",
                        content=archive.read(sample["file"]),
                        headers={"Content-Type": sample["content_type"]},
                    )
                    assert response.status_code == 200
                    assert response.json()["label"] == sample["label"]
                    assert response.json()["version"] == "1.0"


def read(path: Path, file: str) -> bytes:
    with zipfile.ZipFile(path) as source:
        return source.read(file)


def repacked(path: Path, destination: Path, **changes: bytes) -> Archive:
    """An archive that TorchServe extracts without a murmur, as one that nobody verified before it was served."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(destination, "w") as target:
        for name in source.namelist():
            target.writestr(name, changes.get(name, source.read(name)))
    name = json.loads(read(destination, "MAR-INF/MANIFEST.json"))["model"]["modelName"]
    return Archive(path=destination, name=name, version="1.0", sha256=file_sha256(destination), digests={})


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("file", ["model-config.yaml", "MAR-INF/MANIFEST.json"])
def test_a_worker_refuses_what_nobody_verified(
    archives: dict[str, Path], packed_by_hand: dict[str, Path], tmp_path: Path, by_hand: bool, file: str
) -> None:
    path = (packed_by_hand if by_hand else archives)["torchscript"]
    content = read(path, file)
    if file == "model-config.yaml":
        content = content.replace(b"responseTimeout: 60", b"responseTimeout: 61")
    else:
        manifest = json.loads(content)
        manifest["model"]["extensions" if by_hand else "modelVersion"] = "1.1"
        content = json.dumps(manifest).encode()
    damaged = repacked(path, tmp_path / "damaged.mar", **{file: content})
    started = time.monotonic()
    with TorchServe([damaged], Ports.free()) as server:
        with pytest.raises(StartError, match=rf"{Path(file).name} (has changed|is not what)"):
            server.wait_until_ready(READY_TIMEOUT_S)
        assert time.monotonic() - started < READY_TIMEOUT_S


@pytest.mark.timeout(900)
def test_other_surroundings_give_the_same_bytes(run_folder: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "byte_identity.py"
    command = [sys.executable, str(script), "--run", str(run_folder), "--surroundings", "everything"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["identical"] == {"torchscript": True, "onnx": True, "eager": True}
