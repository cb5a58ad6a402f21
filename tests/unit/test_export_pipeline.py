"""The export as a whole: it ends with an archive that is right, or it changes nothing."""

import copy
import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.archive import open_archive
from export.combinations import Combination
from export.convert import convert
from export.errors import (
    ArchiveError,
    CheckpointError,
    ConversionError,
    EvaluationError,
    ExportError,
    GateError,
    ThresholdError,
)
from export.gates import GateResult
from export.pipeline import ExportOptions, ExportReport, Source, convert_and_check, export_archive, pack, prepare
from export.thresholds import Thresholds
from handlers.digests import file_sha256
from handlers.signature import Artifact, Signature

Write = Callable[[Path], None]


@pytest.fixture
def store(tmp_path: Path, archive: Path) -> Path:
    """A model store that has an archive of the name already."""
    store = tmp_path / "store"
    store.mkdir()
    shutil.copy(archive, store / "brightness.mar")
    return store


@pytest.fixture
def options(checkpoint: Path, evaluation_folder: Path, store: Path) -> Callable[..., ExportOptions]:
    def options(**changes: Any) -> ExportOptions:
        return ExportOptions(
            **{"source": checkpoint, "name": "brightness", "evaluation": evaluation_folder, "out": store, **changes}
        )

    return options


