import gzip
import json
import zlib

import pytest

from handlers import request as request_module
from handlers.encoding import check_charset, decompress
from handlers.errors import RequestError
from handlers.fields import read_parts
from handlers.request import read_body
from handlers.tensor_request import ONE_TENSOR
from handlers.text import TEXTS

JSON = "application/json"
DOCUMENT = {"inputs": [1, 2]}
PLAIN = json.dumps(DOCUMENT).encode()


def refused(call, *arguments, **more):
    with pytest.raises(RequestError) as caught:
        call(*arguments, **more)
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()
    return caught.value.status, caught.value.code


def read(value, medium=ONE_TENSOR, **headers):
    return read_body(
        read_parts({"body": value}, {name.replace("_", "-"): text for name, text in headers.items()}), medium
    )


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("", PLAIN),
        ("identity", PLAIN),
        ("gzip", gzip.compress(PLAIN)),
        ("x-gzip", gzip.compress(PLAIN)),
        ("deflate", zlib.compress(PLAIN)),
        ("gzip", gzip.compress(b"")),
    ],
)
def test_known_encodings_are_undone(encoding, data):
    assert decompress(data, encoding, limit=len(PLAIN)) in (PLAIN, b"")


@pytest.mark.parametrize(
    ("encoding", "data", "expected"),
    [
        ("br", PLAIN, (415, "unsupported_encoding")),
        ("gzip, gzip", PLAIN, (415, "unsupported_encoding")),
        ("z\n\u2028" * 99, PLAIN, (415, "unsupported_encoding")),
        ("gzip", PLAIN, (400, "broken_encoding")),
        ("gzip", zlib.compress(PLAIN), (400, "broken_encoding")),
        ("gzip", gzip.compress(PLAIN)[:-1], (400, "broken_encoding")),
        ("gzip", gzip.compress(PLAIN) + b"x", (400, "broken_encoding")),
        ("gzip", gzip.compress(PLAIN)[:-5] + b"12345", (400, "broken_encoding")),
        ("deflate", zlib.compress(PLAIN)[2:-4], (400, "broken_encoding")),
        ("gzip", gzip.compress(bytes(101)), (413, "request_too_large")),
        ("gzip", gzip.compress(bytes(1 << 24)), (413, "request_too_large")),
    ],
)
def test_others_and_damaged_ones_are_refused(encoding, data, expected):
    assert refused(decompress, data, encoding, limit=100) == expected


@pytest.mark.parametrize("header", ["gzip", " GZIP "])
@pytest.mark.parametrize("name", ["Content_Encoding", "content_encoding"])
def test_a_compressed_body_is_read(header, name):
    assert read(gzip.compress(PLAIN), Content_Type=JSON, **{name: header}).value == [1, 2]


def test_so_is_one_that_torchserve_has_decoded_as_text():
    packed = zlib.compress(b"a", 1)
    assert packed.isascii()
    value = packed.decode()
    assert read(value, TEXTS, Content_Type="text/plain", Content_Encoding="deflate").values == (b"a",)


def test_a_body_that_torchserve_could_parse_was_not_compressed():
    assert refused(read, DOCUMENT, Content_Type=JSON, Content_Encoding="gzip") == (400, "broken_encoding")
    assert refused(read, DOCUMENT, Content_Type=JSON, Content_Encoding="br") == (415, "unsupported_encoding")
    assert read(DOCUMENT, Content_Type=JSON, Content_Encoding="identity").value == [1, 2]


def test_json_inside_a_string_is_no_body():
    value = json.dumps(DOCUMENT)  # as TorchServe has it of a body that is one string
    assert refused(read, value, Content_Type=f"{JSON}; charset=utf-8", Content_Encoding="identity") == (
        400,
        "wrong_body",
    )


def test_the_limit_is_that_of_requests(monkeypatch):
    monkeypatch.setattr(request_module, "MAX_REQUEST_BYTES", len(PLAIN) + 30)
    assert read(gzip.compress(PLAIN), Content_Type=JSON, Content_Encoding="gzip").value == [1, 2]
    bomb = gzip.compress(PLAIN + b" " * 999)
    assert len(bomb) < len(PLAIN) + 30
    assert refused(read, bomb, Content_Type=JSON, Content_Encoding="gzip") == (413, "request_too_large")


def test_an_empty_body_is_empty_whatever_its_encoding():
    assert refused(read, b"", Content_Type=JSON, Content_Encoding="gzip") == (400, "empty_request")


@pytest.mark.parametrize("charset", ["", "utf-8", "utf8", "us-ascii", "iso-8859-1", "windows-1252", "latin1"])
def test_charsets_that_agree_with_utf8(charset):
    check_charset(b"plain", charset)


@pytest.mark.parametrize("charset", ["iso-8859-1", "windows-1252", "utf-16", "utf-7", "x\n\u2028" * 99])
def test_charsets_that_do_not(charset):
    assert refused(check_charset, "é".encode(), charset) == (415, "unsupported_charset")


@pytest.mark.parametrize("charset", ["utf-16", "utf-7"])
def test_not_even_for_ascii(charset):
    assert refused(check_charset, b"plain", charset) == (415, "unsupported_charset")


@pytest.mark.parametrize("value", ["schön".encode("latin-1"), "schön", "schön".encode()])
def test_text_of_another_charset_is_not_misread(value):
    declared = "text/plain; charset=ISO-8859-1"
    assert refused(read, value, TEXTS, Content_Type=declared) == (415, "unsupported_charset")


@pytest.mark.parametrize("declared", ["text/plain", 'text/plain;a=b; Charset="UTF-8"', "text/plain;charset=us-ascii"])
def test_utf8_is_read(declared):
    assert read("schön".encode(), TEXTS, Content_Type=declared).values == ("schön".encode(),)


def test_a_charset_concerns_text_alone():
    assert read(PLAIN, Content_Type="application/octet-stream; charset=utf-16").value == [1, 2]


@pytest.mark.parametrize("kind", [JSON, "", "application/octet-stream"])
def test_a_byte_order_mark_before_json_is_none_of_it(kind):
    assert read(b"\xef\xbb\xbf" + PLAIN, Content_Type=kind).value == [1, 2]
