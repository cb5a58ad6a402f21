import json

import numpy as np
import pytest

from handlers.answering import Answerer
from handlers.decoder import Decoded
from handlers.errors import InferenceError
from handlers.signature import TENSOR, Signature
from handlers.tensors import TensorSpec


@pytest.fixture
def tensors():
    spec = TensorSpec(name="x", dtype="float32", shape=("batch",))
    answerer = Answerer(Signature(task=TENSOR, inputs=(spec,), outputs=(spec,)))
    return lambda outputs: answerer.answer(Decoded(samples=[{}], many=False), [outputs], {})


def test_classes_are_answered_with_labels(signature):
    answer = Answerer(signature).answer(Decoded(samples=[{}], many=False), [{"logits": np.float32([0, 3, 1])}], {})
    assert answer["label"] == "mid"


def test_tensors_are_answered_as_nested_lists(tensors):
    answer = tensors({"a": np.float32([[0.5, 1], [2, 3]]), "b": np.int64(7), "c": np.array([True])})
    assert json.loads(json.dumps(answer)) == {"outputs": {"a": [[0.5, 1.0], [2.0, 3.0]], "b": 7, "c": [True]}}


def test_floats_come_back_exactly(tensors):
    values = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    body = json.loads(json.dumps(tensors({"a": values})))
    np.testing.assert_array_equal(np.float32(body["outputs"]["a"]), values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_our_own_defect(tensors, bad):
    with pytest.raises(InferenceError) as caught:
        tensors({"a": np.float32([1]), "b": np.float32([1, bad])})
    assert (caught.value.status, caught.value.code) == (500, "model_output_not_finite")