@pytest.fixture
def artifact_is(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the conversion write another artifact, with a fault in it."""

    def artifact_is(write: Write, *, format: str = "torchscript") -> None:
        def converted(source: Path, folder: Path, **options: Any) -> Artifact:
            artifact = Artifact(
                format=format,
                precision=options["precision"],
                file="model.pt" if format != "onnx" else "model.onnx",
            )
            write(folder / artifact.file)
            return artifact

        monkeypatch.setattr("export.candidate.convert_in_fresh_process", converted)

    return artifact_is


@pytest.fixture
def module_is(artifact_is: Callable[..., None], signature: Signature) -> Callable[[torch.nn.Module], None]:
    """Let the artifact be that of another module."""

    def module_is(module: torch.nn.Module) -> None:
        def write(path: Path) -> None:
            combination = Combination(format="torchscript", precision="fp32")
            convert(copy.deepcopy(module).eval(), signature, path.parent, combination=combination)

        artifact_is(write)

    return module_is


def refused(options: ExportOptions, error: type[ExportError] = GateError) -> str:
    """Export, which must be refused and change nothing; the message."""
    before = {path: path.read_bytes() for path in options.out.rglob("*")}
    with pytest.raises(error) as caught:
        export_archive(options)
    assert {path: path.read_bytes() for path in options.out.rglob("*")} == before
    message = str(caught.value)
    assert "\n" not in message
    return message


class Wrapped(torch.nn.Module):
    """A module with something done to its inputs or outputs."""

    def __init__(
        self,
        module: torch.nn.Module,
        before: Callable[[torch.Tensor], torch.Tensor] = lambda batch: batch,
        after: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda batch, output: output,
    ) -> None:
        super().__init__()
        self.module = module
        self.before = before
        self.after = after

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.module(self.before(batch))
        return self.after(batch, output)


def change_weight(module: torch.nn.Module) -> torch.nn.Module:
    module.state_dict()["classifier.weight"][0, 1] += 0.01
    return module


def change_epsilon(module: torch.nn.Module) -> torch.nn.Module:
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eps = 1e-3
    return module


def put_nan(module: torch.nn.Module) -> torch.nn.Module:
    module.state_dict()["features.0.conv.weight"][3, 0, 2, 2] = torch.nan
    return module


def permute_classes(module: torch.nn.Module) -> torch.nn.Module:
    return Wrapped(module, after=lambda batch, output: output[:, [2, 1, 0]])


def transpose_input(module: torch.nn.Module) -> torch.nn.Module:
    return Wrapped(module, before=lambda batch: batch.transpose(2, 3))


def wrong_mean(module: torch.nn.Module) -> torch.nn.Module:
    return Wrapped(module, before=lambda batch: batch + 0.1)


def wrong_for_plain_images(module: torch.nn.Module) -> torch.nn.Module:
    # Random pixels never look like this, and the class stays right: only parity on real data tells.
    def shift(batch: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        flat = batch.flatten(1)
        return output + 0.004 * (flat.amax(1) - flat.amin(1) < 1e-3).unsqueeze(1)

    return Wrapped(module, after=shift)


def wrong_for_one_plain_image(module: torch.nn.Module) -> torch.nn.Module:
    # Real data is compared in full batches: only the golden samples, which go one by one, tell.
    def shift(batch: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        flat = batch.flatten(1)
        alone = torch.ones_like(flat[:, :1]).sum() == 1
        return output + 0.004 * ((flat.amax(1) - flat.amin(1) < 1e-3) & alone).unsqueeze(1)

    return Wrapped(module, after=shift)


def constant_batch(module: torch.nn.Module) -> torch.nn.Module:
    return Wrapped(module, before=lambda batch: batch.reshape(3, 1, 8, 8))


class TestSeededFaults:
    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (change_weight, r"parity: largest difference"),
            (change_epsilon, r"parity: largest difference"),
            (put_nan, r"outputs: the artifact gives NaN or infinity where the checkpoint itself does not"),
            (permute_classes, r"parity: .*noise: .*top-1 agreement: .*4 of 12.*accuracy: 4 of 12 right"),
            (wrong_mean, r"parity: largest difference"),
            (wrong_for_plain_images, r"\(parity on evaluation data: largest difference"),
            (wrong_for_one_plain_image, r"does not repeat its golden samples, so there is no archive"),
            (constant_batch, r"loads: the artifact does not load: the model fails on a batch of 1"),
        ],
    )
    def test_a_fault_in_the_artifact_is_refused(
        self,
        module: torch.nn.Module,
        module_is: Callable[[torch.nn.Module], None],
        options: Callable[..., ExportOptions],
        fault: Callable[[torch.nn.Module], torch.nn.Module],
        message: str,
    ) -> None:
        module_is(fault(module))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            said = refused(options())

        assert re.search(message, said), said

    def test_a_transposed_input_is_refused(
        self,
        module: torch.nn.Module,
        module_is: Callable[[torch.nn.Module], None],
        checkpoint_content: dict[str, Any],
        options: Callable[..., ExportOptions],
        tmp_path: Path,
    ) -> None:
        # The weights of a fresh model, for the ones above hardly tell the directions apart.
        generator = torch.Generator().manual_seed(0)
        weights = checkpoint_content["state_dict"]
        for name in ("features.0.conv.weight", "classifier.weight"):
            weights[name] = torch.randn(weights[name].shape, generator=generator)
        torch.save(checkpoint_content, tmp_path / "checkpoint.pt")
        module.load_state_dict(weights)
        module_is(transpose_input(module))
        assert "parity: largest difference" in refused(
            options(source=tmp_path / "checkpoint.pt", evaluation=None, thresholds=Thresholds())
        )

    def test_without_a_fault_the_same_way_leads_to_an_archive(
        self,
        module: torch.nn.Module,
        module_is: Callable[[torch.nn.Module], None],
        options: Callable[..., ExportOptions],
        store: Path,
    ) -> None:
        module_is(module)
        report = export_archive(options(name="again"))
        assert open_archive(report.archive).path == store / "again.mar"

    @pytest.mark.parametrize("value", [0.01, np.nan])
    def test_a_changed_weight_in_an_onnx_file_is_refused(
        self,
        exported: Callable[[str], ExportReport],
        artifact_is: Callable[..., None],
        options: Callable[..., ExportOptions],
        value: float,
    ) -> None:
        graph = onnx.load_from_string(open_archive(exported("onnx").archive).read("model.onnx"))
        tensor = next(one for one in graph.graph.initializer if sorted(one.dims) == [3, 4])
        weight = numpy_helper.to_array(tensor).copy()
        weight[0, 0] += np.float32(value)
        tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
        artifact_is(lambda path: onnx.save(graph, path), format="onnx")
        assert re.match(
            r"the onnx fp32 on cpu artifact fails \d of \d+ gates, so there", refused(options(format="onnx"))
        )

    def test_an_onnx_file_with_a_constant_batch_axis_is_refused(
        self,
        exported: Callable[[str], ExportReport],
        artifact_is: Callable[..., None],
        options: Callable[..., ExportOptions],
    ) -> None:
        graph = onnx.load_from_string(open_archive(exported("onnx").archive).read("model.onnx"))
        graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
        artifact_is(lambda path: onnx.save(graph, path), format="onnx")
        assert "the model fails on a batch of 1" in refused(options(format="onnx"))

    @pytest.mark.parametrize("format", ["torchscript", "onnx"])
    @pytest.mark.parametrize("content", [b"", b"PK\3\4", b"no artifact\n"])
    def test_an_artifact_that_does_not_load_is_refused(
        self,
        artifact_is: Callable[..., None],
        options: Callable[..., ExportOptions],
        format: str,
        content: bytes,
    ) -> None:
        artifact_is(lambda path: path.write_bytes(content), format=format)
        assert "loads: the artifact does not load: model." in refused(options(format=format))

    @pytest.mark.parametrize(
        "change",
        [
            lambda signature: signature["preprocessing"]["image"].update(mean=[0.3]),
            lambda signature: signature["preprocessing"]["image"].update(std=[0.4]),
            lambda signature: signature["labels"].reverse(),
        ],
    )
    def test_a_signature_that_is_not_the_one_of_the_training_is_refused(
        self,
        checkpoint_content: dict[str, Any],
        module: torch.nn.Module,
        module_is: Callable[[torch.nn.Module], None],
        options: Callable[..., ExportOptions],
        tmp_path: Path,
        change: Callable[[Any], None],
    ) -> None:
        module_is(module)
        change(checkpoint_content["signature"])
        torch.save(checkpoint_content, tmp_path / "checkpoint.pt")
        said = refused(options(source=tmp_path / "checkpoint.pt"))
        assert "accuracy in training: the checkpoint reaches 0." in said
        assert "fails 1 of 13 gates" in said  # the artifact is right: only the task tells

    def test_a_failed_export_makes_no_store(
        self,
        module: torch.nn.Module,
        module_is: Callable[[torch.nn.Module], None],
        options: Callable[..., ExportOptions],
        tmp_path: Path,
    ) -> None:
        module_is(change_weight(module))
        refused(options(out=tmp_path / "new"))
        assert not (tmp_path / "new").exists()

    def test_a_looser_bound_lets_it_through(
        self,
        module: torch.nn.Module,
        module_is: Callable[[torch.nn.Module], None],
        options: Callable[..., ExportOptions],
    ) -> None:
        module_is(change_weight(module))
        report = export_archive(options(name="loose", thresholds=Thresholds(atol=0.5, noise=1, random_noise=1)))
        assert all(gate.passed for gate in report.gates)


class TestRefusedBeforeTheSlowSteps:
    @pytest.fixture(autouse=True)
    def _no_conversion(self, artifact_is: Callable[..., None]) -> None:
        artifact_is(lambda path: pytest.fail("the model was converted"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "pt3"}, "the format 'pt3' is not known; choose one of: torchscript, onnx, pt2, eager"),
            ({"precision": "fp8"}, "the precision 'fp8' is not known; choose one of: fp32, bf16, fp16, int8"),
            ({"method": "guess"}, "the method 'guess' is not known; choose one of: trace, script"),
        ],
    )
    def test_what_is_not_known(
        self, options: Callable[..., ExportOptions], change: dict[str, str], message: str
    ) -> None:
        assert refused(options(**change), ConversionError) == message

    @pytest.mark.parametrize("change", [{"name": "a/b"}, {"version": "../1"}])
    def test_a_name_that_is_not_usable(self, options: Callable[..., ExportOptions], change: dict[str, str]) -> None:
        assert "is not usable" in refused(options(**change), ArchiveError)

    def test_a_bad_date(self, options: Callable[..., ExportOptions], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
        assert "SOURCE_DATE_EPOCH is 'yesterday'" in refused(options(), ArchiveError)

    def test_a_missing_checkpoint(self, options: Callable[..., ExportOptions], tmp_path: Path) -> None:
        assert "there is no checkpoint" in refused(options(source=tmp_path / "nope"), CheckpointError)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"thresholds": Path("nope.yaml")}, ThresholdError, "the thresholds nope.yaml cannot be read"),
            ({"licence": Path("nope")}, ExportError, "nope cannot be read"),
            ({"model_card": Path("nope")}, ExportError, "nope cannot be read"),
            ({"device": "cuda", "precision": "int8"}, ConversionError, "int8 on CUDA is not offered"),
            ({"format": "onnx", "precision": "bf16"}, ConversionError, "bf16 ONNX is not offered"),
            ({"staging_only": True, "signing_key": Path("key")}, ExportError, "there is nothing to sign"),
        ],
    )
    def test_other_options_that_cannot_be_used(
        self, options: Callable[..., ExportOptions], change: dict[str, Any], error: type[ExportError], message: str
    ) -> None:
        assert message in refused(options(**change), error)

    def test_an_image_that_a_worker_would_refuse(
        self, options: Callable[..., ExportOptions], evaluation_folder: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(evaluation_folder, tmp_path / "images")
        (folder / "mid" / "2.png").write_bytes(b"no image")
        said = refused(options(evaluation=folder), EvaluationError)
        assert "mid/2.png is nothing that the model takes: " in said

    def test_bad_evaluation_data(self, options: Callable[..., ExportOptions], tmp_path: Path) -> None:
        assert "there is no folder" in refused(options(evaluation=tmp_path / "nope"), EvaluationError)


class TestReports:
    @pytest.mark.parametrize("format", ["torchscript", "onnx"])
    def test_a_report_says_what_was_written_and_found(
        self, exported: Callable[[str], ExportReport], format: str
    ) -> None:
        report = exported(format)
        assert report.archive.name == "brightness.mar"
        assert report.sha256 == file_sha256(report.archive)
        assert report.bytes == report.archive.stat().st_size
        assert [gate.gate for gate in report.gates] == [
            "outputs",
            "parity",
            "noise",
            "top-1 on random inputs",
            "extreme inputs",
            "batching of the checkpoint",
            "batching",
            "outputs on evaluation data",
            "parity on evaluation data",
            "noise on evaluation data",
            "top-1 agreement",
            "accuracy",
            "accuracy in training",
        ]
        assert all(gate.passed for gate in report.gates)
        assert report.evaluated == 12
        assert report.gates[0].detail.startswith("59 samples in 20 batches")
        document = report.to_document()
        assert json.loads(json.dumps(document, allow_nan=False)) == document

    @pytest.mark.parametrize("format", ["torchscript", "onnx"])
    def test_an_archive_holds_all_that_a_worker_needs(
        self, exported: Callable[[str], ExportReport], signature: Signature, format: str
    ) -> None:
        archive = open_archive(exported(format).archive)
        described = Signature.from_document(archive.read_json("signature.json"))
        assert described.artifact is not None
        assert described.artifact.format == format
        assert described.labels == signature.labels
        assert described.artifact.file in archive.digests
        assert len(archive.read_json("golden/expected.json")["samples"]) == 12
        assert {"entry.py", "handlers/service.py", "model-config.yaml", "provenance.json"} <= set(archive.digests)

    def test_steps_are_told_as_they_begin_and_random_inputs_do_without_data(
        self,
        module: torch.nn.Module,
        module_is: Callable[[torch.nn.Module], None],
        options: Callable[..., ExportOptions],
    ) -> None:
        module_is(module)
        steps: list[str] = []
        report = export_archive(options(name="bare", evaluation=None), step=steps.append)
        assert steps == [
            "reading the checkpoint",
            "converting to torchscript fp32",
            "comparing with the checkpoint",
            "choosing golden samples",
            "packing",
        ]
        assert report.evaluated == 0
        assert [gate.gate for gate in report.gates] == [
            "outputs",
            "parity",
            "noise",
            "top-1 on random inputs",
            "extreme inputs",
            "batching of the checkpoint",
            "batching",
        ]
        assert len(open_archive(report.archive).read_json("golden/expected.json")["samples"]) == 16

    def test_a_checkpoints_own_model_that_fails_is_named(
        self,
        module: torch.nn.Module,
        module_is: Callable[[torch.nn.Module], None],
        tmp_path: Path,
        options: Callable[..., ExportOptions],
        signature_document: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "fails_in_forward.py").write_text(
            "import torch\n"
            "class Fails(torch.nn.Module):\n"
            "    def forward(self, batch): raise RuntimeError('no such kernel')\n"
            "def build(): return Fails()\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "signature.json").write_text(json.dumps(signature_document))
        torch.save({}, tmp_path / "weights.pt")
        module_is(module)
        said = refused(
            options(
                source=tmp_path / "weights.pt",
                factory="fails_in_forward:build",
                signature_file=tmp_path / "signature.json",
            ),
            CheckpointError,
        )
        assert "the checkpoint's own model fails on image [1, 1, 8, 8]: no such kernel" in said


class TestLowerPrecision:
    """The speed gate's measurement is not ours to test here: it is set, so that no test depends on a machine."""

    @pytest.fixture
    def measured(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
        def measured(ratio: float) -> None:
            monkeypatch.setattr("export.speed.mean_ratio", lambda timings: ratio)

        return measured

    def test_an_int8_archive_tells_its_calibration_and_that_it_is_fast_enough(
        self,
        options: Callable[..., ExportOptions],
        evaluation_folder: Path,
        store: Path,
        measured: Callable[[float], None],
    ) -> None:
        measured(0.7)
        report = export_archive(
            options(
                name="small",
                format="onnx",
                precision="int8",
                calibration=evaluation_folder,
                thresholds=Thresholds(atol=None, noise=0.2, random_noise=0.5, agreement=0.9, metric_drop=0.1),
            )
        )
        archive = open_archive(store / "small.mar")
        provenance = archive.read_json("provenance.json")
        assert provenance["artifact"]["calibration"]["samples"] == 12
        assert len(provenance["artifact"]["calibration"]["sha256"]) == 64
        assert provenance["artifact"]["opsets"]["ai.onnx"] >= 18
        assert provenance["thresholds"]["random_noise"] == 0.5
        (speed,) = [gate for gate in provenance["gates"] if gate["gate"] == "speed"]
        # Times differ from run to run, and archives must not.
        assert (speed["measured"], speed["detail"]) == (None, "at least as fast as fp32 on the exporting machine")
        assert [gate.measured for gate in report.gates if gate.gate == "speed"] == [0.7]

    def test_a_slower_artifact_is_refused_and_with_leave_says_that_it_may_be(
        self,
        module: torch.nn.Module,
        module_is: Callable[[torch.nn.Module], None],
        options: Callable[..., ExportOptions],
        store: Path,
        measured: Callable[[float], None],
    ) -> None:
        module_is(module)
        measured(1.5)
        said = refused(options(precision="bf16"))
        assert "speed: 0.67 times as fast as fp32" in said
        report = export_archive(options(name="slow", precision="bf16", allow_slower=True))
        assert [gate.measured for gate in report.gates if gate.gate == "speed"] == [1.5]
        (speed,) = [
            gate
            for gate in open_archive(store / "slow.mar").read_json("provenance.json")["gates"]
            if gate["gate"] == "speed"
        ]
        assert (speed["measured"], speed["passed"], speed["detail"]) == (None, True, "might be slower than fp32")


class TestDocuments:
    def test_model_card_and_licence_travel(
        self, checkpoint: Path, options: Callable[..., ExportOptions], store: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        run.mkdir()
        shutil.copy(checkpoint, run)
        (run / "model_card.md").write_text("# Brightness\n")
        (tmp_path / "COPYING").write_text("Do as you like.\n")
        export_archive(options(source=run, licence=tmp_path / "COPYING"))
        archive = open_archive(store / "brightness.mar")
        assert archive.read("MODEL_CARD.md") == b"# Brightness\n"
        assert archive.read("LICENSE") == b"Do as you like.\n"
        (tmp_path / "card.md").write_text("# Another\n")
        export_archive(options(source=run, model_card=tmp_path / "card.md"))
        assert open_archive(store / "brightness.mar").read("MODEL_CARD.md") == b"# Another\n"

    def test_an_eager_archive_carries_the_source_of_its_module(
        self, options: Callable[..., ExportOptions], store: Path
    ) -> None:
        export_archive(options(name="eager", format="eager"))
        archive = open_archive(store / "eager.mar")
        assert {"source/models/convnet.py", "source/models/blocks.py"} <= archive.digests.keys()

    def test_a_staged_folder_is_no_archive(self, options: Callable[..., ExportOptions], store: Path) -> None:
        report = export_archive(options(name="staged", staging_only=True))
        assert report.archive is None
        assert report.staged is not None
        assert (report.staged.path / "pack.sh").is_file()
        assert not (store / "staged.mar").exists()
        assert json.loads(json.dumps(report.to_document()))["staged"]["command"].startswith("torch-model-archiver")


def test_a_candidate_can_be_looked_at_without_packing_it_and_packed_later(
    checkpoint: Path, evaluation_folder: Path, options: Callable[..., ExportOptions], store: Path, tmp_path: Path
) -> None:
    prepared = prepare(Source(path=checkpoint, evaluation=evaluation_folder))
    candidate = convert_and_check(prepared, Combination(format="torchscript", precision="fp32"), tmp_path)
    assert candidate.passed
    assert not (store / "later.mar").exists()
    report = pack(options(name="later"), prepared, candidate)
    assert report.archive == store / "later.mar"
    failed = replace(candidate, gates=(*candidate.gates, GateResult(gate="mine", passed=False, detail="no")))
    with pytest.raises(GateError, match=r"fails 1 of 14 gates, so there is no archive \(mine: no\)") as caught:
        pack(options(name="never"), prepared, failed)
    assert [gate.gate for gate in caught.value.gates][-1] == "mine"
    assert not (store / "never.mar").exists()
