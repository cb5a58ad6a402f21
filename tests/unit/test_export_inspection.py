"""Inspection: what an archive says of itself, and whether it is still true."""

import io
import json
import os
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from export.archive import open_archive, signature_path, write_canonical
from export.combinations import Combination
from export.convert import convert
from export.description import describe
from export.errors import ArchiveError, SigningError
from export.inspection import inspect_archive
from export.pipeline import ExportOptions, ExportReport, export_archive
from export.signing import MAKE_PRIVATE_KEY, MAKE_PUBLIC_KEY
from handlers.digests import DIGESTS_FILE, file_sha256
from handlers.signature import Signature

Rebuild = Callable[..., Path]


@pytest.fixture
def rebuild(archive: Path, tmp_path: Path) -> Rebuild:
    """An archive whose digests are right, by somebody who changed some of its files first; None removes one."""

    def rebuild(**changes: bytes | None) -> Path:
        packed = io.BytesIO()
        with zipfile.ZipFile(archive) as source, zipfile.ZipFile(packed, "w") as target:
            content = {name: source.read(name) for name in source.namelist() if name != DIGESTS_FILE}
            for name, data in {**content, **changes}.items():
                if data is not None:
                    target.writestr(name, data)
        with (tmp_path / "rebuilt.mar").open("wb") as file:
            write_canonical(packed, file)  # type: ignore[arg-type]  # a zip file is a path or an open file
        return tmp_path / "rebuilt.mar"

    return rebuild


@pytest.mark.parametrize("format", ["torchscript", "onnx", "eager"])
def test_an_archive_is_described_and_its_golden_samples_hold(
    exported: Callable[[str], ExportReport], format: str
) -> None:
    path = exported(format).archive
    described = inspect_archive(path, verify=True)
    assert described.archive.name == "brightness"
    assert described.archive.sha256 == file_sha256(path)
    assert described.signing == "unsigned"
    assert described.signature.labels == ("dark", "mid", "bright")
    assert described.config["batchSize"] == 32
    assert described.golden_samples == 12
    assert described.golden_difference is not None
    assert described.golden_difference < 1e-4
    document = described.to_document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_without_verify_no_model_runs(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.inspection.replay_golden", lambda archive: pytest.fail("the model ran"))
    assert inspect_archive(archive).golden_difference is None


def test_a_changed_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "changed.mar").write_bytes(content)
    with pytest.raises(ArchiveError, match="export it again or fetch a clean copy"):
        inspect_archive(tmp_path / "changed.mar")


def test_a_model_that_no_longer_gives_its_golden_answers_is_refused(
    rebuild: Rebuild, module: torch.nn.Module, signature: Signature, tmp_path: Path
) -> None:
    module.state_dict()["classifier.bias"][1] += 0.01
    combination = Combination(format="torchscript", precision="fp32", device="cpu")
    convert(module, signature, tmp_path, combination=combination)
    path = rebuild(**{"model.pt": (tmp_path / "model.pt").read_bytes()})
    assert inspect_archive(path).golden_samples == 12
    with pytest.raises(ArchiveError, match=r"does not give its golden answers here: golden/000\.png: logits differs"):
        inspect_archive(path, verify=True)


def test_a_model_that_does_not_load_is_refused(rebuild: Rebuild) -> None:
    with pytest.raises(ArchiveError, match=r"does not give its golden answers here: model\.pt is not a TorchScript"):
        inspect_archive(rebuild(**{"model.pt": b"no model"}), verify=True)


def change(archive: Path, file: str, change: Callable[[Any], object]) -> bytes:
    document = open_archive(archive).read_json(file)
    change(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("signature.json", None, r"signature\.json"),
        ("signature.json", b"{}", r"signature\.preprocessing is missing|signature\.format_version is missing"),
        ("signature.json", b"[" * 100_000, r"recursion"),
        ("golden/expected.json", None, r"golden/expected\.json"),
        ("golden/expected.json", b'{"rtol": 0, "atol": {}, "samples": []}', r"golden\.samples is empty"),
        ("golden/expected.json", b'{"rtol": 0, "atol": {}, "samples": 3}', r"golden\.samples must be a list"),
        ("golden/003.png", None, r"golden/003\.png is missing"),
        ("golden/003.logits.npy", None, r"golden/003\.logits\.npy is missing"),
        ("model.pt", None, r"model\.pt is missing"),
        ("model-config.yaml", b"a: [", r"while parsing"),
        ("model-config.yaml", b"", r"config must be a mapping"),
        ("provenance.json", b"[]", r"provenance must be a mapping"),
        ("provenance.json", b"{}", r"provenance\.checkpoint is missing"),
        ("provenance.json", b'{"checkpoint": {"sha256": "0", "metrics": {"accuracy": NaN}}}', r"NaN is not JSON"),
        ("provenance.json", b'{"checkpoint": {"sha256": "0", "metrics": {"accuracy": "x"}}}', r"finite number"),
        ("provenance.json", b"\xff", r"utf-8"),
    ],
)
def test_an_archive_that_is_not_whole_is_refused_in_one_sentence(
    rebuild: Rebuild, file: str, content: bytes | None, message: str
) -> None:
    with pytest.raises(ArchiveError, match=rf"is not a whole torchport archive: .*({message})") as caught:
        inspect_archive(rebuild(**{file: content}))
    assert "\n" not in str(caught.value)


