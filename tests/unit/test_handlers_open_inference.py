"""The Open Inference Protocol, from request bodies to answers."""

import base64
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from handlers.decoder import build_decoder
from handlers.errors import RequestError
from handlers.model import ServedModel
from handlers.request import Part
from handlers.signature import Signature

PAIR = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [
            {"name": "ids", "dtype": "int64", "shape": ["batch", "length"], "minimum": 0, "maximum": 99, "padding": 0},
            {"name": "scale", "dtype": "float32", "shape": ["batch"], "minimum": -9, "maximum": 9},
        ],
        "outputs": [
            {"name": "scaled", "dtype": "float32", "shape": ["batch", "length"]},
            {"name": "total", "dtype": "int64", "shape": ["batch"]},
        ],
        "axes": {"length": {"minimum": 1, "maximum": 5}},
    }
)
TEXT = Signature.from_document(
    {
        "format_version": 1,
        "task": "text-classification",
        "inputs": [
            {"name": "input_ids", "dtype": "int64", "shape": ["batch", "length"], "maximum": 3},
            {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "length"]},
        ],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
        "labels": ["no", "yes"],
        "preprocessing": {"text": {"tokenizer": "tokenizer.json", "max_length": 6, "pad_id": 0}},
    }
)
IDENTITY = {"model": "m", "version": "2"}


class Scale:
    device = "cpu"

    def run(self, batch):
        ids, scale = batch["ids"], batch["scale"]
        return {"scaled": (ids * scale[:, None]).astype(np.float32), "total": ids.sum(1)}


class CountGood:
    device = "cpu"

    def run(self, batch):
        good = ((batch["input_ids"] == 2) * batch["attention_mask"]).sum(1)
        return {"logits": np.stack([batch["attention_mask"].sum(1) - good, good], axis=1).astype(np.float32)}


def tensor(name, datatype, shape, data=None, **more):
    return {"name": name, "datatype": datatype, "shape": shape, **({} if data is None else {"data": data}), **more}


def ids(data, shape=(2, 2)):
    return tensor("ids", "INT64", list(shape), data)


def scale(data, shape=(2,)):
    return tensor("scale", "FP32", list(shape), data)


def ask(document, binary=None):
    head = json.dumps(document).encode()
    if binary is None:
        return [Part(value=head, content_type="application/json")]
    return [Part(value=head + binary, content_type="application/octet-stream", json_bytes=len(head))]


@pytest.fixture
def pair():
    return ServedModel(PAIR, Scale(), max_batch=4, identity=IDENTITY)


