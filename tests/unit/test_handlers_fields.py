import pytest

from handlers.fields import asks_for_description, read_parts
from handlers.request import Part

JSON = "application/json"


def parameters(value):
    return Part(value=value, content_type=JSON, name="parameters")


@pytest.mark.parametrize("name", ["Content-Type", "content-type", "CONTENT-TYPE"])
def test_a_body_has_the_type_of_its_request(name):
    parts = read_parts({"body": b"x"}, {name: "Image/PNG; q=1", "Accept": "*/*"})
    assert parts == [Part(value=b"x", content_type="image/png")]


@pytest.mark.parametrize(
    ("declared", "charset"),
    [
        ("text/plain", ""),
        ("text/plain; charset=Latin-1", "latin-1"),
        ('text/plain; a=b ; Charset = "UTF-8" ', "utf-8"),
        ("text/plain; charset", ""),
        ("text/plain;;=;charset=", ""),
    ],
)
def test_a_type_may_name_a_charset(declared, charset):
    (part,) = read_parts({"body": b"x"}, {"Content-Type": declared})
    assert (part.content_type, part.charset) == ("text/plain", charset)


@pytest.mark.parametrize("name", ["Content-Encoding", "content-encoding"])
def test_a_body_may_be_compressed(name):
    (part,) = read_parts({"body": b"x"}, {name: " GZip "})
    assert part.encoding == "gzip"


def test_fields_of_multipart_keep_their_names_types_and_order():
    headers = {
        "Content-Type": "multipart/form-data; boundary=x",
        "b": {"content-type": "image/png"},
        "body": {"content-type": ""},
    }
    assert read_parts({"b": b"1", "body": b"2"}, headers) == [
        Part(value=b"1", content_type="image/png", name="b"),
        Part(value=b"2", content_type="multipart/form-data", name="body"),
    ]


@pytest.mark.parametrize("name", ["X-Parameters", "x-parameters"])
def test_parameters_may_stand_in_a_header(name):
    parts = read_parts({"body": b"x"}, {name: '{"top_k": 3}'})
    assert parts[1:] == [parameters(b'{"top_k": 3}')]


def test_or_in_the_query_where_torchserve_passes_it_on():
    row = {"top_k": bytearray(b"3"), "token": bytearray(b"t"), "body": b"x"}
    assert read_parts(row, {}) == [Part(value=b"x", content_type=""), parameters({"top_k": 3})]


def test_or_in_a_field_of_their_own():
    headers = {"content-type": "multipart/form-data; boundary=x", "a": {"content-type": "image/png"}}
    assert read_parts({"a": b"x", "top_k": b"3"}, headers)[1:] == [parameters({"top_k": 3})]


@pytest.mark.parametrize(
    ("value", "length"),
    [("12", 12), ("0", 0), ("-1", -1), ("x", -1), ("", -1), ("9" * 5000, -1), ("٣", -1)],
)
def test_the_length_of_the_json_is_a_number_or_none_that_fits(value, length):
    (part,) = read_parts({"body": b"x"}, {"Inference-Header-Content-Length": value})
    assert part.json_bytes == length


def test_a_field_that_is_called_like_a_header_is_none():
    headers = {"x-parameters": {"content-type": JSON}, "content-type": {"content-type": JSON}}
    assert len(read_parts({"x-parameters": b"{}", "content-type": b"x"}, headers)) == 2


def test_no_fields_are_no_parts():
    assert read_parts({}, {}) == []


def test_only_a_request_without_any_field_asks_for_the_description():
    assert asks_for_description({}, {"describe": "True"})
    assert not asks_for_description({"body": b""}, {"describe": "True"})
    assert not asks_for_description({}, {})
    assert not asks_for_description({}, {"describe": "False"})
