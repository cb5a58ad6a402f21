"""Requests of every form, spoilt at random: each costs at most itself, and says in one sentence what is wrong."""

import base64
import copy
import gzip
import io
import json
import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from handlers.model import ServedModel
from handlers.service import Service
from handlers.signature import Signature

from .test_handlers_open_inference import PAIR, TEXT, CountGood, Scale

JSON = "application/json"
ONE = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "length"], "maximum": 1000, "padding": 0}],
        "outputs": [{"name": "twice", "dtype": "float32", "shape": ["batch", "length"]}],
        "axes": {"length": {"minimum": 1, "maximum": 5}},
    }
)
# One sentence, with its remedy perhaps: no traceback, no type of Python's, no end in the middle.
SENTENCE = re.compile(r"^[A-Za-z'].{10,480}[.)]$")

steady = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Twice:
    device = "cpu"

    def run(self, batch):
        return {"twice": batch["x"] * 2}


class Context:
    """What TorchServe hands to handlers."""

    def __init__(self, headers):
        self.headers, self.statuses, self.types, self.own = headers, {}, {}, {}

    def get_all_request_header(self, idx):
        return self.headers[idx]

    def get_request_id(self, idx):
        return f"id-{idx}"

    def set_response_content_type(self, idx, value):
        self.types[idx] = value

    def set_response_status(self, code, phrase, idx):
        self.statuses[idx] = code

    def set_response_header(self, idx, key, value):
        self.own[idx] = {**self.own.get(idx, {}), key: value}


def served(model):
    service = Service()
    service._model = model
    return service


@pytest.fixture(scope="module")
def pair():
    return served(ServedModel(PAIR, Scale(), max_batch=4))


@pytest.fixture(scope="module")
def one():
    return served(ServedModel(ONE, Twice(), max_batch=4))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return served(ServedModel(TEXT, CountGood(), max_batch=4, folder=folder))


@pytest.fixture
def images(served_signature, brightness_backend):
    return served(ServedModel(served_signature, brightness_backend, max_batch=4))


def survives(service, good, row, headers):
    """Send a request among good ones; its status. The good ones' answers must be as if they had come alone."""
    (alone,) = service.handle([good[0]], Context([good[1]]))
    context = Context([good[1], headers, good[1]])
    first, body, last = service.handle([good[0], row, good[0]], context)
    assert first == last == alone
    assert "error" not in json.loads(alone)
    status = context.statuses.get(1, 200)
    assert {0, 2}.isdisjoint(context.statuses)
    if status == 200:
        length = context.own.get(1, {}).get("Inference-Header-Content-Length")
        assert (length is not None) == (context.types[1] == "application/octet-stream")
        assert "error" not in json.loads(body[: int(length)] if length else body)
        return status
    assert status in (400, 413, 415, 422)
    document = json.loads(body)
    error = document["error"]
    code, message = (document["code"], error.partition(": ")[2]) if isinstance(error, str) else error.values()
    assert re.fullmatch("[a-z0-9_]+", code)
    assert message.isprintable()
    assert SENTENCE.match(message), message
    return status


DEEP, LONG = "deep", "long"
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**400, 10**18, -1]),
    st.floats(),
    st.sampled_from(["", "\ud800", "\udfff\ud800", "\ufeff", "\0", "é" * 300, "NaN", "1", DEEP, LONG, "%", "aaaa"]),
    st.text(max_size=3),
    st.sampled_from([[], {}, [[]], [{}], {"b64": 1}, {"b64": "aaaa"}, [[1, 2], [3]], [None], [1] * 300, ["x"] * 300]),
)
KEYS = [
    "inputs",
    "instances",
    "parameters",
    "outputs",
    "id",
    "name",
    "shape",
    "datatype",
    "data",
    "b64",
    "x",
    "ids",
    "é",
]
KEYS += ["text", "image", "top_k", "binary_data", "binary_data_size", "binary_data_output", "classification", "\ud800"]


@st.composite
def spoilt(draw, documents):
    """A valid document with one to three nodes replaced, removed or moved to another key."""
    document = {"document": copy.deepcopy(draw(st.sampled_from(documents)))}
    for _ in range(draw(st.integers(1, 3))):
        parent, key = document, "document"
        while isinstance(parent[key], dict | list) and parent[key] and draw(st.integers(0, 3)):
            parent = parent[key]
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        change = draw(st.integers(0, 4))
        if change <= 2 or parent is document:
            parent[key] = copy.deepcopy(draw(leaves))
        elif change == 3:
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(KEYS))] = parent.pop(key)
    return document["document"]


