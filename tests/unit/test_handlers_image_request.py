"""Every form of a request of images, one batch of all of them, and the parameters."""

import base64
import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from handlers.model import ServedModel
from handlers.request import Part


@pytest.fixture
def model(served_signature, brightness_backend):
    return ServedModel(served_signature, brightness_backend, max_batch=4, identity={"model": "m", "version": "1"})


def as_json(document):
    return [Part(value=json.dumps(document).encode(), content_type="application/json")]


def forms(data):
    """Requests of one image in every form, by name, with what their answers' labels are."""
    pixels = np.asarray(Image.open(io.BytesIO(data))).tolist()
    b64 = base64.b64encode(data).decode()
    element = struct.pack("<I", len(data)) + data
    head = {"name": "image", "datatype": "BYTES", "shape": [1]}
    binary = json.dumps({"inputs": [{**head, "parameters": {"binary_data_size": len(element)}}]}).encode()
    file = Part(value=data, content_type="image/png", name="file")
    parameters = Part(value=b'{"top_k": 2}', content_type="", name="parameters")
    return {
        "file": [file],
        "bytes of no type": [Part(value=bytearray(data), content_type="")],
        "bytes": [Part(value=data, content_type="application/octet-stream")],
        "pixels": as_json({"inputs": pixels}),
        "pixels that TorchServe has parsed": [Part(value={"inputs": pixels}, content_type="application/json")],
        "base64": as_json({"inputs": {"b64": b64}}),
        "several": as_json({"inputs": [pixels, pixels]}),
        "instances": as_json({"instances": [pixels, {"b64": b64}]}),
        "instances and parameters": as_json({"instances": [{"b64": b64}], "parameters": {"top_k": 1}}),
        "multipart": [file, file],
        "multipart and parameters": [file, parameters, file],
        "file and parameters": [file, parameters],
        "open inference": as_json({"id": "1", "inputs": [{**head, "data": [b64]}]}),
        "open inference and bytes": [
            Part(value=binary + element, content_type="application/octet-stream", json_bytes=len(binary))
        ],
    }


def labels(body):
    if "outputs" in body:
        return body["outputs"][0]["data"]
    return [item["label"] for item in body.get("predictions", [body])]


def top_k(body):
    return [len(item["top_k"]) for item in body.get("predictions", [body])]


def test_a_batch_of_all_forms_has_the_answers_of_each_alone(model, picture):
    requests = []
    expected = []
    for label in ("dark", "mid", "bright"):
        for name, parts in forms(picture(label)).items():
            requests.append(parts)
            (alone,) = model.answer([parts])
            assert alone.error is None, name
            assert set(labels(alone.body)) == {label}, name
            expected.append(alone.body)
    # Turned over, so that every form has other neighbours, and with faults between.
    order = np.random.default_rng(0).permutation(len(requests)).tolist()
    faults = [as_json({"inputs": 1}), [], as_json({"inputs": [{"name": "x", "shape": [1]}]})]
    mixed = [parts for i in order for parts in (requests[i], faults[i % 3])]
    answers = model.answer(mixed)
    assert [answer.body for answer in answers[::2]] == [expected[i] for i in order]
    assert {answer.error.status for answer in answers[1::2]} == {400, 422}


@pytest.mark.parametrize(
    ("form", "counts"),
    [
        ("file", [3]),
        ("file and parameters", [2]),
        ("multipart", [3, 3]),
        ("multipart and parameters", [2, 2]),
        ("instances and parameters", [1]),
    ],
)
def test_top_k_is_what_the_request_says(model, picture, form, counts):
    (answer,) = model.answer([forms(picture("mid"))[form]])
    assert top_k(answer.body) == counts


@pytest.mark.parametrize(
    ("parameters", "status", "code"),
    [
        ({"top_k": 4}, 422, "wrong_parameter"),
        ({"top_k": 0}, 422, "wrong_parameter"),
        ({"topk": 1}, 422, "unknown_parameter"),
        ([1], 400, "wrong_parameters"),
    ],
)
def test_wrong_parameters_hurt_only_their_own_request(model, picture, parameters, status, code):
    file = Part(value=picture("mid"), content_type="image/png")
    part = Part(value=json.dumps(parameters).encode(), content_type="application/json", name="parameters")
    answers = model.answer([[file], [file, part], as_json({"inputs": [[0] * 8] * 8, "parameters": parameters})])
    assert [answer.error and (answer.error.status, answer.error.code) for answer in answers] == [
        None,
        (status, code),
        (status, code),
    ]


@pytest.mark.parametrize("form", ["multipart", "base64", "open"])
def test_many_large_images_are_refused_before_one_is_decoded(served_signature, brightness_backend, form, encode):
    large = encode(Image.new("1", (4096, 4096)))
    assert len(large) < 10_000
    b64 = base64.b64encode(large).decode()
    request = {
        "multipart": [Part(value=large, content_type="image/png")] * 20,
        "base64": as_json({"instances": [{"b64": b64}] * 20}),
        "open": as_json({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [20], "data": [b64] * 20}]}),
    }[form]
    (answer,) = ServedModel(served_signature, brightness_backend).answer([request])
    assert (answer.error.status, answer.error.code) == (413, "image_too_large")
