import json

from handlers.metadata import describe
from handlers.signature import Signature

from .test_handlers_open_inference import PAIR, TEXT


def test_tensors_are_described_with_their_axes_and_bounds():
    assert describe(PAIR, name="m", version="2", max_batch=8, max_answer_bytes=99) == {
        "name": "m",
        "versions": ["2"],
        "platform": "pytorch",
        "inputs": [
            {"name": "ids", "datatype": "INT64", "shape": [-1, -1], "minimum": 0, "maximum": 99},
            {"name": "scale", "datatype": "FP32", "shape": [-1], "minimum": -9, "maximum": 9},
        ],
        "outputs": [
            {"name": "scaled", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "total", "datatype": "INT64", "shape": [-1]},
        ],
        "task": "tensor",
        "labels": [],
        "limits": {
            "max_request_bytes": 16777216,
            "max_samples": 256,
            "max_batch": 8,
            "max_answer_bytes": 99,
            "axes": {"length": {"minimum": 1, "maximum": 5}},
        },
    }


def test_texts_go_in_as_strings():
    document = describe(TEXT, name="m", version="2", max_batch=8)
    assert document["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert document["labels"] == ["no", "yes"]
    assert document["preprocessing"] == {"text": {"tokenizer": "tokenizer.json", "max_length": 6, "pad_id": 0}}
    assert (document["limits"]["max_tokens"], document["limits"]["max_text_chars"]) == (6, 100_000)


def test_images_are_described_with_their_preprocessing(served_signature):
    document = describe(served_signature, name="m", version="2", max_batch=8)
    assert document["platform"] == "pytorch_torchscript"
    assert document["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    assert [(output["name"], output["shape"]) for output in document["outputs"]] == [
        ("label", [-1]),
        ("probability", [-1]),
        ("top_k_label", [-1, -1]),
        ("top_k_probability", [-1, -1]),
        ("logits", [-1, 3]),
    ]
    assert document["preprocessing"]["image"]["height"] == 8
    assert document["limits"]["max_pixels"] == 16777216


def test_a_model_s_own_output_may_be_called_like_one_of_ours(signature_document):
    signature_document["outputs"][0]["name"] = "probability"
    document = describe(Signature.from_document(signature_document), name="m", version="2", max_batch=8)
    assert [(output["name"], output["shape"]) for output in document["outputs"]] == [
        ("label", [-1]),
        ("probability", [-1, 3]),
        ("top_k_label", [-1, -1]),
        ("top_k_probability", [-1, -1]),
    ]


def test_it_is_json(signature):
    json.dumps(describe(signature, name="m", version="2", max_batch=8), allow_nan=False)