@st.composite
def written(draw, documents):
    """The same as bytes that are not always JSON."""
    document = draw(spoilt(documents))
    text = json.dumps(document, ensure_ascii=draw(st.booleans()))
    depth = draw(st.sampled_from([5, 900, 20_000]))
    text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth).replace(f'"{LONG}"', "9" * 5000)
    if text.startswith('{"') and draw(st.integers(0, 7)) == 0:
        text = '{"inputs": 1, ' + text[1:]  # a key that comes twice
    data = text.encode(draw(st.sampled_from(["utf-8"] * 8 + ["utf-8-sig", "utf-16"])), "surrogatepass")
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data


TYPES = [
    "",
    'Application/JSON; Charset="UTF-8"',
    "application/json; charset=utf-16",
    "application/json;;=",
    "text/json",
]
TYPES += ["application/octet-stream", "application/x-npy", "text/plain", "text/plain; charset=latin-1", "image/png"]
TYPES += ["multipart/form-data", "application/x-www-form-urlencoded", "text/json", "\u2028"]
types = st.sampled_from([JSON] * 6 + TYPES)
ENCODINGS = ["gzip", "deflate", "identity", "br", "gzip, gzip", "GZIP", "\x00", "plain gzip"]
encodings = st.sampled_from([None] * 8 + ENCODINGS)
lengths = st.sampled_from(["0", "-1", "1", "9" * 30, "x", "", "²"])
extras = st.dictionaries(
    st.sampled_from(["X-Parameters", "inference-header-content-length", "body", "describe", "Accept", "é"]),
    st.one_of(st.sampled_from(['{"top_k": 1}', "{", "[1]", '{"top_k": NaN}', '{"a": 1}', "\ud800", "True"]), lengths),
    max_size=2,
)


