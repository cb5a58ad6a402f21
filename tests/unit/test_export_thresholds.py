"""Thresholds: defaults by precision, and files of the user's."""

from pathlib import Path

import pytest

from export.errors import ThresholdError
from export.thresholds import Thresholds, load_thresholds


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "thresholds.yaml"


def test_the_defaults_are_those_that_were_promised() -> None:
    fp32, bf16, int8 = (Thresholds.of(precision) for precision in ("fp32", "bf16", "int8"))
    assert (fp32.atol, fp32.rtol, fp32.agreement) == (1e-4, 1e-3, 1.0)
    assert Thresholds.of("fp16") == bf16
    assert (bf16.atol, bf16.agreement) == (None, 0.995)
    assert (int8.atol, int8.agreement, int8.metric_drop) == (None, 0.98, 0.01)
    assert fp32.noise < bf16.noise < int8.noise


def test_what_a_file_leaves_out_keeps_its_default(file: Path) -> None:
    file.write_text("metric_drop: 0.02\nnoise: 1e-3\nint8:\n  noise: 0.3\n  atol:\n")
    fp32, int8 = load_thresholds(file, "fp32"), load_thresholds(file, "int8")
    assert (fp32.metric_drop, fp32.noise, fp32.atol) == (0.02, 0.001, 1e-4)
    assert (int8.metric_drop, int8.noise, int8.agreement) == (0.02, 0.3, 0.98)


def test_an_empty_file_changes_nothing_and_json_does_as_well(file: Path, tmp_path: Path) -> None:
    file.write_text("# nothing\n")
    assert load_thresholds(file, "bf16") == Thresholds.of("bf16")
    (tmp_path / "thresholds.json").write_text('{"bf16": {"atol": 0.5}}')
    assert load_thresholds(tmp_path / "thresholds.json", "bf16").atol == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metric_dorp: 0.1", r"thresholds\.metric_dorp is not a known field; did you mean 'metric_drop'\?"),
        ("int8:\n  nosie: 0.1", r"thresholds\.int8\.nosie is not a known field; did you mean 'noise'\?"),
        ("int4:\n  noise: 0.1", r"thresholds\.int4 is not a known field; did you mean 'int8'\?"),
        ("atol: -1", r"the threshold 'atol' is -1; it must be at least 0"),
        ("noise: -1", r"the threshold 'noise' is -1; it must be from 0 to 1"),
        ("noise: 1.5", r"the threshold 'noise' is 1\.5; it must be from 0 to 1"),
        ("int8:\n  random_noise: 1e9", r"the threshold 'random_noise' is 1e\+09; it must be from 0 to 1"),
        ("slowdown: 101", r"the threshold 'slowdown' is 101; it must be from 0 to 100"),
        ("least_accuracy: 60", r"the threshold 'least_accuracy' is 60; it must be from 0 to 1"),
        ("agreement: 98", r"the threshold 'agreement' is 98; it must be from 0 to 1"),
        ("noise: many", r"thresholds\.noise must be a finite number, not 'many'"),
        ("noise: .nan", r"thresholds\.noise must be a finite number"),
        ("noise: true", r"thresholds\.noise must be a finite number"),
        ("noise:", r"the threshold 'noise' is empty; give a number, or remove it"),
        ("int8: 3", r"thresholds\.int8 must be a mapping"),
        ("- 1", r"thresholds must be a mapping"),
        ("noise: 1\nnoise: 2", r"is not valid YAML at line 2: the key 'noise' comes twice"),
        ("noise: [", r"is not valid YAML"),
        ("2026-13-01: 1", r"is not valid YAML"),
        ("b'\\xff'", r"thresholds must be a mapping"),
    ],
)
def test_a_slip_is_named_whatever_precision_is_exported(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ThresholdError, match=message) as caught:
        load_thresholds(file, "fp32")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ThresholdError, match=r"the thresholds .*nope cannot be read: No such file"):
        load_thresholds(tmp_path / "nope", "fp32")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ThresholdError, match="is not UTF-8 text"):
        load_thresholds(tmp_path / "bytes", "fp32")


def test_what_is_looser_than_the_defaults_is_named() -> None:
    assert Thresholds.of("int8").looser_than_defaults("int8") is None
    stricter = Thresholds(noise=1e-6, slowdown=1.0, agreement=1.0)
    assert stricter.looser_than_defaults("fp32") is None
    loose = Thresholds(atol=None, noise=0.5, agreement=0.9, least_accuracy=0.1)
    assert loose.looser_than_defaults("fp32") == (
        "thresholds looser than the defaults: atol none (default 0.0001), noise 0.5 (default 5e-05), "
        "agreement 0.9 (default 1), least_accuracy 0.1 (default none)"
    )


def test_a_record_is_read_back_whatever_else_is_in_it() -> None:
    for precision in ("fp32", "int8"):
        default = Thresholds.of(precision)
        assert Thresholds.from_document(default.to_document(), precision) == default
    found = Thresholds.from_document({"noise": "much", "rtol": None, "other": 1, "atol": 0.5}, "fp32")
    assert found == Thresholds(atol=0.5)
