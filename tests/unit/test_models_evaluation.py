"""The confusion matrix and the report made of it, against scikit-learn."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import classification_report, confusion_matrix, log_loss

from models.errors import EvaluationError
from models.evaluation import ClassificationReport, ConfusionMatrix

NAMES = ("dark", "mid", "bright", "odd")


def random_batch(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(NAMES), (samples,), generator=generator)
    logits = torch.randn(samples, len(NAMES), generator=generator)
    logits[torch.arange(samples), labels] += 0.7
    return logits, labels


def measure(logits: torch.Tensor, labels: torch.Tensor, *, batch_size: int = 32) -> ConfusionMatrix:
    matrix = ConfusionMatrix(NAMES)
    for part, part_labels in zip(logits.split(batch_size), labels.split(batch_size), strict=True):
        matrix.update(part, part_labels)
    return matrix


@pytest.mark.parametrize("batch_size", [1, 32, 1000])
def test_the_report_is_that_of_scikit_learn(batch_size: int) -> None:
    logits, labels = random_batch(500, seed=0)
    report = measure(logits, labels, batch_size=batch_size).report()

    predicted = logits.argmax(dim=1).numpy()
    expected = classification_report(labels.numpy(), predicted, target_names=NAMES, output_dict=True)
    assert report.samples == 500
    assert report.accuracy == pytest.approx(expected["accuracy"])
    assert report.macro_f1 == pytest.approx(expected["macro avg"]["f1-score"])
    assert report.weighted_f1 == pytest.approx(expected["weighted avg"]["f1-score"])
    for entry in report.classes:
        assert entry.precision == pytest.approx(expected[entry.name]["precision"])
        assert entry.recall == pytest.approx(expected[entry.name]["recall"])
        assert entry.f1 == pytest.approx(expected[entry.name]["f1-score"])
        assert entry.support == expected[entry.name]["support"]
    assert tuple(entry.name for entry in report.classes) == NAMES
    assert np.array_equal(report.confusion, confusion_matrix(labels.numpy(), predicted))
    assert report.loss == pytest.approx(log_loss(labels.numpy(), logits.softmax(dim=1).numpy()), rel=1e-5)


def test_rows_are_the_true_classes() -> None:
    matrix = ConfusionMatrix(("a", "b"))

    matrix.update(torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1, 0]))

    assert matrix.report().confusion == ((1, 1), (0, 1))


def test_a_class_that_is_absent_or_never_predicted_gives_zero() -> None:
    matrix = ConfusionMatrix(("a", "never predicted", "absent"))
    matrix.update(torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]), torch.tensor([0, 1]))

    report = matrix.report()

    a, unpredicted, absent = report.classes
    assert (a.precision, a.recall, a.f1) == (0.5, 1.0, pytest.approx(2 / 3))
    assert (unpredicted.precision, unpredicted.recall, unpredicted.f1, unpredicted.support) == (0, 0, 0, 1)
    assert (absent.precision, absent.recall, absent.f1, absent.support) == (0, 0, 0, 0)
    assert report.macro_f1 == pytest.approx(2 / 9)
    assert report.weighted_f1 == pytest.approx(1 / 3)


def test_the_sums_of_two_processes_are_those_of_one() -> None:
    logits, labels = random_batch(101, seed=1)
    whole = measure(logits, labels).report()
    first, second = measure(logits[::2], labels[::2]), measure(logits[1::2], labels[1::2])

    first.counts += second.counts
    first.loss_sum += second.loss_sum

    summed = first.report()
    assert summed.loss == pytest.approx(whole.loss, rel=1e-6)
    assert dataclasses.replace(summed, loss=whole.loss) == whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_full(dtype: torch.dtype) -> None:
    logits = torch.zeros(4000, 4, dtype=dtype)
    logits[:, 1] = 30  # a loss of 30 each: together beyond what float16 holds

    report = measure(logits, torch.zeros(4000, dtype=torch.int64), batch_size=4000).report()

    assert report.loss == pytest.approx(30.0, rel=1e-3)


def test_the_json_form_reads_back() -> None:
    report = measure(*random_batch(50, seed=2)).report()

    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))

    assert ClassificationReport.from_dict(document) == report
    assert document["confusion"] == [list(row) for row in report.confusion]


@pytest.mark.parametrize("document", [{}, {"classes": 3, "confusion": []}, {"classes": [{"x": 1}], "confusion": []}])
def test_another_document_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(EvaluationError, match="This is not a classification report"):
        ClassificationReport.from_dict(document)


def test_what_does_not_fit_is_refused_and_not_counted() -> None:
    matrix = ConfusionMatrix(NAMES)

    with pytest.raises(EvaluationError, match=r"The logits are \[2, 3\] and the labels \[2\], where \[B, 4\]"):
        matrix.update(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(EvaluationError, match="The labels run from -1 to 1, and there are 4 classes, 0 to 3"):
        matrix.update(torch.zeros(2, 4), torch.tensor([-1, 1]))
    with pytest.raises(EvaluationError, match="The labels run from 0 to 4"):
        matrix.update(torch.zeros(2, 4), torch.tensor([0, 4]))
    assert not matrix.counts.any()


def test_nothing_measured_is_no_report() -> None:
    matrix = ConfusionMatrix(NAMES)
    matrix.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))

    with pytest.raises(EvaluationError, match="No sample was evaluated"):
        matrix.report()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_counting_on_the_gpu_gives_the_same() -> None:
    logits, labels = random_batch(200, seed=3)
    matrix = ConfusionMatrix(NAMES, device=torch.device("cuda"))

    matrix.update(logits.cuda(), labels.cuda())

    report, expected = matrix.report(), measure(logits, labels).report()
    assert report.confusion == expected.confusion
    assert report.loss == pytest.approx(expected.loss, rel=1e-5)
