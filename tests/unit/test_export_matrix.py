"""The matrix: what fails is a line of it, and the fastest of what passes is packed. Conversions run in process."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from export.archive import open_archive
from export.checkpoint import load_checkpoint
from export.combinations import Combination
from export.convert import convert
from export.errors import CheckpointError, ConversionError, GateError, MeasurementError
from export.gates import GateResult
from export.matrix import Matrix, pack_best, run_matrix
from export.matrix_report import PAGE, RESULTS, check_folder, render_page, write_report
from export.matrix_table import print_matrix
from export.memory import Memory
from export.pipeline import ExportOptions
from export.speed import Shape, Timing
from export.thresholds import Thresholds
from handlers.artifact import Artifact, ModuleSource

OFFERED = (
    Combination(format="torchscript", precision="fp32"),
    Combination(format="torchscript", precision="bf16"),
    Combination(format="onnx", precision="fp32"),
    Combination(format="onnx", precision="int8"),
    Combination(format="eager", precision="fp32"),
    Combination(format="eager", precision="bf16"),
)
VOID = {"meta", "link", "img", "br", "hr", "input", "use", "path", "circle", "rect"}


class Workshop:
    """Conversions in this process; faults, times and gates as a test wants them.

    Attributes:
        converted: Names of what was converted, in order.
        faults: What a conversion raises instead.
        ms: Time of one sample by name; 10 by default.
        slow: What the speed gate refuses.
        broken: What fails in a fresh process.
    """

    def __init__(self) -> None:
        self.converted: list[str] = []
        self.faults: dict[str, Exception] = {}
        self.ms: dict[str, float] = {}
        self.slow: set[str] = set()
        self.broken: set[str] = set()

    def convert(self, source: Path, folder: Path, *, format: str, precision: str, **options: Any) -> Artifact:
        name = f"{format} {precision}"
        self.converted.append(name)
        if name in self.faults:
            raise self.faults[name]
        loaded = load_checkpoint(source)
        combination = Combination(format=format, precision=precision)
        origin = ModuleSource(factory=loaded.factory, config=loaded.config)
        return convert(loaded.module, loaded.signature, folder, combination=combination, origin=origin)

    def speed_gate(self, served: Any, baseline: Any, signature: Any, thresholds: Any, **options: Any) -> GateResult:
        name = f"{signature.artifact.format} {signature.artifact.precision}"
        return GateResult(gate="speed", passed=name not in self.slow, measured=1.5, detail="0.67 times as fast")

    def memory(self, folder: Path, batches: Sequence[Any]) -> Memory:
        if folder.name.replace("-", " ") in self.broken:
            raise MeasurementError("it fails in a fresh process: no")
        return Memory(peak_bytes=200_000_000, before_bytes=30_000_000)

    def measure(
        self, backends: Mapping[str, Any], signature: Any, *, shapes: Sequence[Shape], rounds: int, limit_s: float
    ) -> dict[str, list[Timing]]:
        def timing(name: str, shape: Shape) -> Timing:
            seconds = self.ms.get(name, 10.0) * shape.batch / 1e3
            return Timing(
                shape=shape, ms=seconds * 1e3, samples_per_s=shape.batch / seconds, ratio=1, rounds_s=(seconds,) * 3
            )

        return {name: [timing(name, shape) for shape in shapes] for name in backends}


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    workshop = Workshop()
    monkeypatch.setattr("export.candidate.convert_in_fresh_process", workshop.convert)
    monkeypatch.setattr("export.candidate.speed_gate", workshop.speed_gate)
    monkeypatch.setattr("export.matrix.measure_memory", workshop.memory)
    monkeypatch.setattr("export.matrix.measure", workshop.measure)
    # No ONNX here: it takes seconds.
    offer(monkeypatch, "torchscript", "eager")
    return workshop


def offer(monkeypatch: pytest.MonkeyPatch, *formats: str) -> None:
    monkeypatch.setattr("export.matrix.allowed", lambda device: tuple(one for one in OFFERED if one.format in formats))


@pytest.fixture
def options(checkpoint: Path, evaluation_folder: Path, tmp_path: Path) -> ExportOptions:
    return ExportOptions(
        source=checkpoint, name="brightness", evaluation=evaluation_folder, out=tmp_path / "store", version="7"
    )


@pytest.fixture
def run(options: ExportOptions, tmp_path: Path) -> Callable[..., Matrix]:
    def run(**arguments: Any) -> Matrix:
        folder = tmp_path / "artifacts"
        folder.mkdir()
        return run_matrix(options, folder, **arguments)

    return run


def statuses(matrix: Matrix) -> dict[str, str]:
    return {entry.name: entry.status for entry in matrix.entries}


def test_what_fails_is_a_line_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, workshop: Workshop, run: Callable[..., Matrix]
) -> None:
    offer(monkeypatch, "torchscript", "onnx", "eager")
    workshop.faults = {
        "onnx fp32": ConversionError("torch.export fails: <b>"),
        "onnx int8": ConversionError("nothing to quantise"),
        "eager fp32": ValueError("a defect"),
    }
    workshop.slow = {"torchscript bf16"}
    matrix = run()
    assert statuses(matrix) == {
        "torchscript fp32": "passed",
        "torchscript bf16": "failed",
        "onnx fp32": "refused",
        "onnx int8": "refused",
        "eager fp32": "refused",
        "eager bf16": "refused",  # there is no fp32 artifact to measure it against
    }
    reasons = {entry.name: entry.reason for entry in matrix.entries}
    assert reasons["torchscript fp32"] is None
    assert reasons["torchscript bf16"] == "speed: 0.67 times as fast"
    assert reasons["onnx int8"] == "nothing to quantise"
    assert reasons["eager fp32"] == "unexpected ValueError: a defect"
    assert matrix.ok
    # What is only too slow is measured, but does not win.
    assert [entry.name for entry in matrix.measured] == ["torchscript fp32", "torchscript bf16"]
    assert matrix.winner is not None
    assert matrix.winner.name == "torchscript fp32"
    assert matrix.not_offered["eager int8"].startswith("int8 eager is not offered")


def test_a_process_of_its_own_must_run_it_too(workshop: Workshop, run: Callable[..., Matrix]) -> None:
    workshop.broken = {"torchscript fp32"}
    matrix = run(formats=["torchscript"], precisions=["fp32"])
    assert statuses(matrix) == {"torchscript fp32": "failed"}
    assert matrix.entries[0].reason == "it fails in a fresh process: no"
    assert not matrix.ok
    assert (matrix.winner, matrix.baseline, matrix.shapes) == (None, None, ())


def test_each_is_converted_once_and_the_steps_are_told(workshop: Workshop, run: Callable[..., Matrix]) -> None:
    steps: list[str] = []
    run(step=steps.append)
    assert workshop.converted == ["torchscript fp32", "torchscript bf16", "eager fp32", "eager bf16"]
    assert steps[0] == "reading the checkpoint"
    assert "2 of 4, torchscript bf16: converting to torchscript bf16" in steps
    assert "2 of 4, torchscript bf16: measuring against fp32" in steps
    assert "4 of 4, eager bf16: measuring memory" in steps
    assert steps[-1] == "4 artifacts take turns: batch 32 (3 of 3)"


def test_fp32_is_made_to_compare_with_and_never_wins(workshop: Workshop, run: Callable[..., Matrix]) -> None:
    workshop.ms = {"torchscript fp32": 1.0, "eager fp32": 20.0, "eager bf16": 5.0}
    matrix = run(precisions=["bf16"])
    assert [entry.wanted for entry in matrix.entries] == [False, True, False, True]
    assert matrix.winner is not None
    assert matrix.winner.name == "eager bf16"
    document = {f"{one['format']} {one['precision']}": one for one in matrix.to_document()["combinations"]}
    assert document["torchscript fp32"]["only_to_compare"] is True
    assert document["eager bf16"]["times_as_fast_as_fp32"] == pytest.approx(4)
    assert document["eager bf16"]["times_as_fast_as_baseline"] == pytest.approx(0.2)
    assert matrix.baseline == "torchscript fp32"


def test_loosened_thresholds_are_said(
    workshop: Workshop, options: ExportOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loose = replace(options, thresholds=Thresholds(noise=1.0))
    folder = tmp_path / "artifacts"
    folder.mkdir()
    matrix = run_matrix(loose, folder, precisions=["fp32"])
    words = "fp32: thresholds looser than the defaults: noise 1 (default 5e-05)"
    assert matrix.loosened == (words,)
    assert matrix.to_document()["loosened"] == [words]
    print_matrix(matrix, Console())
    assert words in capsys.readouterr().out
    assert words in render_page(matrix, command="")


def test_the_document_has_all_figures(workshop: Workshop, run: Callable[..., Matrix]) -> None:
    workshop.ms = {"eager fp32": 4.0}
    matrix = run()
    document = json.loads(json.dumps(matrix.to_document(), allow_nan=False))
    assert (document["device"], document["threads"], document["evaluated"]) == ("cpu", 1, 12)
    assert document["best"]["combination"] == "eager fp32"
    assert document["best"]["samples_per_s"] == pytest.approx(250)
    one = next(one for one in document["combinations"] if (one["format"], one["precision"]) == ("eager", "fp32"))
    assert one["bytes"] > 1000
    assert one["largest_difference"] < 1e-5
    assert one["noise"]["gate"] == "noise on evaluation data"
    assert one["agreement"] == {"gate": "top-1 agreement", "measured": 1.0, "bound": 1.0, "passed": True}
    assert one["accuracy"]["measured"] == 1.0
    assert one["memory"] == {"peak_bytes": 200_000_000, "before_bytes": 30_000_000, "gpu_bytes": None}
    assert one["times_as_fast_as_fp32"] == 1
    assert one["times_as_fast_as_baseline"] == pytest.approx(2.5)
    assert [timing["batch"] for timing in one["timings"]] == [1, 8, 32]
    assert one["timings"][1]["ms"] == pytest.approx(32)
    assert one["timings"][1]["samples_per_s"] == pytest.approx(250)
    assert one["timings"][1]["times_as_fast_as_baseline"] == pytest.approx(2.5)
    assert {gate["gate"] for gate in one["gates"]} >= {"parity", "noise", "accuracy"}
    bf16 = document["combinations"][1]
    assert bf16["largest_difference"] > one["largest_difference"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": ["pt3"]}, "the format 'pt3' is not known"),
        ({"precisions": ["fp8"]}, "the precision 'fp8' is not known"),
        ({"formats": ["onnx"], "precisions": ["bf16"]}, "bf16 ONNX is not offered"),
        ({"precisions": ["fp16"]}, "fp16 on a CPU is not offered"),
    ],
)
def test_what_leaves_nothing_is_refused(
    options: ExportOptions, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        run_matrix(options, tmp_path, **arguments)


def test_an_unknown_device_is_refused(options: ExportOptions, tmp_path: Path) -> None:
    unknown = ExportOptions(source=options.source, name="x", device="tpu")
    with pytest.raises(ConversionError, match="the device 'tpu' is not known"):
        run_matrix(unknown, tmp_path)


def test_a_checkpoint_that_fails_ends_it(workshop: Workshop, run: Callable[..., Matrix]) -> None:
    workshop.faults = {"torchscript fp32": CheckpointError("the checkpoint's own model fails")}
    with pytest.raises(CheckpointError):
        run()
    assert workshop.converted == ["torchscript fp32"]


def test_the_fastest_that_passes_is_packed(
    workshop: Workshop, run: Callable[..., Matrix], options: ExportOptions, tmp_path: Path
) -> None:
    workshop.ms = {"torchscript bf16": 1.0, "eager bf16": 5.0}
    workshop.slow = {"torchscript bf16"}
    report = pack_best(options, run())
    assert report.archive == tmp_path / "store" / "brightness.mar"
    archive = open_archive(report.archive)
    assert archive.version == "7"
    artifact = archive.read_json("provenance.json")["artifact"]
    assert (artifact["format"], artifact["precision"]) == ("eager", "bf16")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["brightness.mar"]


def test_nothing_is_packed_when_nothing_passes(
    workshop: Workshop, run: Callable[..., Matrix], options: ExportOptions, tmp_path: Path
) -> None:
    workshop.faults = {"torchscript fp32": ConversionError("no"), "torchscript bf16": ConversionError("no")}
    matrix = run(formats=["torchscript"])
    with pytest.raises(GateError, match="no combination passes every gate"):
        pack_best(options, matrix)
    assert not (tmp_path / "store").exists()


class Balance(HTMLParser):
    """Checks that every element is closed, and that no id is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str | None] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("faults", [{}, {"eager fp32": "<script>"}, dict.fromkeys(["torchscript fp32"], "no")])