@pytest.fixture
def texts(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return ServedModel(TEXT, CountGood(), max_batch=4, identity=IDENTITY, folder=tmp_path)


@pytest.fixture
def images(served_signature, brightness_backend):
    return ServedModel(served_signature, brightness_backend, max_batch=4, identity=IDENTITY)


def body(model, document, binary=None):
    (answer,) = model.answer([ask(document, binary)])
    assert answer.error is None, answer.error
    return json.loads(json.dumps(answer.body, allow_nan=False))


def refusal(model, document, binary=None):
    (answer,) = model.answer([ask(document, binary)])
    assert answer.error is not None
    assert answer.error.message.isprintable()
    assert answer.error.message.endswith(".")
    assert len(answer.error.message) < 500
    return answer.error.status, answer.error.code


class TestTensors:
    @pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]], ids=["flat", "nested"])
    def test_samples_go_in_and_outputs_come_back_as_tensors(self, pair, data):
        assert body(pair, {"id": "a1", "inputs": [scale([2, 0.5]), ids(data)]}) == {
            "model_name": "m",
            "model_version": "2",
            "id": "a1",
            "outputs": [
                {"name": "scaled", "datatype": "FP32", "shape": [2, 2], "data": [2.0, 4.0, 1.5, 2.0]},
                {"name": "total", "datatype": "INT64", "shape": [2], "data": [3, 7]},
            ],
        }

    def test_a_request_without_an_id_is_answered_without_one(self, pair):
        assert "id" not in body(pair, {"inputs": [ids([1], (1, 1)), scale([1], (1,))]})

    def test_outputs_can_be_chosen(self, pair):
        document = {"inputs": [ids([1, 2], (1, 2)), scale([1], (1,))], "outputs": [{"name": "total"}]}
        assert [output["name"] for output in body(pair, document)["outputs"]] == ["total"]

    def test_bytes_may_follow_the_json(self, pair):
        first = np.array([[1, 2], [3, 4]], dtype="<i8").tobytes()
        document = {
            "inputs": [tensor("ids", "INT64", [2, 2], parameters={"binary_data_size": len(first)}), scale([1, 1])],
            "parameters": {"binary_data_output": False},
        }
        assert body(pair, document, first)["outputs"][1]["data"] == [3, 7]

    def test_several_tensors_follow_the_json_in_order(self, pair):
        pieces = [np.array([2, 3], dtype="<f4").tobytes(), np.array([[1], [2]], dtype="<i8").tobytes()]
        document = {
            "inputs": [
                tensor("scale", "FP32", [2], parameters={"binary_data_size": len(pieces[0])}),
                tensor("ids", "INT64", [2, 1], parameters={"binary_data_size": len(pieces[1])}),
            ]
        }
        assert body(pair, document, b"".join(pieces))["outputs"][0]["data"] == [2, 6]

    @pytest.mark.parametrize(
        ("inputs", "status", "code"),
        [
            ([], 400, "wrong_body"),
            ({"ids": [1]}, 400, "wrong_body"),
            ([1], 400, "wrong_body"),
            ([ids([1, 2, 3, 4])], 422, "wrong_inputs"),
            ([ids([1, 2, 3, 4]), scale([1, 1]), tensor("x", "FP32", [2], [1, 1])], 422, "wrong_inputs"),
            ([ids([1, 2, 3, 4]), ids([1, 2, 3, 4]), scale([1, 1])], 400, "wrong_body"),
            ([ids([1, 2, 3]), scale([1, 1])], 422, "wrong_shape"),
            ([ids([[1, 2, 3, 4]]), scale([1, 1])], 422, "wrong_shape"),
            ([ids([[1, 2], [3]]), scale([1, 1])], 422, "wrong_shape"),
            ([ids([1] * 12, (2, 6)), scale([1, 1])], 422, "wrong_size"),
            ([ids([], (2, 0)), scale([1, 1])], 422, "wrong_size"),
            ([ids([1] * 4, (2, 2, 1)), scale([1, 1])], 422, "wrong_shape"),
            ([ids([1, 2, 3, 4]), scale([1], (1,))], 422, "wrong_size"),
            ([ids([], (0, 2)), scale([], (0,))], 422, "no_samples"),
            ([ids([1] * 257, (257, 1)), scale([1] * 257, (257,))], 413, "too_many_samples"),
            ([ids([1], (10**18, 10**18)), scale([1], (10**18,))], 413, "too_many_samples"),
            ([ids([1], (10**30, 1)), scale([1])], 400, "wrong_body"),
            ([tensor("ids", "INT32", [2, 2], [1, 2, 3, 4]), scale([1, 1])], 422, "wrong_datatype"),
            ([tensor("ids", "BYTES", [2, 2], ["a"] * 4), scale([1, 1])], 422, "wrong_datatype"),
            ([ids([1, 2, 3, 100]), scale([1, 1])], 422, "out_of_range"),
            ([ids([1, 2, 3, 2**70]), scale([1, 1])], 422, "out_of_range"),
            ([ids([1, 2, 3, 1.5]), scale([1, 1])], 422, "not_integers"),
            ([ids([1, 2, 3, True]), scale([1, 1])], 400, "not_numbers"),
            ([ids([1, 2, 3, "4"]), scale([1, 1])], 400, "not_numbers"),
            ([ids([1, 2, 3, 4]), scale([1, float("nan")])], 422, "not_finite"),
            ([ids([1, 2, 3, 4]), scale([1, 10**400])], 422, "out_of_range"),
            ([tensor("ids", "INT64", [2, 2])], 400, "wrong_body"),
            ([tensor("ids", "INT64", [2, 2], [1], parameters={"binary_data_size": 0})], 400, "wrong_body"),
            ([tensor("ids", "INT64", [2, 2], [1], extra=1)], 400, "wrong_key"),
            ([{"name": "ids", "shape": [1]}], 400, "wrong_key"),
            ([tensor("ids", "INT64", [], [])], 400, "wrong_body"),
            ([tensor("ids", "INT64", [1] * 33, [1])], 400, "wrong_body"),
            ([tensor("ids", "INT64", [2, -1], [1])], 400, "wrong_body"),
            ([tensor("ids", "INT64", [2, True], [1])], 400, "wrong_body"),
            ([tensor("ids", "INT64", [2.0], [1])], 400, "wrong_body"),
            ([tensor("ids", 5, [2], [1])], 400, "wrong_body"),
            ([tensor("i\n\u2028" * 99, "I\n" * 99, [2], [1])], 422, "wrong_inputs"),
            ([ids([1])] * 300, 400, "wrong_body"),
        ],
    )
    def test_a_bad_request_gets_its_own_status_and_code(self, pair, inputs, status, code):
        assert refusal(pair, {"id": "", "inputs": inputs}) == (status, code)

    @pytest.mark.parametrize(
        ("more", "status", "code"),
        [
            ({"id": 5}, 400, "wrong_body"),
            ({"id": "x" * 257}, 400, "wrong_body"),
            ({"extra": 5}, 400, "wrong_key"),
            ({"outputs": {"name": "total"}}, 400, "wrong_body"),
            ({"outputs": ["total"]}, 400, "wrong_body"),
            ({"outputs": [{"name": "total"}, {"name": "total"}]}, 400, "wrong_body"),
            ({"outputs": [{"name": "label"}]}, 422, "unknown_output"),
            ({"outputs": 0}, 400, "wrong_body"),
            ({"outputs": [{"name": "total", "data": 1}]}, 400, "wrong_key"),
            ({"outputs": [{"name": "total", "parameters": []}]}, 400, "wrong_parameters"),
            ({"outputs": [{"name": "total", "parameters": {"binary_data": "yes"}}]}, 422, "wrong_parameter"),
            ({"outputs": [{"name": "total", "parameters": {"shared_memory_region": "r"}}]}, 422, "unknown_parameter"),
            ({"outputs": [{"name": "total", "parameters": {"classification": 1}}]}, 422, "wrong_parameter"),
            ({"outputs": [{"name": "scaled", "parameters": {"classification": 1}}]}, 422, "wrong_parameter"),
            ({"outputs": [{"name": "scaled", "parameters": {"classification": -1}}]}, 422, "wrong_parameter"),
            ({"parameters": {"binary_data_output": 1}}, 422, "wrong_parameter"),
            ({"parameters": {"top_k": 1}}, 422, "unknown_parameter"),
            ({"parameters": {"sequence_id": 1}}, 422, "unknown_parameter"),
            ({"parameters": [1]}, 400, "wrong_parameters"),
        ],
    )
    def test_what_stands_beside_the_inputs_is_checked(self, pair, more, status, code):
        document = {"inputs": [ids([1, 2, 3, 4]), scale([1, 1])], **more}
        assert refusal(pair, document) == (status, code)

    @pytest.mark.parametrize(
        ("size", "binary", "status", "code"),
        [
            (32, b"\0" * 31, 400, "wrong_binary_size"),
            (32, b"\0" * 33, 400, "wrong_binary_size"),
            (-1, b"", 400, "wrong_body"),
            ("32", b"\0" * 32, 400, "wrong_body"),
            (10**18, b"\0" * 32, 400, "wrong_binary_size"),
            (10**4000, b"\0" * 32, 400, "wrong_body"),
            (24, b"\0" * 24, 422, "wrong_size"),
            (32, struct.pack("<4q", 1, 2, 3, 100), 422, "out_of_range"),
        ],
    )
    def test_bytes_after_the_json_are_counted(self, pair, size, binary, status, code):
        document = {"inputs": [tensor("ids", "INT64", [2, 2], parameters={"binary_data_size": size}), scale([1, 1])]}
        assert refusal(pair, document, binary) == (status, code)

    @pytest.mark.parametrize("json_bytes", [0, -5, 10**9, 3])
    def test_a_wrong_length_of_the_json_is_refused(self, pair, json_bytes):
        part = Part(value=b'{"inputs": []}', content_type="application/octet-stream", json_bytes=json_bytes)
        (answer,) = pair.answer([[part]])
        assert answer.error.status == 400

    def test_outputs_of_different_sizes_are_no_tensor(self):
        class Boxes:
            device = "cpu"

            def run(self, batch):
                return {"boxes": np.zeros((len(batch["x"]), int(batch["x"][0]), 4), np.float32)}

        signature = Signature.from_document(
            {
                "format_version": 1,
                "task": "tensor",
                "inputs": [{"name": "x", "dtype": "int64", "shape": ["batch"], "minimum": 0, "maximum": 9}],
                "outputs": [{"name": "boxes", "dtype": "float32", "shape": ["batch", "box", 4]}],
            }
        )
        model = ServedModel(signature, Boxes(), max_batch=1)
        assert refusal(model, {"inputs": [tensor("x", "INT64", [2], [1, 2])]}) == (422, "ragged_output")
        assert body(model, {"inputs": [tensor("x", "INT64", [2], [3, 3])]})["outputs"][0]["shape"] == [2, 3, 4]

    def test_an_output_that_is_not_finite_is_our_own_defect(self, pair):
        class Broken(Scale):
            def run(self, batch):
                return {**super().run(batch), "scaled": np.full((len(batch["ids"]), 1), np.nan, np.float32)}

        model = ServedModel(PAIR, Broken())
        assert refusal(model, {"inputs": [ids([1], (1, 1)), scale([1], (1,))]}) == (500, "model_output_not_finite")

    @settings(deadline=None)
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["name", "shape", "datatype", "data", "parameters", "ids"]), inner, max_size=5
                )
            ),
            max_leaves=20,
        ),
        st.binary(max_size=20),
    )
    def test_any_request_is_decoded_or_refused(self, value, binary):
        decoder = build_decoder(PAIR, max_samples=4)
        good = ids([1, 2, 3, 4])
        for document in ({"id": "", "inputs": value}, {"inputs": [good, value]}, {"inputs": [good], "outputs": value}):
            for parts in (ask(document), ask(document, binary)):
                status = 200
                try:
                    decoder.decode(parts)
                except RequestError as error:
                    status = error.status
                assert 200 <= status < 500