@st.composite
def sent(draw, bodies):
    """A row and headers as TorchServe gives them: with the body parsed if it can, as it does unless told otherwise."""
    data, encoding = draw(bodies), draw(encodings)
    headers = {draw(st.sampled_from(["Content-Type", "content-type"])): draw(types), **draw(extras)}
    if encoding is not None:
        headers["Content-Encoding"] = encoding.removeprefix("plain ")
        packed = {"gzip": gzip.compress, "deflate": zlib.compress, "GZIP": gzip.compress}.get(encoding, bytes)(data)
        data = packed[: draw(st.sampled_from([len(packed)] * 3 + [len(packed) // 2]))]
    value = data
    declared = next(value for name, value in headers.items() if name.lower() == "content-type")
    if draw(st.booleans()) and declared.partition(";")[0].lower() in (JSON, "text/plain", "text/json"):
        try:
            value = json.loads(data.decode()) if "json" in declared.lower() else data.decode()
        except (ValueError, RecursionError):
            value = bytearray(data)
    name = draw(st.sampled_from(["body"] * 5 + ["data", "inputs", "parameters", "é", "top_k", ""]))
    return {name: value, **({"top_k": b"x"} if draw(st.integers(0, 9)) == 0 else {})}, headers


def tensor(name, datatype, shape, data):
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def ways(inputs, outputs, plain, sample):
    """Valid documents of every JSON form."""
    return [
        {"inputs": plain},
        {"inputs": [sample, sample], "parameters": {}},
        {"instances": [sample, sample]},
        {"inputs": inputs, "id": "1"},
        {"inputs": inputs, "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs]},
        {"inputs": inputs, "parameters": {"binary_data_output": True}},
    ]


SAMPLE = {"ids": [1, 2], "scale": 2}
PAIR_WAYS = ways(
    [tensor("ids", "INT64", [1, 2], [1, 2]), tensor("scale", "FP32", [1], [2])], ["total", "scaled"], SAMPLE, SAMPLE
)
ONE_WAYS = ways([tensor("x", "FP32", [1, 2], [[1, 2]])], ["twice"], [1, 2], {"x": [1, 2]})
TEXT_WAYS = ways([tensor("text", "BYTES", [2], ["good", "bad"])], ["label", "logits"], "good", "bad")
PIXELS = np.full((8, 8), 200).tolist()
IMAGE_WAYS = ways([tensor("image", "BYTES", [1], ["aaaa"])], ["label"], PIXELS, PIXELS)


@steady
@given(st.data())
def test_tensors(pair, data):
    row, headers = data.draw(sent(written(PAIR_WAYS)))
    survives(pair, ({"body": {"inputs": SAMPLE}}, {"content-type": JSON}), row, headers)


@steady
@given(st.data())
def test_one_tensor(one, data):
    row, headers = data.draw(sent(written(ONE_WAYS)))
    survives(one, ({"body": {"inputs": [1, 2, 3]}}, {"content-type": JSON}), row, headers)


@steady
@given(st.data())
def test_texts(texts, data):
    row, headers = data.draw(sent(st.one_of(written(TEXT_WAYS), st.binary(max_size=9), st.just(b"\xef\xbb\xbfgood"))))
    survives(texts, ({"body": "good good"}, {"content-type": "text/plain"}), row, headers)


@steady
@given(st.data())
def test_images(images, picture, data):
    good = picture("mid")
    encoded = {"b64": base64.b64encode(good).decode()}
    row, headers = data.draw(sent(st.one_of(written([*IMAGE_WAYS, {"inputs": encoded}]), broken(good))))
    survives(images, ({"body": good}, {"content-type": "image/png"}), row, headers)


@st.composite
def broken(draw, data):
    """Bytes of a file with a few of them changed, and the end cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        changed[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.sampled_from([len(data)] * 3 + [len(data) // 2, 9]))])


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@steady
@given(st.data())
def test_arrays(one, data):
    array = data.draw(
        st.sampled_from(
            [
                np.float32([[1, 2], [3, 4]]),
                np.float64([[1, np.nan]]),
                np.float16([1, np.inf]),
                np.asfortranarray(np.float32([[1, 2], [3, 4]])).astype(">f4"),
                np.zeros((0, 2), np.float32),
                np.zeros(2, [("a", "f4")]),
                np.array(["a"]),
                np.complex64([1, 2]),
                np.longdouble([1, 2]),
            ]
        )
    )
    header = {"content-type": data.draw(st.sampled_from(["application/x-npy", "", "application/octet-stream"]))}
    body = data.draw(broken(npy(array)))
    shape = data.draw(st.sampled_from([None, "-2,", "9" * 4000 + ",", "True,", "2, 2, 2", "1 << 9,", "1,) * (9,"]))
    if shape:
        body = re.sub(rb"'shape': \([^)]*\)", b"'shape': (" + shape.encode() + b")", body, count=1)
    survives(one, ({"body": {"inputs": [1, 2, 3]}}, {"content-type": JSON}), {"body": body}, header)


@steady
@given(st.data())
def test_bytes_after_the_json(pair, texts, data):
    service, documents, good = data.draw(
        st.sampled_from(
            [
                (pair, PAIR_WAYS[3:], ({"body": {"inputs": SAMPLE}}, {"content-type": JSON})),
                (texts, TEXT_WAYS[3:], ({"body": "good"}, {"content-type": "text/plain"})),
            ]
        )
    )
    document = copy.deepcopy(data.draw(st.sampled_from(documents)))
    binary = b""
    for item in document["inputs"]:
        values = item.pop("data")
        size = data.draw(st.sampled_from([0, 0, 0, 1, -1, 2**31]))
        piece = {
            "INT64": lambda values=values: np.array(values, "<i8").tobytes(),
            "FP32": lambda values=values: np.array(values, "<f4").tobytes(),
            "BYTES": lambda values=values, size=size: b"".join(
                struct.pack("<I", max(0, len(text) + size)) + text.encode() for text in values
            ),
        }[item["datatype"]]()
        claims = [len(piece)] * 4 + [len(piece) + 1, 0, -1, 2**63, 10**400, "8", None, 8.0]
        item["parameters"] = {"binary_data_size": data.draw(st.sampled_from(claims))}
        binary += piece
    head = json.dumps(document).encode()
    length = data.draw(st.one_of(st.just(str(len(head))), st.just(str(len(head))), lengths))
    headers = {"Inference-Header-Content-Length": length, "content-type": "application/octet-stream"}
    survives(service, good, {"body": head + data.draw(broken(binary))}, headers)


@steady
@given(
    fields=st.dictionaries(
        st.sampled_from(["", "a", "é\u2028", "body", "data", "parameters", "top_k", "\0"]),
        st.tuples(
            st.sampled_from([b"", b"good", b"\xff", b"{", b'{"top_k": 1}', b"\xef\xbb\xbfbad", b'{"inputs": "x"}']),
            st.sampled_from(
                ["", JSON, "text/plain", "image/png", "application/octet-stream", "\u2028", "TEXT/PLAIN;a"]
            ),
        ),
        max_size=4,
    ),
    encoding=encodings,
)
def test_fields_of_multipart(texts, fields, encoding):
    row = {name: value for name, (value, _) in fields.items()}
    headers = {name: {"content-type": kind} for name, (_, kind) in fields.items()}
    headers |= {"content-type": "multipart/form-data; boundary=x", "content-encoding": encoding or ""}
    survives(texts, ({"body": "good"}, {"content-type": "text/plain"}), row, headers)
