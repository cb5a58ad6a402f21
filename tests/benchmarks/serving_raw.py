"""Requests for serving_fuzz.py that are no HTTP, or hardly: what broken clients and scanners write into a socket."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving_client import Reply, parse_reply
from serving_server import Known, golden_message

MOST_RECEIVED_BYTES = 1 << 20
_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class RawCase:
    """Bytes for one connection.

    Attributes:
        kind: What is wrong.
        pieces: What is written, and the seconds to wait after each piece.
        patience_s: How long to read afterwards; 0 closes at once.
        right: Golden samples that must be answered, in order; empty when any answer but a 5xx will do.
    """

    kind: str
    pieces: tuple[tuple[bytes, float], ...]
    patience_s: float
    right: tuple[Known, ...] = ()


def make_raw_case(chance: random.Random, known: Sequence[Known], token: str) -> RawCase:
    make = chance.choice([*KINDS, None])
    if make is None:
        return pipelined([chance.choice(known) for _ in range(chance.choice((2, 3, 5)))], token)
    one = chance.choice(known)
    return make(chance, golden_message(one, token), one)


async def run_raw(case: RawCase, address: tuple[str, int]) -> list[Reply]:
    """Write a case and read whatever comes back until its patience, the server's, or the expected answers end."""
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(*address)
    except OSError as error:
        return [Reply(status=0, body=b"", fault=f"no connection: {error}")]
    received = bytearray()
    replies: list[Reply] = []
    try:
        for piece, pause_s in case.pieces:
            writer.write(piece)
            if pause_s:
                await asyncio.sleep(pause_s)
        async with asyncio.timeout(case.patience_s):
            while len(received) < MOST_RECEIVED_BYTES and (not case.right or len(replies) < len(case.right)):
                data = await reader.read(1 << 16)
                if not data:
                    break
                received += data
                while (found := parse_reply(received)) is not None:
                    reply, used, _ = found
                    del received[:used]
                    if reply.status >= 200:  # not a 100 Continue
                        replies.append(reply)
    except (TimeoutError, OSError):  # nothing more comes, or the server has closed: both are answers to nonsense
        pass
    finally:
        writer.transport.abort()
    return replies