class TestTexts:
    def test_strings_are_answered_with_label_probability_and_logits(self, texts):
        answer = body(texts, {"inputs": [tensor("text", "BYTES", [2], ["good good", "bad"])]})
        assert answer["outputs"][0] == {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["yes", "no"]}
        assert answer["outputs"][1]["datatype"] == "FP32"
        assert answer["outputs"][1]["data"] == pytest.approx([0.880797, 0.731059])
        assert answer["outputs"][2] == {"name": "logits", "datatype": "FP32", "shape": [2, 2], "data": [0, 2, 1, 0]}

    def test_top_k_lists_classes(self, texts):
        document = {"inputs": [tensor("text", "BYTES", [1, 1], [["good"]])], "parameters": {"top_k": 2}}
        outputs = {output["name"]: output for output in body(texts, document)["outputs"]}
        assert (outputs["top_k_label"]["shape"], outputs["top_k_label"]["data"]) == ([1, 2], ["yes", "no"])
        assert outputs["top_k_probability"]["data"] == pytest.approx([0.731059, 0.268941])

    def test_top_k_can_be_asked_for_by_name(self, texts):
        document = {"inputs": [tensor("text", "BYTES", [1], ["good"])], "outputs": [{"name": "top_k_label"}]}
        assert body(texts, document)["outputs"] == [
            {"name": "top_k_label", "datatype": "BYTES", "shape": [1, 2], "data": ["yes", "no"]}
        ]

    def test_bytes_after_the_json_have_their_lengths_before_them(self, texts):
        binary = b"".join(struct.pack("<I", len(text)) + text for text in (b"good", b"", "schön".encode()))
        inputs = [tensor("text", "BYTES", [3], parameters={"binary_data_size": len(binary)})]
        assert body(texts, {"inputs": inputs}, binary)["outputs"][0]["data"] == ["yes", "no", "no"]

    def test_a_cut_text_is_told(self, texts):
        answer = body(texts, {"inputs": [tensor("text", "BYTES", [2], ["good", "good " * 7])]})
        assert answer["parameters"] == {"truncated": [1]}

    @pytest.mark.parametrize(
        ("inputs", "status", "code"),
        [
            ([tensor("input_ids", "BYTES", [1], ["a"])], 422, "wrong_inputs"),
            ([tensor("text", "INT64", [1], [1])], 422, "wrong_datatype"),
            ([tensor("text", "BYTES", [1], [1])], 400, "not_text"),
            ([tensor("text", "BYTES", [1], [])], 400, "not_text"),
            ([tensor("text", "BYTES", [2], ["a"])], 422, "wrong_shape"),
            ([tensor("text", "BYTES", [1, 2], ["a", "b"])], 422, "wrong_shape"),
            ([tensor("text", "BYTES", [0], [])], 422, "no_samples"),
            ([tensor("text", "BYTES", [257], ["a"] * 257)], 413, "too_many_samples"),
        ],
    )
    def test_a_bad_request_gets_its_own_status_and_code(self, texts, inputs, status, code):
        assert refusal(texts, {"inputs": inputs}) == (status, code)

    @pytest.mark.parametrize(
        ("binary", "code"),
        [
            (b"\0", "wrong_binary_size"),
            (struct.pack("<I", 5) + b"good", "wrong_binary_size"),
            (struct.pack("<I", 2**32 - 1) + b"good", "wrong_binary_size"),
            (struct.pack("<I", 1) + b"\xff", "not_utf8"),
            (struct.pack("<I", 1) + b"a" + struct.pack("<I", 0), "wrong_shape"),
        ],
    )
    def test_broken_elements_are_refused(self, texts, binary, code):
        inputs = [tensor("text", "BYTES", [1], parameters={"binary_data_size": len(binary)})]
        assert refusal(texts, {"inputs": inputs}, binary)[1] == code


