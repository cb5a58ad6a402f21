"""Requests for serving_fuzz.py that are whole HTTP and wrong inside: valid ones, damaged by a seeded chance.

Every case is made from its own seed, so one that finds a fault can be made again alone.
"""

import base64
import copy
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from serving_client import http_message
from serving_server import Known

FORM = "application/x-www-form-urlencoded"
JSON = "application/json"
DEEP, HUGE_INTEGER = "@@deep@@", "@@huge@@"  # written as text: neither can be dumped
# More values than this make a body of megabytes, which tells nothing that a small one does not.
MOST_PIXELS = 4096
PATH_SUFFIXES = ("", "", "", "", "", "/1.0", "/9.9", "/", "//", "/%00", "/..%2f..", "/1.0/x")

CONTENT_TYPES = (
    *("", JSON, "application/JSON ; charset=utf-16", "application/json; charset=nonsense", "text/plain", "text/html"),
    *("text/plain; charset=utf-16", "text/csv", "image/png", "image/jpeg", "image/gif", "image/*", "IMAGE/PNG"),
    *("application/octet-stream", "multipart/form-data", "multipart/form-data; boundary=", "multipart/mixed"),
    *(FORM, f"{FORM}; charset=nonsense", "application/xml", "application/x-protobuf", "*/*", "/", ";", "a/b;c=d;;e"),
    *("application/json, text/plain", "x" * 500, "image/png\tx", "t\u00e9xt/plain", "application/vnd.api+json"),
)
ODD_HEADERS: tuple[tuple[str, str], ...] = (
    ("describe", "True"),
    ("explain", "True"),
    ("body", "x"),
    ("data", "x"),
    ("Content-Encoding", "gzip"),
    ("Content-Encoding", "deflate"),
    ("Accept", "application/xml;q=nonsense"),
    ("Accept-Encoding", "nonsense, gzip;q=9"),
    ("Accept-Charset", "utf-7"),
    ("Expect", "100-continue"),
    ("Expect", "nonsense"),
    ("Connection", "close"),
    ("Connection", "keep-alive, Upgrade"),
    ("Upgrade", "h2c"),
    ("Range", "bytes=5-1"),
    ("Content-Range", "bytes 0-1/2"),
    ("Cookie", "a=" + "b" * 3000),
    ("X-Forwarded-For", "\u00ff\u00fe"),
    ("x-request-id", "%s%n${jndi:ldap://localhost/a}"),
    ("X-Empty", ""),
    ("X-Long", "y" * 6000),
    ("Content-Type", JSON),
    ("Content-Disposition", 'form-data; name="body"; filename="../../x"'),
    ("TE", "trailers"),
    ("Inference-Header-Content-Length", "5"),
    ("Inference-Header-Content-Length", "-1"),
    ("inference-header-content-length", "9" * 30),
    ("ts_request_sequence_id", "1"),
    ("traceparent", "00-zz-zz-zz"),
)
CONNECTION_HEADERS = {"Expect", "Connection", "Upgrade"}
QUERIES = ("?", "?a", "?a=b&a=c", "?body=x", "?data=%7B%7D", "?inputs=[]", "?%00=%00", "?" + "q=1&" * 300, "?a=%F0%9F")
BAD_QUERIES = ("?a=%zz", "?%", "?a=%f", "?=%&=%")

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 1e308, -1e308, 1e39, 5e-324, 255, 256, 2**31, 2**53 + 1, 2**63, -(2**63) - 1),
    *(10**30, 10**400, HUGE_INTEGER, float("nan"), float("inf"), -float("inf"), -0.0),
    *("", " ", "x", "1", "NaN", "\x00", "\ud800", "\udfff\ud800", "\u202e\u0301", "\U0001d518" * 100, "a b " * 2000),
    *([], {}, [[]], [[[]]], [None], [[1], [2, 3]], [True, 1, "x", None], [0] * 1000, [[0] * 40] * 40, DEEP),
    *({"b64": ""}, {"b64": "AAAA"}, {"b64": "%%%"}, {"b64": None}, {"a": {"b": [1]}}, {"": 0}, {"inputs": {}}),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request.

    Attributes:
        kind: What is wrong with it.
        message: All of it.
        reusable: Whether others may follow on its connection. After a failed ``Expect`` they may not: TorchServe takes
            the body for the next request.
    """

    kind: str
    message: bytes
    reusable: bool


@dataclass(kw_only=True)
class Draft:
    """A request in the making."""

    method: str = "POST"
    target: str
    content_type: str
    body: bytes
    headers: list[tuple[str, str]]


def make_case(chance: random.Random, known: Sequence[Known], token: str) -> Case:
    """A golden sample with one mutation of its body, and now and then one of its surroundings."""
    one = chance.choice(known)
    draft = Draft(
        target=f"/predictions/{one.model}", content_type=one.payload.content_type, body=one.payload.body, headers=[]
    )
    (mutate,) = chance.choices(list(MUTATIONS), list(MUTATIONS.values()))
    mutate(chance, draft, one)
    kind = mutate.__name__
    if chance.random() < 0.15:
        (surround,) = chance.choices(SURROUNDINGS)
        surround(chance, draft, one)
        kind += f"+{surround.__name__}"
    headers = [("Content-Type", draft.content_type)] if draft.content_type else []
    headers = [*headers, *draft.headers]
    return Case(
        kind=kind,
        message=http_message(draft.method, draft.target, token=token, headers=headers, body=draft.body),
        reusable=not {name for name, _ in headers} & CONNECTION_HEADERS,
    )


def documents(one: Known) -> list[Any]:
    """Valid JSON documents that ask for a golden sample."""
    payload = one.payload
    if payload.content_type == JSON:
        value = json.loads(payload.body)["inputs"]
    elif payload.content_type.startswith("text/"):
        value = payload.body.decode()
    else:
        encoded = {"b64": base64.b64encode(payload.body).decode()}
        pixels = np.asarray(Image.open(io.BytesIO(payload.body)))
        value = pixels.tolist() if pixels.size <= MOST_PIXELS else encoded
        return [{"inputs": value}, {"inputs": encoded}, {"instances": [value, encoded]}, {"instances": [encoded]}]
    return [{"inputs": value}, {"inputs": [value]}, {"inputs": [value, value]}, {"instances": [value]}]


def open_tensors(one: Known) -> list[dict[str, Any]]:
    """The inputs of a golden sample as the Open Inference Protocol has them."""
    payload = one.payload
    if payload.content_type.startswith("image/"):
        data = [base64.b64encode(payload.body).decode()]
        return [{"name": one.inputs[0], "shape": [1], "datatype": "BYTES", "data": data}]
    value = json.loads(payload.body)["inputs"] if payload.content_type == JSON else payload.body.decode()
    if isinstance(value, str):
        return [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [value]}]
    arrays = {name: np.array(value[name] if isinstance(value, dict) else value) for name in one.inputs}
    return [
        {"name": name, "shape": [1, *array.shape], "datatype": "FP32", "data": array.ravel().tolist()}
        for name, array in arrays.items()
    ]


def open_inference(chance: random.Random, draft: Draft, one: Known) -> None:
    """Requests of the Open Inference Protocol, spoilt like any JSON, their tensors in JSON or after it."""
    tensors = open_tensors(one)
    document: Any = {"inputs": tensors}
    extra = {"id": "a", "outputs": [{"name": "logits"}], "parameters": {"binary_data_output": True}}
    document |= {key: extra[key] for key in chance.sample(sorted(extra), chance.randrange(4))}
    binary = b""
    if chance.random() < 0.4:
        for tensor in tensors:
            numbers = tensor["datatype"] != "BYTES"
            texts = [] if numbers else [str(item).encode() for item in tensor["data"]]
            data = np.array(tensor["data"], "<f4").tobytes() if numbers else b""
            data += b"".join(
                struct.pack("<I", len(text) + chance.choice((0, 0, 0, 1, 1 << 31))) + text for text in texts
            )
            del tensor["data"]
            sizes = (len(data), len(data), len(data), len(data) + 1, 0, -1, 1 << 40, "5", None)
            tensor["parameters"] = {"binary_data_size": chance.choice(sizes)}
            binary += data
    for _ in range(chance.choice((0, 1, 1, 1, 2))):
        document = mutated(chance, document)
    text = dumped(chance, document)
    if binary or chance.random() < 0.1:
        lengths = (len(text), len(text), len(text), len(text) - 1, len(text) + 1, 0, -1, 1 << 40, "x", "")
        draft.headers.append(("Inference-Header-Content-Length", str(chance.choice(lengths))))
    draft.body, draft.content_type = text + binary, JSON
    draft.target = chance.choice((draft.target, f"/v2/models/{one.model}/infer"))


def json_structure(chance: random.Random, draft: Draft, one: Known) -> None:
    """Nodes of a valid document replaced, removed, repeated, wrapped, renamed."""
    document = copy.deepcopy(chance.choice(documents(one)))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        document = mutated(chance, document)
    draft.body, draft.content_type = dumped(chance, document), JSON


def mutated(chance: random.Random, document: Any) -> Any:
    """One change at a random node: each level is as likely to stop as to go deeper."""
    parent, key, node = None, None, document
    while isinstance(node, dict | list) and node and (parent is None or chance.random() < 0.6):
        parent, key = node, chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
    if parent is None:
        return copy.deepcopy(chance.choice(ODD_VALUES))
    change = chance.randrange(8)
    if change <= 2:
        parent[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    elif change == 3:
        del parent[key]
    elif change == 4:
        parent[key] = [node] * chance.choice((1, 2, 5, 300))
    elif change == 5:
        parent[key] = node[0] if isinstance(node, list) and node else {"value": node}
    elif change == 6 and isinstance(parent, dict):
        parent[chance.choice(("inputs", "instances", "input", "parameters", "", "INPUTS", "b64"))] = node
    elif isinstance(parent, list):
        parent.insert(chance.randrange(len(parent) + 1), copy.deepcopy(chance.choice(ODD_VALUES)))
    else:
        parent[chance.choice(("Inputs", "x", "\u0000", "inputs "))] = parent.pop(key)
    return document


def dumped(chance: random.Random, document: Any) -> bytes:
    text = json.dumps(document, ensure_ascii=chance.random() < 0.7)
    depth = chance.choice((5, 60, 900, 1100, 20_000))
    text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    text = text.replace(f'"{HUGE_INTEGER}"', "9" * chance.choice((20, 400, 5000)))
    return text.encode("utf-8", "surrogatepass")


def json_text(chance: random.Random, draft: Draft, one: Known) -> None:
    """A valid document spoilt as text."""
    text = json.dumps(chance.choice(documents(one)))
    at = chance.randrange(len(text))
    spoil: list[Callable[[], str | bytes]] = [
        lambda: text[:at],
        lambda: text + text,
        lambda: text[:at] + chance.choice(("{", "}", "[", "]", ",", '"', "\\", "\n", "\x00", "//", "'")) + text[at:],
        lambda: text.replace(":", ":1e999,", 1),
        lambda: text.replace('"', "'"),
        lambda: text[:-1] + ",}",
        lambda: text[:-1] + "," + text[1:],  # every key twice
        lambda: "\ufeff" + text,
        lambda: text.encode("utf-16"),
        lambda: text.encode("utf-32"),
        lambda: text.encode()[:at] + bytes([chance.randrange(128, 256)]) + text.encode()[at:],
        lambda: chance.choice(("[", '{"inputs":', '{"a":[', '[{"inputs":')) * chance.choice((50, 990, 30_000)),
        lambda: chance.choice(("null", "true", "0", '"x"', "[]", "{}", "NaN", "-", "1e5", '"\\ud800"', " ", "\n")),
        lambda: " " * chance.choice((1, 100_000)) + text,
    ]
    made = chance.choice(spoil)()
    draft.body = made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass")
    draft.content_type = chance.choice((JSON, JSON, ""))


def body_bytes(chance: random.Random, draft: Draft, one: Known) -> None:
    """The golden body cut off, flipped, repeated, or noise in its place."""
    body = bytearray(draft.body)
    change = chance.randrange(6)
    if change == 0:
        body = body[: chance.randrange(len(body))]
    elif change == 1:
        for _ in range(chance.choice((1, 3, 30))):
            body[chance.randrange(len(body))] = chance.randrange(256)
    elif change == 2:
        body *= chance.choice((2, 50))
    elif change == 3:
        body = bytearray(chance.randbytes(chance.choice((1, 7, 100, 5000))))
    elif change == 4:
        at = chance.randrange(len(body))
        body[at:at] = chance.randbytes(chance.choice((1, 100)))
    else:
        body = bytearray()
    draft.body = bytes(body)


def wrong_type(chance: random.Random, draft: Draft, one: Known) -> None:
    """A good body called something else."""
    draft.content_type = chance.choice(CONTENT_TYPES)


def multipart(chance: random.Random, draft: Draft, one: Known) -> None:
    """Fields in any number and form, and then, mostly, damage to the whole."""
    boundary = chance.choice(("b", "----WebKit", "x" * 70, "a'()+_,-./:=?", "b"))
    count = chance.choice((0, 1, 1, 2, 3, 20, 300))
    pieces = []
    for number in range(count):
        name = chance.choice((f"f{number}", f"f{number}", "body", "data", "same", "", "\u00fc", 'q"q', "a" * 300))
        file = chance.choice(("", '; filename="a.png"', '; filename=""', '; filename="../../etc/passwd"', "; filename"))
        kind = chance.choice(("", f"\r\nContent-Type: {one.payload.content_type}", "\r\nContent-Type: ;;", "\r\nX: y"))
        data = chance.choice((draft.body, draft.body, draft.body[:20], b"", b"\r\n--b", chance.randbytes(30)))
        disposition = chance.choice((f'form-data; name="{name}"{file}',) * 6 + ("form-data", "", f"file; name={name}"))
        head = f"--{boundary}\r\nContent-Disposition: {disposition}{kind}\r\n\r\n"
        pieces.append(head.encode("utf-8") + data + b"\r\n")
    body = b"".join(pieces) + f"--{boundary}--\r\n".encode()
    declared = chance.choice((boundary,) * 6 + (f'"{boundary}"', "", "other", boundary + "x"))
    if chance.random() < 0.5:
        body = body[: chance.randrange(len(body))]
    elif chance.random() < 0.3:
        body = body.replace(b"\r\n", b"\n")
    draft.body, draft.content_type = body, f"multipart/form-data; boundary={declared}"


def form(chance: random.Random, draft: Draft, one: Known) -> None:
    """Forms, as curl sends bodies by default."""
    draft.content_type = FORM
    draft.body = chance.choice(
        (draft.body, b"a=b", b"body=x&data=y", b"inputs=%5B%5D", b"=&=&&", b"a=%zz", b"%", b"a" * 5000, b"")
    )


def image_file(chance: random.Random, draft: Draft, one: Known) -> None:
    """Pictures of every mode, format and size, whole and broken."""
    size = (chance.choice((1, 2, 8, 65, 300)), chance.choice((1, 3, 8, 64)))
    mode = chance.choice(("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"))
    file = "JPEG" if mode in ("L", "RGB", "CMYK") and chance.random() < 0.5 else "PNG"
    buffer = io.BytesIO()
    image = Image.new("RGB" if mode == "CMYK" and file == "PNG" else mode, size)
    image.save(buffer, file)
    body = bytearray(buffer.getvalue())
    change = chance.randrange(6)
    if change == 0:
        body = body[: chance.randrange(8, len(body))]
    elif change == 1:
        for _ in range(5):
            body[chance.randrange(8, len(body))] = chance.randrange(256)
    elif change == 2:
        sides = chance.choice(((0, 0), (60_000, 60_000), (2**31 - 1, 1), (5000, 5000), (1, 100_000)))
        body = bytearray(png_claiming(*sides, chance.choice((zlib.compress(b""), zlib.compress(bytes(5000)), b"x"))))
    elif change == 3:
        buffer = io.BytesIO()
        Image.new("L", size).save(buffer, chance.choice(("GIF", "BMP", "TIFF", "WEBP")))
        body = bytearray(buffer.getvalue())
    elif change == 4:
        body += chance.randbytes(1000)
    draft.body, draft.content_type = bytes(body), chance.choice(("image/png", "image/jpeg", "", "image/png"))


def png_claiming(width: int, height: int, data: bytes) -> bytes:
    """A PNG whose header claims a size that its data need not fill."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text_body(chance: random.Random, draft: Draft, one: Known) -> None:
    """Texts as they come, and as they should not."""
    draft.content_type = chance.choice(("text/plain", "text/plain; charset=latin-1", "text/x-unknown", "TEXT/PLAIN"))
    draft.body = chance.choice(
        (
            *(b"hello", b" ", b"\x00", b"\xff\xfe\xfd", b"\xed\xa0\x80", "\u202e\u0301\ufffe".encode(), b"\r\n" * 50),
            *("\U0001f600".encode() * 3000, b"word " * 3000, b"[" * 50, b"a" * 20_000, bytes(range(256))),
        )
    )


