"""Answers of the Open Inference Protocol: errors as strings, outputs as bytes, chosen outputs, classes."""

import json
import struct

import numpy as np
import pytest

from handlers.errors import OverloadedError
from handlers.frames import Frame, Reply
from handlers.model import ServedModel
from handlers.open_answer import binary_form, ranked, tensor_document
from handlers.request import Part
from handlers.service import Service
from handlers.signature import Signature

from .stock_torchserve import otf_message_handler
from .test_handlers_open_inference import IDENTITY, PAIR, Scale, ask, ids, images, pair, scale, tensor, texts

__all__ = ["images", "pair", "texts"]  # fixtures

GOOD = [ids([1, 2, 3, 4]), scale([1, 2])]
TEXT = [tensor("text", "BYTES", [2], ["good good", "bad"])]


def answered(model, document, binary=None):
    """The JSON of an answer as it goes out, and the bytes of each output that has some."""
    service = Service()
    service._model = model
    (answer,) = model.answer([ask(document, binary)])
    assert answer.error is None, answer.error
    frame = Frame(b"1", {}, {"body": b""})
    reply = service._reply(answer, frame)
    assert (reply.status, reply.content_type) == (200, "application/octet-stream" if reply.headers else JSON)
    length = int(reply.headers.get("Inference-Header-Content-Length", len(reply.body)))
    head, rest = json.loads(reply.body[:length]), reply.body[length:]
    pieces = {}
    for output in head["outputs"]:
        if "parameters" in output:
            assert "data" not in output
            size = output["parameters"]["binary_data_size"]
            pieces[output["name"]], rest = rest[:size], rest[size:]
    assert rest == b""
    return head, pieces


JSON = "application/json"


def error_of(model, parts):
    (answer,) = model.answer([parts])
    assert answer.body == answer.error.document(open_protocol=isinstance(answer.body["error"], str))
    return answer.body["error"]


class TestErrors:
    @pytest.mark.parametrize(
        ("document", "begins"),
        [
            ({"inputs": [ids([1, 2, 3]), scale([1, 1])]}, "wrong_shape: The data of 'ids' have"),
            ({"inputs": [ids([1, 2, 3, 4])]}, "wrong_inputs: The inputs must be"),
            ({"inputs": [{"name": "ids", "shape": [1]}]}, "wrong_key: A tensor must"),
            ({"inputs": GOOD, "parameters": {"top_k": 1}}, "unknown_parameter: "),
            ({"inputs": GOOD, "outputs": [{"name": "x"}]}, "unknown_output: "),
            ({"inputs": 5, "id": "1"}, "wrong_body: "),
            ({"id": "1"}, "wrong_key: "),
            ({"model_name": "m", "input": []}, "wrong_key: "),
        ],
    )
    def test_they_are_strings(self, pair, document, begins):
        assert error_of(pair, ask(document)).startswith(begins)

    def test_so_are_those_of_bytes_after_the_json(self, pair):
        part = Part(value=b"{", content_type="", json_bytes=1)
        assert error_of(pair, [part]).startswith("malformed_json: ")
        part = Part(value=b"{}", content_type="", json_bytes=3)
        assert error_of(pair, [part]).startswith("wrong_binary_size: ")

    @pytest.mark.parametrize("inputs", [{"ids": [1]}, [{"ids": [1]}], [{"name": [1]}], 5])
    def test_those_of_other_forms_are_objects(self, pair, inputs):
        assert error_of(pair, ask({"inputs": inputs})).keys() == {"code", "message"}

    def test_what_fails_later_knows_its_form(self, pair):
        open_one, own = (pair.read(ask(one)) for one in ({"inputs": GOOD}, {"inputs": {"ids": [1], "scale": 1}}))
        late = OverloadedError("deadline_exceeded", "Too late.")  # one error for several requests
        bodies = [pair.build_answer(decoded, [late]).body["error"] for decoded in (open_one, own, open_one)]
        assert bodies[0] == bodies[2] == "deadline_exceeded: Too late."
        assert bodies[1] == {"code": "deadline_exceeded", "message": "Too late."}

    def test_outputs_that_are_no_tensor(self):
        class Ragged(Scale):
            def run(self, batch):
                return {**super().run(batch), "scaled": np.full((len(batch["ids"]), 1), np.inf, np.float32)}

        model = ServedModel(PAIR, Ragged())
        assert error_of(model, ask({"inputs": GOOD})).startswith("model_output_not_finite: ")

    def test_an_answer_that_is_too_large(self, pair):
        service = Service()
        service._model, service._max_answer_bytes = pair, 300
        for document in ({"inputs": GOOD}, {"inputs": GOOD, "parameters": {"binary_data_output": True}}):
            (answer,) = pair.answer([ask({**document, "id": "x" * 200})])
            reply = service._reply(answer, Frame(b"1", {}, {"body": b""}))
            assert (reply.status, reply.content_type, reply.headers) == (413, JSON, {})
            assert json.loads(reply.body)["error"].startswith("answer_too_large: ")

    def test_a_defect_in_answering(self, pair, monkeypatch):
        monkeypatch.setattr(pair._answerer, "answer", lambda *arguments: 1 / 0)
        assert error_of(pair, ask({"inputs": GOOD})).startswith("answer_failed: ")


