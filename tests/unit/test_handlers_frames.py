"""TorchServe's wire: the same requests and answers as TorchServe's own code reads and writes, however they arrive."""

import io
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.frames import FrameError, FrameReader, Reply

from .stock_torchserve import Replies, context, inference_request, message, otf_message_handler, service

ONE = message(
    inference_request(
        "6a0b-1",
        fields=[("body", "image/png", b"\x89PNG\r\n\0\xff")],
        headers=[("Content-Type", "image/png"), ("x-request-timeout-ms", "250")],
    )
)
SEVERAL = message(
    inference_request("1", fields=[("body", "", b"")]),
    # A form; its fields have types of their own.
    inference_request(
        "2",
        fields=[("first", "image/png", b"abc"), ("zweites ü", "text/plain; charset=utf-8", "ö".encode())],
        headers=[("content-type", "multipart/form-data; boundary=x"), ("first", "a header named like a field")],
    ),
    inference_request("3"),
    # A query beside a body, a field and a header that come twice.
    inference_request(
        "4",
        fields=[("verbose", "", b"1"), ("body", "application/json", b'{"inputs": 1}'), ("verbose", "x", b"2")],
        headers=[("a", "1"), ("a", "2")],
    ),
)
NAMES = st.text(max_size=5)
REQUESTS = st.builds(
    inference_request,
    NAMES,
    fields=st.lists(st.tuples(NAMES, NAMES, st.binary(max_size=20)), max_size=3),
    headers=st.lists(st.tuples(NAMES, NAMES), max_size=3),
)
STREAMS = st.lists(st.lists(REQUESTS, max_size=3).map(lambda requests: message(*requests)), max_size=3).map(b"".join)


class Stream:
    """A connection from which bytes come, and the end of them."""

    def __init__(self, data):
        self._data = io.BytesIO(data)
        self.recv = self._data.read

    def more(self):
        return self._data.tell() < len(self._data.getbuffer())