def too_large(chance: random.Random, draft: Draft, one: Known) -> None:
    """Above one of the limits: characters, samples, and, seldom, bytes."""
    which = chance.randrange(20)
    if which == 0:
        draft.body = draft.body + bytes(17 << 20)
    elif which < 10:
        draft.body, draft.content_type = json.dumps({"inputs": "a" * 100_001}).encode(), JSON
    else:
        document = {"instances": [documents(one)[0]["inputs"]] * 257}
        draft.body, draft.content_type = json.dumps(document).encode(), JSON


def odd_headers(chance: random.Random, draft: Draft, one: Known) -> None:
    """Headers that mean something elsewhere."""
    draft.headers += chance.sample(ODD_HEADERS, chance.choice((1, 2, 5)))


def odd_target(chance: random.Random, draft: Draft, one: Known) -> None:
    """Other versions, routes and queries."""
    routes = (
        f"/predictions/{one.model}",
        f"/v1/models/{one.model}:predict",
        f"/v2/models/{one.model}/infer",
        f"/explanations/{one.model}",
        f"/predictions/{one.model.upper()}",
        "/predictions",
        "/models",
        "/ping",
        "/",
        "/api-description",
    )
    query = chance.choice(BAD_QUERIES) if chance.random() < 0.2 else chance.choice(("", *QUERIES))
    draft.target = chance.choice((routes[0], *routes)) + chance.choice(PATH_SUFFIXES) + query


def odd_method(chance: random.Random, draft: Draft, one: Known) -> None:
    """Methods that predictions do not have."""
    draft.method = chance.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "post"))


Mutation = Callable[[random.Random, Draft, Known], None]
MUTATIONS: dict[Mutation, int] = {
    json_structure: 30,
    json_text: 15,
    open_inference: 12,
    body_bytes: 14,
    wrong_type: 8,
    multipart: 10,
    form: 4,
    image_file: 6,
    text_body: 4,
    too_large: 1,
    odd_headers: 4,
    odd_target: 4,
    odd_method: 2,
}
SURROUNDINGS: list[Mutation] = [odd_headers, odd_target, odd_method, wrong_type]