def test_the_report_is_a_whole_page_and_a_document(
    workshop: Workshop, run: Callable[..., Matrix], tmp_path: Path, faults: dict[str, str]
) -> None:
    workshop.faults = {name: ConversionError(message) for name, message in faults.items()}
    workshop.slow = {"eager bf16"}
    matrix = run(formats=["torchscript"], precisions=["fp32"]) if "torchscript fp32" in faults else run()
    folder = tmp_path / "deep" / "report"
    files = write_report(matrix, folder, command="torchport export <x>")
    assert sorted(path.name for path in folder.iterdir()) == [PAGE, RESULTS]

    page = files.page.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|action|data|poster)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"<link|<script|@import|url\(\s*['\"]?(?!#)", page)
    assert not re.search(r"#0[1-7]0[1-7]0[1-7]", page)
    assert "prefers-color-scheme: dark" in page
    assert "torchport export &lt;x&gt;" in page
    assert page.count("<svg") == (2 if matrix.measured else 0)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    document = json.loads(files.results.read_bytes())
    assert document["command"] == "torchport export <x>"
    assert len(document["combinations"]) == len(matrix.entries)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MeasurementError, match="give another folder with --report"):
        check_folder(tmp_path / "file" / "report")
    check_folder(tmp_path / "new" / "report")
