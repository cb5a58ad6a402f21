import json

import numpy as np
import pytest

from handlers import classification
from handlers.classification import TOP_K, Classifier
from handlers.errors import InferenceError

LABELS = ("a", "b", "c", "d", "e", "f", "g")


def answer(*logits, labels=LABELS):
    return Classifier(labels[: len(logits)]).answer(np.array(logits, dtype=np.float32))


def test_probabilities_are_the_softmax():
    logits = np.array([0.5, 2.0, -1.0])
    expected = np.exp(logits) / np.exp(logits).sum()
    found = {item["label"]: item["probability"] for item in answer(*logits)["top_k"]}
    assert found == pytest.approx(dict(zip("abc", expected, strict=True)), abs=1e-6)


def test_the_likeliest_class_comes_first_and_names_the_answer():
    result = answer(1, 3, 2)
    assert [item["label"] for item in result["top_k"]] == ["b", "c", "a"]
    assert (result["label"], result["probability"]) == ("b", result["top_k"][0]["probability"])


def test_ties_go_to_the_first_class():
    assert [item["label"] for item in answer(1, 2, 2, 2)["top_k"]] == ["b", "c", "d", "a"]


def test_only_the_first_few_classes_are_listed():
    assert len(answer(*range(7))["top_k"]) == TOP_K
    assert len(answer(1, 2)["top_k"]) == 2


@pytest.mark.parametrize("top_k", [1, 5, 7])
def test_a_request_may_ask_for_more_or_fewer(top_k):
    result = Classifier(LABELS).answer(np.arange(7, dtype=np.float32), top_k)
    assert [item["label"] for item in result["top_k"]] == list("gfedcba")[:top_k]
    assert result["label"] == "g"


def test_huge_logits_do_not_overflow():
    assert answer(3e38, -3e38, 0)["probability"] == 1.0


def test_the_answer_is_plain_json():
    assert json.loads(json.dumps(answer(1, 2))) == answer(1, 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_many_classes_are_ranked_like_few(dtype, monkeypatch):
    draws = np.random.default_rng(5).normal(scale=4, size=(50, 20)).round(1).astype(dtype)  # some are equal
    classifier = Classifier(tuple(f"class {i}" for i in range(20)))
    few = [classifier.answer(logits, 20) for logits in draws]
    monkeypatch.setattr(classification, "_FEW_CLASSES", 0)
    many = [classifier.answer(logits, 20) for logits in draws]
    assert [[item["label"] for item in each["top_k"]] for each in few] == [
        [item["label"] for item in each["top_k"]] for each in many
    ]
    found, expected = ([[item["probability"] for item in each["top_k"]] for each in side] for side in (few, many))
    assert np.allclose(found, expected, rtol=0, atol=1.1e-6)


@pytest.mark.parametrize("classes", [2, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_our_own_defect(bad, classes):
    logits = np.array([1.0] * (classes - 1) + [bad], dtype=np.float32)
    with pytest.raises(InferenceError) as caught:
        Classifier(tuple(map(str, range(classes)))).answer(logits)
    assert (caught.value.status, caught.value.code) == (500, "model_output_not_finite")