def test_an_archive_without_an_artifact_is_refused(rebuild: Rebuild, archive: Path) -> None:
    content = change(archive, "signature.json", lambda document: document.pop("artifact"))
    with pytest.raises(ArchiveError, match=r"signature\.artifact is missing"):
        inspect_archive(rebuild(**{"signature.json": content}))


def test_a_golden_file_outside_of_the_archive_is_refused(rebuild: Rebuild, archive: Path) -> None:
    content = change(
        archive, "golden/expected.json", lambda document: document["samples"][0].update(file="../../etc/passwd")
    )
    with pytest.raises(ArchiveError, match=r"the path '\.\./\.\./etc/passwd' leads out of the archive"):
        inspect_archive(rebuild(**{"golden/expected.json": content}), verify=True)


def test_a_description_says_what_people_ask_for(archive: Path, rebuild: Rebuild) -> None:
    described = dict(describe(inspect_archive(archive)))
    assert described["digests"].endswith("files, all as exported")
    assert described["signed"] == "no"
    assert described["artifact"] == "torchscript fp32 on cpu (model.pt)"
    assert described["labels"] == "dark, mid, bright"
    assert described["golden samples"] == "12, not replayed (use --verify)"
    assert "gate: parity" in described
    assert (described["model card"], described["licence"]) == ("none", "none")
    assert "requires" not in described

    def require(document: Any) -> None:
        document["artifact"]["requires"] = {"torch": "2.13.0", "isa": "avx2"}

    content = change(archive, "signature.json", require)
    more = rebuild(**{"signature.json": content, "MODEL_CARD.md": b"# Card", "LICENSE": b"Apache-2.0"})
    described = dict(describe(inspect_archive(more)))
    assert described["requires"] == "torch 2.13.0, isa avx2"
    assert (described["model card"], described["licence"]) == ("yes", "yes")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("keys")
    for command in (MAKE_PRIVATE_KEY, MAKE_PUBLIC_KEY):
        subprocess.run(shlex.split(command), cwd=folder, check=True, capture_output=True)
    return folder / "private.pem", folder / "public.pem"


def test_a_signed_export_is_verified_by_its_key_before_anything_is_read(
    checkpoint: Path,
    evaluation_folder: Path,
    tmp_path: Path,
    keys: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ExportOptions(
        source=checkpoint, name="signed", evaluation=evaluation_folder, out=tmp_path, signing_key=keys[0]
    )
    path = export_archive(options).archive
    assert path is not None
    assert inspect_archive(path).signing == "unverified"
    verified = inspect_archive(path, public_key=keys[1])
    assert verified.signing == verified.to_document()["signing"] == "verified"
    assert dict(describe(verified))["signed"] == "yes, by the key that was given"
    signature_path(path).unlink()
    monkeypatch.setattr("export.archive.Archive.read", lambda *arguments: pytest.fail("it was read"))
    with pytest.raises(SigningError, match="is not signed"):
        inspect_archive(path, public_key=keys[1], verify=True)


def test_a_staged_export_that_was_packed_by_hand_says_so_and_keeps_its_golden_answers(
    checkpoint: Path, evaluation_folder: Path, tmp_path: Path
) -> None:
    options = ExportOptions(
        source=checkpoint, name="staged", evaluation=evaluation_folder, out=tmp_path, staging_only=True
    )
    report = export_archive(options)
    assert report.staged is not None
    assert [path.name for path in tmp_path.iterdir()] == ["staged-staging"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([str(report.staged.path / "pack.sh"), str(tmp_path)], check=True, env=environment)
    inspection = inspect_archive(tmp_path / "staged.mar", verify=True)
    assert inspection.golden_difference is not None
    assert inspection.to_document()["packed_by_hand"] is True
    assert "packed by hand" in dict(describe(inspection))["digests"]
