import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers import request as request_module
from handlers.errors import RequestError
from handlers.image import EncodedImage, PixelArray
from handlers.image_request import IMAGES, ParsedRequest, parse_body
from handlers.open_inference import OpenRequest
from handlers.request import MediaBody, Medium, Part, read_body

PNG = b"\x89PNG\r\n\x1a\n rest"
JPEG = b"\xff\xd8\xff rest"
B64 = base64.b64encode(PNG).decode()


def parse(*parts, max_samples=4):
    body = read_body([Part(value=value, content_type=kind) for value, kind in parts], IMAGES)
    return body if isinstance(body, OpenRequest) else parse_body(body, max_samples=max_samples)


def json_part(document):
    return json.dumps(document).encode(), "application/json"


def status_of(*parts):
    """The HTTP status that a request would get; anything but a RequestError goes through."""
    try:
        parse(*parts)
    except RequestError as error:
        return error.status
    return 200


def one(payload):
    return ParsedRequest(payloads=(payload,), many=False)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (PNG, "image/png"),
        (JPEG, "image/jpeg"),
        (JPEG, "image/jpg"),
        (b"no magic, but declared", "image/png"),
        (PNG, ""),
        (JPEG, "application/octet-stream"),
        (PNG, "application/x-www-form-urlencoded"),
        (bytearray(PNG), "image/png"),
        (PNG, "multipart/form-data"),
    ],
)
def test_an_image_body_is_one_sample(value, kind):
    assert parse((value, kind)) == one(EncodedImage(data=bytes(value)))


@pytest.mark.parametrize("kind", ["application/json", "", "application/octet-stream"])
def test_inputs_is_one_array_that_may_be_a_batch(kind):
    assert parse((b' {"inputs": [[1, 2]]}', kind)) == one(PixelArray(value=[[1, 2]], batched=True))


def test_inputs_takes_an_encoded_image():
    assert parse(json_part({"inputs": {"b64": B64}})) == one(EncodedImage(data=PNG))


def test_instances_are_single_samples_answered_as_a_list():
    parsed = parse(json_part({"instances": [[[1]], {"b64": B64}]}))
    assert parsed.many
    assert parsed.payloads == (PixelArray(value=[[1]], batched=False), EncodedImage(data=PNG))


def test_one_instance_is_answered_as_a_list_too():
    assert parse(json_part({"instances": [[[1]]]})).many


def test_json_that_torchserve_has_parsed_already_is_taken_as_it_is():
    assert parse(({"inputs": [1]}, "application/json")) == one(PixelArray(value=[1], batched=True))


