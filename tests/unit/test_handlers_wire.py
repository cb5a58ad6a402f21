"""Reading TorchServe's wire in few pieces: the same bytes, with fewer system calls, and only where it is known."""

import io
import logging
import os
import random
import socket
import sys

import pytest

from handlers.wire import BufferedSocket, quieten_frontend_lines, read_in_few_pieces

from .stock_torchserve import inference_request, message, otf_message_handler, ts

TIMEOUT_S = 200


class CountedSocket:
    """A socket that counts how often it is read from."""

    def __init__(self, connection):
        self._connection = connection
        self.reads = 0

    def recv(self, size):
        self.reads += 1
        return self._connection.recv(size)

    def fileno(self):
        return self._connection.fileno()


@pytest.fixture
def connect():
    """Makes a pair of sockets: the frontend's and the worker's end."""
    made = []

    def pair():
        ends = socket.socketpair()
        made.extend(ends)
        for end in ends:
            end.settimeout(TIMEOUT_S)  # a failure is no test that hangs
        return ends

    yield pair
    for end in made:
        end.close()


class TestBufferedSocket:
    def test_pieces_are_what_was_asked_for(self, connect):
        frontend, worker = connect()
        counted = CountedSocket(worker)
        reader = BufferedSocket(counted)
        frontend.sendall(b"abcdefgh")
        assert [bytes(reader.read(length)) for length in (1, 0, 3, 4)] == [b"a", b"", b"bcd", b"efgh"]
        assert counted.reads == 1
        frontend.sendall(b"ij")
        assert reader.read(2) == b"ij"

    def test_a_piece_that_arrives_in_parts_is_waited_for(self, connect):
        frontend, worker = connect()

        class Slow:
            """Sends the next part when the worker asks for it."""

            parts = iter([b"ab", b"c", b"def"])

            def recv(self, size):
                frontend.sendall(next(self.parts))
                return worker.recv(size)

        reader = BufferedSocket(Slow())
        assert reader.read(1) == b"a"
        assert reader.read(3) == b"bcd"
        assert reader.read(2) == b"ef"

    @pytest.mark.parametrize("seed", range(5))
    def test_any_pieces_of_any_parts_are_the_stream(self, seed):
        dice = random.Random(seed)
        data = dice.randbytes(1 << 20)

        class Parts:
            position = 0

            def recv(self, size):
                part = data[self.position : self.position + dice.randint(1, min(size, 100_000))]
                self.position += len(part)
                return part

        reader = BufferedSocket(Parts())
        position = 0
        while position < len(data):
            length = min(dice.choice((1, 4, 4, 30, 5_000, 200_000)), len(data) - position)
            assert reader.read(length) == data[position : position + length]
            position += length
        with pytest.raises(EOFError):
            reader.read(1)

    def test_a_large_piece_is_not_read_in_small_ones(self):
        asked = []

        class Endless:
            def recv(self, size):
                asked.append(size)
                return bytes(size)

        assert len(BufferedSocket(Endless()).read(10_000_000)) == 10_000_000
        assert len(asked) == 1

    @pytest.mark.parametrize("sent", [b"", b"abc"])
    def test_a_closed_connection_is_the_end(self, connect, sent):
        frontend, worker = connect()
        frontend.sendall(sent)
        frontend.close()
        with pytest.raises(EOFError):
            BufferedSocket(worker).read(4)


@pytest.fixture
def stock(monkeypatch):
    """TorchServe's own way to read, which is there again after the test."""
    before = otf_message_handler._retrieve_buffer
    monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", before)
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")
    return before


REQUEST = inference_request("id-1", [("body", "image/png", b"pixels")], [("Content-Type", "image/png")])


class TestReplacement:
    def test_real_messages_are_read_with_fewer_calls(self, stock, connect):
        def batches():
            frontend, worker = connect()
            counted = CountedSocket(worker)
            frontend.sendall(message(REQUEST, REQUEST) + message(REQUEST))
            return [otf_message_handler.retrieve_msg(counted) for _ in range(2)], counted.reads

        expected, reads = batches()
        assert read_in_few_pieces()
        assert otf_message_handler._retrieve_buffer is not stock
        assert batches() == (expected, 1)
        assert reads > 30
        assert [len(batch) for _, batch in expected] == [2, 1]

    def test_a_large_body_arrives_whole(self, stock, connect):
        assert read_in_few_pieces()
        frontend, worker = connect()
        body = random.Random(0).randbytes(3 << 20)
        sender = message(inference_request("1", [("body", "", body)]))
        if not (child := os.fork()):  # a thread would share the interpreter's lock with the reader
            frontend.sendall(sender)
            os._exit(0)
        _, (request,) = otf_message_handler.retrieve_msg(worker)
        assert os.waitpid(child, 0)[1] == 0
        assert request["parameters"][0]["value"] == body

    @pytest.mark.parametrize("version", ["0.11.1", "0.12.1", "0.12", "1.0.0"])
    def test_another_release_keeps_its_own(self, stock, monkeypatch, version):
        monkeypatch.setattr(ts, "__version__", version)
        assert not read_in_few_pieces()
        assert otf_message_handler._retrieve_buffer is stock

    def test_a_release_that_reads_otherwise_keeps_its_own(self, stock, monkeypatch):
        monkeypatch.delattr(otf_message_handler, "_retrieve_buffer")
        assert not read_in_few_pieces()
        assert not hasattr(otf_message_handler, "_retrieve_buffer")

    def test_without_torchserve_nothing_happens(self, stock, monkeypatch):
        monkeypatch.setitem(sys.modules, "ts", None)
        assert not read_in_few_pieces()
        assert otf_message_handler._retrieve_buffer is stock

    @pytest.mark.parametrize("sent", [b"", message(REQUEST)[:30]])
    def test_a_frontend_that_is_gone_ends_the_worker_without_an_error(self, stock, connect, sent):
        assert read_in_few_pieces()
        frontend, worker = connect()
        frontend.sendall(sent)
        frontend.close()
        with pytest.raises(SystemExit) as end:
            otf_message_handler.retrieve_msg(worker)
        assert end.value.code == 0

    def test_a_new_connection_gets_nothing_of_an_old_one(self, stock):
        class Connection:
            """A socket; the kernel gives descriptors out again."""

            def __init__(self, data):
                self.recv = io.BytesIO(data).read

            def fileno(self):
                return 7

        assert read_in_few_pieces()
        otf_message_handler.retrieve_msg(Connection(message(REQUEST) + b"I and what nobody will read"))
        _, batch = otf_message_handler.retrieve_msg(Connection(message(inference_request("id-2"))))
        assert batch[0]["requestId"] == b"id-2"


def test_lines_for_every_batch_are_dropped_and_warnings_stay(caplog):
    root = logging.getLogger()
    before = root.level
    try:
        root.setLevel(logging.INFO)
        quieten_frontend_lines()
        logging.info("Backend received inference at: 1")  # as TorchServe does
        logging.getLogger("ts.service").info("[METRICS]PredictionTime")
        logging.getLogger("ts.service").warning("Invoking custom service failed.")
        assert [record.getMessage() for record in caplog.records] == ["Invoking custom service failed."]
    finally:
        root.setLevel(before)