@pytest.fixture(autouse=True, scope="module")
def _undecoded():
    """TorchServe's own reader parses JSON and texts at once; what it parses is what is compared here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TS_DECODE_INPUT_REQUEST", "false")
        yield


def read_by_torchserve(data):
    """Id, headers and fields of each request, as a handler of TorchServe gets them."""
    stream = Stream(data)
    found = []
    while stream.more():
        command, batch = otf_message_handler.retrieve_msg(stream)
        assert command == b"I"
        headers, fields, ids = service.Service.retrieve_data_for_inference(batch)
        for i, own in enumerate(fields):
            found.append((ids[i], headers[i].get_request_properties(), own))
    return found


def read(reader, *chunks):
    return [(frame.id.decode(), frame.headers, frame.fields) for chunk in chunks for frame in reader.feed(chunk)]


@pytest.mark.parametrize("data", [ONE, SEVERAL, SEVERAL + message() + ONE + SEVERAL], ids=["one", "several", "stream"])
def test_a_stream_that_is_cut_anywhere_gives_the_requests_that_torchserve_reads(data):
    expected = read_by_torchserve(data)
    assert read(FrameReader(), data) == expected
    for cut in range(len(data) + 1):
        assert read(FrameReader(), data[:cut], data[cut:]) == expected, cut
    for size in (1, 2, 3, 7):
        assert read(FrameReader(), *(data[i : i + size] for i in range(0, len(data), size))) == expected


@settings(deadline=None)
@given(STREAMS, st.lists(st.integers(0, 400), max_size=6))
def test_any_stream_cut_in_any_way_gives_the_requests_that_torchserve_reads(data, cuts):
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[start:stop] for start, stop in itertools.pairwise(bounds)]
    assert read(FrameReader(), *chunks) == read_by_torchserve(data)


def test_the_requests_of_a_form_and_of_a_query():
    """What the two readers agree on, written out."""
    first, form, nothing, query = read(FrameReader(), SEVERAL)
    assert first == ("1", {"body": {"content-type": ""}}, {"body": b""})
    assert form == (
        "2",
        {
            "first": "a header named like a field",
            "zweites ü": {"content-type": "text/plain; charset=utf-8"},
            "content-type": "multipart/form-data; boundary=x",
        },
        {"first": b"abc", "zweites ü": "ö".encode()},
    )
    assert nothing == ("3", {}, {})
    assert query[2] == {"verbose": b"2", "body": b'{"inputs": 1}'}
    assert query[1]["a"] == "2"


def test_requests_come_as_soon_as_their_message_is_whole():
    reader = FrameReader()
    assert reader.feed(ONE[:-1]) == []
    assert [frame.id for frame in reader.feed(ONE[-1:] + SEVERAL[:10])] == [b"6a0b-1"]
    assert reader.feed(b"") == []
    assert [frame.id for frame in reader.feed(SEVERAL[10:] + ONE)] == [b"1", b"2", b"3", b"4", b"6a0b-1"]


@pytest.mark.parametrize("command", [b"L", b"x", b"\0"])
def test_another_command_is_refused(command):
    reader = FrameReader()
    reader.feed(ONE)
    with pytest.raises(FrameError, match="the frontend sent the command"):
        reader.feed(command)


class Counted:
    """Counts how often the reader looks at what has arrived."""

    def __init__(self, reader):
        self.count = 0
        self._taking = reader._taking
        reader._taking = self

    def __next__(self):
        self.count += 1
        return next(self._taking)


def test_large_bodies_in_small_chunks_are_not_looked_at_for_each_of_them():
    content = bytes(1 << 20)
    requests = [inference_request(str(i), [("body", "image/png", content)], [("a", "b")] * 3) for i in range(16)]
    data = message(*requests)
    reader = FrameReader()
    looks = Counted(reader)
    found = [frame for i in range(0, len(data), 1024) for frame in reader.feed(data[i : i + 1024])]
    assert [len(frame.fields["body"]) for frame in found] == [len(content)] * 16
    # Of 16,000 chunks: one for each body, and one or two that end in the middle of its headers or of a length.
    assert looks.count <= 3 * 16
    assert len(reader._buffer) == 0


def test_many_messages_in_one_chunk_are_read_in_one_look():
    reader = FrameReader()
    looks = Counted(reader)
    assert len(reader.feed(ONE * 1000)) == 1000
    assert looks.count == 1


@pytest.mark.parametrize(
    ("status", "phrase", "body"),
    [
        (200, "OK", b'{"label": "7"}'),
        (415, "Unsupported Media Type", '{"error": "ü"}'.encode()),
        (503, "Service Unavailable", b""),
        (200, "OK", bytes(range(256)) * 5000),
    ],
)
def test_an_answer_is_what_torchserve_makes_of_it(status, phrase, body):
    ids = {0: "6a0b-1"}
    own = context.Context("m", ".", {}, 1, None, "0.12.0")
    own.request_processor = [context.RequestProcessor({})]
    own.set_response_content_type(0, "application/json")
    own.set_response_status(status, phrase, 0)
    expected = otf_message_handler.create_predict_response([body], ids, "Prediction success", 200, own)
    encoded = Reply(b"6a0b-1", status, phrase, "application/json", body).encode()
    answers = [[("6a0b-1", status, phrase, "application/json", body)]]
    for form in (expected, encoded):
        assert list(Replies(io.BufferedReader(io.BytesIO(form)))) == answers
    # The content type has a field of its own; as a header besides, TorchServe's code alone writes it.
    again = otf_message_handler.encode_response_headers({"content-type": "application/json"})
    assert encoded == bytes(expected).replace(again, otf_message_handler.encode_response_headers({}), 1)


def test_answers_follow_each_other_on_the_wire():
    encoded = b"".join(Reply(str(i).encode(), 200, "OK", "text/plain", bytes(i)).encode() for i in range(5))
    found = list(Replies(io.BufferedReader(io.BytesIO(encoded))))
    assert [(id, len(body)) for ((id, _, _, _, body),) in found] == [(str(i), i) for i in range(5)]