def request_line(chance: random.Random, message: bytes, one: Known) -> RawCase:
    """First lines that no server should take."""
    rest = message.partition(b"\r\n")[2]
    path = f"/predictions/{one.model}".encode()
    line = chance.choice(
        (
            *(b"GARBAGE", b"POST", b"POST " + path, b"", b" ", b"\x00\x01\x02", b"POST\t" + path + b"\tHTTP/1.1"),
            *(b"POST " + path + b" HTTP/9.9", b"POST " + path + b" HTTP/1.0", b"POST " + path + b" FTP/1.1"),
            *(b"POST http://localhost" + path + b" HTTP/1.1", b"POST * HTTP/1.1", b"POST //// HTTP/1.1"),
            *(b"POST " + path + b"%zz HTTP/1.1", b"POST " + path + b"/% HTTP/1.1", b"POST \xff\xfe HTTP/1.1"),
            *(b"POST " + path + b"a" * 5000 + b" HTTP/1.1", b"P" * 9000, b"POST " + path + b" a b HTTP/1.1"),
            *(b"HEAD " + path + b" HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"POST " + path + b"?a=%zz HTTP/1.1"),
        )
    )
    return RawCase(kind="request_line", pieces=((line + b"\r\n" + rest, 0),), patience_s=0.5)


def content_length(chance: random.Random, message: bytes, one: Known) -> RawCase:
    """Lengths that are none, or not that of the body."""
    head, _, body = message.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    size = len(body)
    values = chance.choice(
        (
            *((b"-1",), (b"",), (b"x",), (b"1e3",), (b"0x10",), (b"+5",), (b"9" * 30,), (b"99999999999",)),
            *((str(size - 1).encode(),), (str(size + 50).encode(),), (b"0",), (b"2147483648",), ()),
            *((str(size).encode(), str(size + 1).encode()), (str(size).encode(), b"x"), (b"5, 5",), (b"5 5",)),
        )
    )
    lines += [b"Content-Length: " + value for value in values]
    return RawCase(kind="content_length", pieces=((b"\r\n".join(lines) + b"\r\n\r\n" + body, 0),), patience_s=0.5)


def chunked(chance: random.Random, message: bytes, one: Known) -> RawCase:
    """Chunks: once in a while good ones, which must be answered."""
    head, _, body = message.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    lines.append(b"Transfer-Encoding: chunked")
    good = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    bad = chance.choice(
        (
            *(b"zz\r\n" + body, b"-5\r\n" + body, b"%x\r\n" % (len(body) + 9) + body, b"\r\n\r\n", b"0\r\n"),
            *(b"ffffffffffffffffff\r\n" + body, b"7fffffff\r\n" + body, good[:-2], b"5;ext=" + b"a" * 9000 + b"\r\n"),
            *(b"3\r\nabcdef\r\n0\r\n\r\n", b"%x\n" % len(body) + body + b"\n0\n\n", b"0\r\nX: y\r\n" * 50 + b"\r\n"),
            *(good.replace(b"0\r\n\r\n", b"0\r\nContent-Length: 5\r\n\r\n"),),
        )
    )
    fine = chance.random() < 0.25
    if chance.random() < 0.2:
        lines.append(b"Content-Length: 3")
        fine = False
    whole = b"\r\n".join(lines) + b"\r\n\r\n" + (good if fine else bad)
    return RawCase(
        kind="chunked",
        pieces=((whole, 0),),
        patience_s=30.0 if fine else 0.5,
        right=(one,) if fine else (),
    )


def early_close(chance: random.Random, message: bytes, one: Known) -> RawCase:
    """Half a request, or a whole one whose answer nobody waits for."""
    end = chance.choice((chance.randrange(1, len(message)), len(message)))
    return RawCase(kind="early_close", pieces=((message[:end], chance.choice((0.001, 0.05))),), patience_s=0)


def slow(chance: random.Random, message: bytes, one: Known) -> RawCase:
    """A good request in little pieces: it must be answered like any other."""
    cuts = sorted(chance.sample(range(1, len(message)), min(6, len(message) - 1)))
    parts = [message[a:b] for a, b in zip([0, *cuts], [*cuts, len(message)], strict=True)]
    return RawCase(
        kind="slow",
        pieces=tuple((part, chance.choice((0.0, 0.02, 0.1))) for part in parts),
        patience_s=30.0,
        right=(one,),
    )


def stalled(chance: random.Random, message: bytes, one: Known) -> RawCase:
    """A connection that says little or nothing for a while."""
    return RawCase(kind="stalled", pieces=((message[: chance.choice((0, 1, 20, 60))], 1.0),), patience_s=0)


def pipelined(some: Sequence[Known], token: str) -> RawCase:
    """Several good requests written at once: as many right answers, in their order."""
    message = b"".join(golden_message(one, token) for one in some)
    return RawCase(kind="pipelined", pieces=((message, 0),), patience_s=30.0, right=tuple(some))


def headers(chance: random.Random, message: bytes, one: Known) -> RawCase:
    """Headers that are too long, too many, or none."""
    line, _, rest = message.partition(b"\r\n")
    odd = chance.choice(
        (
            *(b"X: " + b"a" * 10_000, b"X: " + b"a" * 100_000, b"Y" * 70_000 + b": 1", b"no colon", b": empty"),
            *(b"A : space", b"A: b\r\n folded: c", b"\x00: \x00", b"A: \x01\x02\xff", b"A: b\rC: d", b"A: b\nC: d"),
            *(b"\r\n".join(b"H%d: v" % i for i in range(2000)), b"Host: a\r\nHost: b", b"Authorization: Basic x"),
            *(
                b"Authorization: Bearer " + b"x" * 5000,
                b"Authorization:",
                b"Connection: \xff",
                b"Transfer-Encoding: gzip",
            ),
        )
    )
    return RawCase(kind="headers", pieces=((line + b"\r\n" + odd + b"\r\n" + rest, 0),), patience_s=0.5)


def other_protocol(chance: random.Random, message: bytes, one: Known) -> RawCase:
    """What is not HTTP/1.1 at all."""
    data = chance.choice(
        (
            *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), bytes.fromhex("16030100a5010000a10303") + bytes(160)),
            *(b"SSH-2.0-OpenSSH_9.0\r\n", b"\x00" * 1000, b"\n" * 1000, chance.randbytes(chance.choice((1, 50, 5000)))),
            *(
                b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n",
                b"GET /\r\n",
            ),
        )
    )
    return RawCase(kind="other_protocol", pieces=((data, 0),), patience_s=0.3)


KINDS: list[Callable[[random.Random, bytes, Known], RawCase]] = [
    request_line,
    content_length,
    chunked,
    early_close,
    slow,
    stalled,
    headers,
    other_protocol,
]