def test_multipart_is_one_image_a_field_in_order():
    parsed = parse((PNG, "image/png"), (JPEG, ""), (b"declared", "image/jpeg"))
    assert parsed.many
    assert [payload.data for payload in parsed.payloads] == [PNG, JPEG, b"declared"]


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([], 400, "empty_request"),
        ([(b"", "image/png")], 400, "empty_request"),
        ([(b"", "")], 400, "empty_request"),
        ([(b"{", "application/json")], 400, "malformed_json"),
        ([json_part({"instances": [1], "id": "1"})], 400, "wrong_key"),
        ([json_part({"inputs": [1], "instances": [1], "id": "1"})], 400, "wrong_key"),
        ([(b"[" * 100_000, "application/json")], 400, "malformed_json"),
        ([(b'{"inputs": ' + b"9" * 5000 + b"}", "application/json")], 400, "malformed_json"),
        ([(b'{"inputs": "\xff"}', "application/json")], 400, "not_utf8"),
        ([(b"[1]", "application/json")], 400, "wrong_body"),
        ([(b"null", "application/json")], 400, "wrong_body"),
        ([("text", "application/json")], 400, "wrong_body"),
        ([json_part({"instances": 1})], 400, "wrong_body"),
        ([json_part({"instances": {"b64": B64}})], 400, "wrong_body"),
        ([json_part({})], 400, "wrong_key"),
        ([json_part({"input": [1]})], 400, "wrong_key"),
        ([json_part({"inputs": [1], "instances": [1]})], 400, "wrong_key"),
        ([json_part({"inputs": {"b65": B64}})], 400, "wrong_key"),
        ([json_part({"inputs": {"b64": B64, "x": 1}})], 400, "wrong_key"),
        ([json_part({"inputs": {"b64": 5}})], 400, "wrong_key"),
        ([json_part({"instances": [{}]})], 400, "wrong_key"),
        ([json_part({"inputs": {"b64": "!!!"}})], 400, "malformed_base64"),
        ([json_part({"inputs": {"b64": "é"}})], 400, "malformed_base64"),
        ([json_part({"instances": []})], 422, "no_samples"),
        ([json_part({"instances": [1] * 5})], 413, "too_many_samples"),
        ([(PNG, "image/png")] * 5, 413, "too_many_samples"),
        ([(b"GIF89a", "image/gif")], 415, "unsupported_type"),
        ([(PNG, "text/plain")], 415, "unsupported_type"),
        ([(b"hello", "")], 415, "unsupported_type"),
        ([(PNG, "image/png"), (b'{"inputs": [1]}', "application/json")], 415, "unsupported_type"),
        ([(PNG, "image/png"), ({"inputs": [1]}, "application/json")], 415, "unsupported_type"),
    ],
)
def test_a_bad_request_gets_its_own_status_and_code(parts, status, code):
    with pytest.raises(RequestError) as caught:
        parse(*parts)
    assert (caught.value.status, caught.value.code) == (status, code)


@pytest.mark.parametrize("parts", [1, 2])
def test_all_fields_together_have_a_limit(parts, monkeypatch):
    monkeypatch.setattr(request_module, "MAX_REQUEST_BYTES", parts * len(PNG) - 1)
    with pytest.raises(RequestError, match=f"has {parts * len(PNG)} bytes; the limit is") as caught:
        parse(*[(PNG, "image/png")] * parts)
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")


def test_a_body_at_the_limit_is_taken(monkeypatch):
    monkeypatch.setattr(request_module, "MAX_REQUEST_BYTES", len(PNG))
    assert parse((PNG, "image/png"))


@pytest.mark.parametrize(
    "parts",
    [
        [(b"x", "x\n\u2028" * 1000)],
        [json_part({"k\n\u2028" * 1000: 1})],
        [json_part({f"key{i}": 1 for i in range(99)})],
    ],
)
def test_a_message_quotes_little_of_the_request_and_only_ascii(parts):
    with pytest.raises(RequestError) as caught:
        parse(*parts)
    message = caught.value.message
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize(
    ("value", "kind"),
    [([1], "a list"), ("x", "a string"), (True, "a boolean"), (1, "a number"), (1.5, "a number"), (None, "null")],
)
def test_a_wrong_body_is_called_by_its_json_name(value, kind):
    with pytest.raises(RequestError, match=f"not {kind}"):
        parse(json_part(value))


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=40), st.sampled_from(["", "image/png", "application/json", "a/b"]))))
def test_random_requests_are_parsed_or_refused(parts):
    assert 200 <= status_of(*parts) < 500