class TestBinary:
    def test_all_outputs_may_follow_the_json(self, pair):
        head, pieces = answered(pair, {"id": "a", "inputs": GOOD, "parameters": {"binary_data_output": True}})
        assert head == {
            "model_name": "m",
            "model_version": "2",
            "id": "a",
            "outputs": [
                {"name": "scaled", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}},
                {"name": "total", "datatype": "INT64", "shape": [2], "parameters": {"binary_data_size": 16}},
            ],
        }
        assert np.frombuffer(pieces["scaled"], "<f4").tolist() == [1, 2, 6, 8]
        assert np.frombuffer(pieces["total"], "<i8").tolist() == [3, 7]

    @pytest.mark.parametrize("overall", [None, False, True])
    def test_an_output_s_own_wish_counts_more(self, pair, overall):
        outputs = [
            {"name": "total", "parameters": {"binary_data": True}},
            {"name": "scaled", "parameters": {"binary_data": False}},
        ]
        document = {"inputs": GOOD, "outputs": outputs, "parameters": {"binary_data_output": overall}}
        head, pieces = answered(pair, document)
        assert pieces.keys() == {"total"}
        assert head["outputs"][1]["data"] == [1, 2, 6, 8]

    def test_an_output_without_a_wish_follows_the_request_s(self, pair):
        document = {"inputs": GOOD, "outputs": [{"name": "total"}], "parameters": {"binary_data_output": True}}
        assert answered(pair, document)[1].keys() == {"total"}

    def test_strings_have_their_lengths_before_them(self, texts):
        document = {"inputs": TEXT, "parameters": {"binary_data_output": True, "top_k": 2}}
        head, pieces = answered(texts, document)
        strings = [struct.pack("<I", len(text)) + text for text in (b"yes", b"no")]
        assert pieces["label"] == b"".join(strings)
        assert pieces["top_k_label"] == b"".join([*strings, strings[1], strings[0]])
        assert np.frombuffer(pieces["top_k_probability"], "<f4").shape == (4,)
        assert np.frombuffer(pieces["probability"], "<f4") == pytest.approx([0.880797, 0.731059])
        assert [output["name"] for output in head["outputs"]] == [
            "label",
            "probability",
            "top_k_label",
            "top_k_probability",
            "logits",
        ]

    def test_both_ways_at_once(self, pair):
        first = np.array([[1, 2], [3, 4]], dtype="<i8").tobytes()
        document = {
            "inputs": [tensor("ids", "INT64", [2, 2], parameters={"binary_data_size": len(first)}), scale([1, 1])],
            "parameters": {"binary_data_output": True},
        }
        assert np.frombuffer(answered(pair, document, first)[1]["total"], "<i8").tolist() == [3, 7]

    @pytest.mark.parametrize(
        ("values", "datatype", "expected"),
        [
            (np.array([[True], [False]]), "BOOL", b"\1\0"),
            (np.array([1, -1], ">i4"), "INT32", b"\1\0\0\0\xff\xff\xff\xff"),
            (np.arange(4.0).reshape(2, 2).T, "FP64", struct.pack("<4d", 0, 2, 1, 3)),
            (np.array(["é", "\ud800"], object), "BYTES", b"\2\0\0\0\xc3\xa9\6\0\0\0\\ud800"),
            (np.zeros((2, 0), np.float32), "FP32", b""),
        ],
    )
    def test_the_bytes_of_a_tensor(self, values, datatype, expected):
        document = tensor_document("x", values, datatype, binary=True)
        assert (document["data"], document["shape"]) == (expected, list(values.shape))

    @pytest.mark.parametrize(
        "body", [{}, {"outputs": {"x": [1]}}, {"outputs": [{"name": "x", "data": [1]}]}, {"outputs": [{"name": "x"}]}]
    )
    def test_other_documents_stay_as_they_are(self, body):
        head, pieces = binary_form(body)
        assert head is body
        assert pieces == []

    def test_torchserve_s_own_code_writes_the_header_alike(self):
        headers = {"Inference-Header-Content-Length": "12", "x": ""}
        answers = [Reply(b"1", 200, "OK", "a/b", b"body", own).encode() for own in ({}, headers)]
        none, some = (bytes(otf_message_handler.encode_response_headers(own)) for own in ({}, headers))
        none, some = none + b"\0\0\0\4body", some + b"\0\0\0\4body"
        assert answers[0].count(none) == 1
        assert answers[1] == answers[0].replace(none, some)

    def test_batches_set_the_header_too(self, pair):
        class Context:
            def __init__(self):
                self.headers, self.types, self.statuses = {}, {}, {}

            def get_all_request_header(self, idx):
                return {"content-type": JSON}

            def get_request_id(self, idx):
                return str(idx)

            def set_response_header(self, idx, key, value):
                self.headers[idx] = (key, value)

            def set_response_content_type(self, idx, value):
                self.types[idx] = value

            def set_response_status(self, code, phrase, idx):
                self.statuses[idx] = code

        service, context = Service(), Context()
        service._model = pair
        binary = {"inputs": GOOD, "parameters": {"binary_data_output": True}}
        rows = [{"body": document} for document in ({"inputs": GOOD}, binary, {"inputs": 1}, {"inputs": GOOD})]
        bodies = service.handle(rows, context)
        (length,) = [int(value) for _, value in context.headers.values()]
        assert context.headers.keys() == {1}
        assert len(bodies[1]) == length + 32
        assert context.types == {0: JSON, 1: "application/octet-stream", 2: JSON, 3: JSON}
        assert (bodies[0], context.statuses) == (bodies[3], {2: 400})