class TestImages:
    def test_files_are_sent_as_base64(self, images, picture):
        data = [base64.b64encode(picture(label)).decode() for label in ("dark", "bright")]
        answer = body(images, {"inputs": [tensor("image", "BYTES", [2], data)]})
        assert answer["outputs"][0]["data"] == ["dark", "bright"]

    def test_or_as_bytes_after_the_json(self, images, picture):
        data = picture("mid")
        binary = struct.pack("<I", len(data)) + data
        inputs = [tensor("image", "BYTES", [1], parameters={"binary_data_size": len(binary)})]
        assert body(images, {"inputs": inputs}, binary)["outputs"][0]["data"] == ["mid"]

    def test_the_model_s_own_input_is_taken_as_it_is(self, images, png_request):
        (sample,) = images.decode(png_request("bright"))
        own = sample["image"]
        answer = body(images, {"inputs": [tensor("image", "FP32", [2, 1, 8, 8], [own.tolist(), (-own).tolist()])]})
        assert answer["outputs"][0]["data"] == ["bright", "dark"]

    @pytest.mark.parametrize(
        ("inputs", "status", "code"),
        [
            ([tensor("image", "FP32", [1, 8, 8, 1], [0] * 64)], 422, "wrong_shape"),
            ([tensor("image", "UINT8", [1, 1, 8, 8], [0] * 64)], 422, "wrong_datatype"),
            ([tensor("picture", "BYTES", [1], ["aaaa"])], 422, "wrong_inputs"),
            ([tensor("image", "BYTES", [1], ["%"])], 400, "malformed_base64"),
            ([tensor("image", "BYTES", [1], ["aaaa"])], 415, "unsupported_image"),
            ([tensor("image", "BYTES", [1], [5])], 400, "not_text"),
        ],
    )
    def test_a_bad_request_gets_its_own_status_and_code(self, images, inputs, status, code):
        assert refusal(images, {"inputs": inputs}) == (status, code)