@settings(deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_random_json_is_parsed_or_refused(value):
    for document in (value, {"inputs": value}, {"instances": value}):
        assert 200 <= status_of((document, "application/json")) < 500


TEXT = Medium(
    types=("text/plain",),
    recognises=lambda data: False,
    accepted="send text/plain",
    absent="no text",
    wrong_field="Each field must be text.",
)


def read(*parts):
    return read_body([Part(value=value, content_type=kind, name=name) for value, kind, name in parts], TEXT)


def read_refusal(*parts):
    with pytest.raises(RequestError) as caught:
        read(*parts)
    return caught.value.status, caught.value.code


JSON = "application/json"


class TestParameters:
    @pytest.mark.parametrize("value", [b'{"top_k": 3}', bytearray(b'{"top_k": 3}'), '{"top_k": 3}', {"top_k": 3}])
    def test_they_may_come_beside_a_raw_body(self, value):
        body = read((b"hello", "text/plain", ""), (value, JSON, "parameters"))
        assert body == MediaBody(values=(b"hello",), many=False, parameters={"top_k": 3})

    def test_they_may_be_a_field_among_several(self):
        body = read(("a", "text/plain", "x"), (b'{"top_k": 3}', "", "parameters"), ("b", "text/plain", "y"))
        assert (body.values, body.many, body.parameters) == (("a", "b"), True, {"top_k": 3})

    @pytest.mark.parametrize("key", ["inputs", "instances"])
    def test_they_may_stand_in_the_body(self, key):
        body = read((json.dumps({"parameters": {"top_k": 3}, key: [1]}).encode(), JSON, ""))
        assert (body.key, body.value, body.parameters) == (key, [1], {"top_k": 3})

    def test_or_beside_a_body_that_has_none(self):
        assert read((b'{"inputs": 1}', JSON, ""), (b"{}", JSON, "parameters")).parameters == {}

    @pytest.mark.parametrize(
        "inputs", [b"1", b'[{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]'], ids=["json", "open"]
    )
    def test_twice_is_once_too_often(self, inputs):
        body = (b'{"parameters": {}, "inputs": ' + inputs + b"}", JSON, "")
        assert read_refusal(body, (b"{}", JSON, "parameters")) == (400, "wrong_parameters")
        assert read_refusal(body, *[(b"{}", JSON, "parameters")] * 2) == (400, "wrong_parameters")

    def test_they_are_no_request_by_themselves(self):
        assert read_refusal((b'{"top_k": 3}', "", "parameters")) == (400, "empty_request")
        assert read_refusal((b'{"parameters": {"top_k": 3}}', JSON, "")) == (400, "wrong_key")

    @pytest.mark.parametrize("value", [b"{", b"\xff", "\ud800{"])
    def test_what_is_no_json_is_refused(self, value):
        assert read_refusal((b"hello", "text/plain", ""), (value, JSON, "parameters"))[0] == 400

    def test_their_size_counts(self, monkeypatch):
        monkeypatch.setattr(request_module, "MAX_REQUEST_BYTES", 8)
        assert read_refusal((b"hello", "text/plain", ""), (b"{   }", JSON, "parameters")) == (413, "request_too_large")


class TestJson:
    @pytest.mark.parametrize("item", [b"[]", b"{}", b"[1]"])
    def test_more_lists_than_memory_should_hold_are_refused_unread(self, item, monkeypatch):
        monkeypatch.setattr(request_module, "MAX_JSON_LISTS", 10)
        fitting = b'{"inputs": [' + b",".join([item] * 8) + b"]}"
        assert len(read((fitting, JSON, "")).value) == 8
        monkeypatch.setattr(request_module.json, "loads", None)
        refused = b'{"inputs": [' + b",".join([item] * 9) + b"]}"
        assert read_refusal((refused, JSON, "")) == (413, "json_too_complex")

    @pytest.mark.parametrize(
        "data",
        [
            b"[" * 100_000,
            b'{"inputs":' * 50_000,
            b'{"inputs": ' + b"9" * 4301 + b"}",
            b"\xef\xbb\xbf{}",
            b'{"inputs": 1,}',
            b'{"inputs": 01}',
            b"{'inputs': 1}",
            b'{"inputs": 1} {"inputs": 2}',
            b'{"inputs": "\x00"}',
            b"\xff\xfe{\x00}\x00",
        ],
    )
    def test_what_is_no_json_is_malformed(self, data):
        assert read_refusal((data, JSON, ""))[0] == 400