class TestChosenOutputs:
    @pytest.mark.parametrize("name", ["label", "probability", "logits", "top_k_label", "top_k_probability"])
    def test_nothing_else_is_answered(self, texts, name):
        head, _ = answered(texts, {"inputs": TEXT, "outputs": [{"name": name}]})
        assert [output["name"] for output in head["outputs"]] == [name]

    def test_an_output_that_is_not_wanted_may_be_no_tensor(self):
        class Boxes:
            device = "cpu"

            def run(self, batch):
                count = len(batch["x"])
                return {"boxes": np.zeros((count, int(batch["x"][0])), np.float32), "n": batch["x"]}

        signature = Signature.from_document(
            {
                "format_version": 1,
                "task": "tensor",
                "inputs": [{"name": "x", "dtype": "int64", "shape": ["batch"], "minimum": 0, "maximum": 9}],
                "outputs": [
                    {"name": "boxes", "dtype": "float32", "shape": ["batch", "box"]},
                    {"name": "n", "dtype": "int64", "shape": ["batch"]},
                ],
            }
        )
        model = ServedModel(signature, Boxes(), max_batch=1)
        document = {"inputs": [tensor("x", "INT64", [2], [1, 2])]}
        assert error_of(model, ask(document)).startswith("ragged_output: ")
        assert answered(model, {**document, "outputs": [{"name": "n"}]})[0]["outputs"][0]["data"] == [1, 2]


class TestClassification:
    @pytest.mark.parametrize("binary", [False, True])
    def test_the_highest_values_with_index_and_label(self, texts, binary):
        parameters = {"classification": 2, "binary_data": binary}
        document = {"inputs": TEXT, "outputs": [{"name": "logits", "parameters": parameters}]}
        head, pieces = answered(texts, document)
        output = head["outputs"][0]
        expected = ["2.000000:1:yes", "0.000000:0:no", "1.000000:0:no", "0.000000:1:yes"]
        assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
        if binary:
            assert pieces["logits"] == b"".join(struct.pack("<I", len(text)) + text.encode() for text in expected)
        else:
            assert output["data"] == expected

    @pytest.mark.parametrize(
        ("name", "count"), [("logits", 3), ("logits", 0), ("logits", 2**62), ("label", 1), ("probability", 1)]
    )
    def test_what_has_no_such_classes_is_refused(self, texts, name, count):
        document = {"inputs": TEXT, "outputs": [{"name": name, "parameters": {"classification": count}}]}
        assert error_of(texts, ask(document)).startswith("wrong_parameter: classification ")

    def test_numbers_without_labels(self):
        values = np.array([[3, 7, 7, -(2**63)], [2**63 - 1, 0, 1, 2]])
        assert ranked(values, 3, ()).tolist() == [["7:1", "7:2", "3:0"], ["9223372036854775807:0", "2:3", "1:2"]]


def test_the_client_of_kserve_names_the_model_too(pair):
    document = {"id": "1", "model_name": "m", "model_version": "2", "inputs": GOOD}
    assert answered(pair, document)[0]["outputs"][1]["data"] == [3, 7]
    assert answered(pair, {"model_name": "m", "inputs": GOOD})[0]["model_name"] == IDENTITY["model"]


def test_images_are_answered_as_bytes_too(images, picture):
    data = picture("mid")
    binary = struct.pack("<I", len(data)) + data
    inputs = [tensor("image", "BYTES", [1], parameters={"binary_data_size": len(binary)})]
    _, pieces = answered(images, {"inputs": inputs, "parameters": {"binary_data_output": True}}, binary)
    assert pieces["label"] == b"\3\0\0\0mid"
    assert np.frombuffer(pieces["logits"], "<f4").argmax() == 1
