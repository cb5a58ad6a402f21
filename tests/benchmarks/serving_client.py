"""An HTTP client for the serving_*.py scripts that costs little.

It speaks HTTP/1.1 over bare asyncio transports: some 50 microseconds a request, so that on two cores the server is
measured and not the client. It runs in the script's own process; TorchServe has its own.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

REQUEST_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 10.0
_TICK_S = 0.5
_STOPPED_S = 1.0


def http_message(
    method: str, target: str, *, token: str, headers: Sequence[tuple[str, str]] = (), body: bytes = b""
) -> bytes:
    """One HTTP/1.1 request."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {token}"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What came back: status 0 when nothing did, and why."""

    status: int
    body: bytes
    fault: str = ""


class Channel(asyncio.Protocol):
    """One keep-alive connection with one request at a time."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._waiter: asyncio.Future[Reply] | None = None
        self._transport: asyncio.Transport | None = None
        self.usable = True

    @classmethod
    async def open(cls, address: tuple[str, int]) -> "Channel":
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, channel = await asyncio.get_running_loop().create_connection(cls, *address)
        return channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (found := parse_reply(self._received)) is not None:
            reply, used, keep = found
            del self._received[:used]
            if reply.status >= 200:  # not a 100 Continue
                self.usable = self.usable and keep
                self._finish(reply)

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        self._finish(Reply(status=0, body=bytes(self._received), fault=f"connection lost: {error or 'closed'}"))

    def _finish(self, reply: Reply) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(reply)

    async def send(self, message: bytes, timeout_s: float = REQUEST_TIMEOUT_S) -> Reply:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(timeout_s, self._finish, Reply(status=0, body=b"", fault="timed out"))
        assert self._transport is not None
        self._transport.write(message)
        reply = await self._waiter
        timer.cancel()
        if not reply.status:
            self.usable = False
        if not self.usable:
            self.close()
        return reply

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.abort()


def parse_reply(received: bytes | bytearray) -> tuple[Reply, int, bool] | None:
    """The first whole answer, how many bytes it took, and whether the connection stays open; None until it is whole."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(received[:end]).lower()
    status = int(head[9:12]) if head[:5] == b"http/" and head[9:12].isdigit() else 599
    # A line of its own: answers with binary data have an Inference-Header-Content-Length too.
    at = head.find(b"\r\ncontent-length:")
    length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
    total = end + 4 + length
    if len(received) < total:
        return None
    return Reply(status=status, body=bytes(received[end + 4 : total])), total, b"connection: close" not in head


class Watch:
    """Notices when this process was stopped for a while, as on a laptop that slept or a machine that others paused.

    All timers are over when it goes on, so what timed out then says nothing of the server. `async with` runs it.
    """

    def __init__(self) -> None:
        self.last = -1.0
        self.count = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Watch":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            if time.perf_counter() - before > _TICK_S + _STOPPED_S:
                self.last = time.perf_counter()
                self.count += 1

    async def stopped_since(self, moment: float) -> bool:
        await asyncio.sleep(2 * _TICK_S)  # until it has noticed
        return self.last > moment


class Pool:
    """Connections to one address, opened when none is idle. `async with` closes them."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._idle: deque[Channel] = deque()
        self.watch = Watch()

    async def __aenter__(self) -> "Pool":
        await self.watch.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.watch.__aexit__()
        while self._idle:
            self._idle.pop().close()

    async def send_again(self, message: bytes, *, keep: bool = True) -> Reply:
        """As `send`; what fails while this process was stopped is sent again, with no time that could be measured."""
        while True:
            began = time.perf_counter()
            reply = await self.send(message, keep=keep)
            if reply.status or not await self.watch.stopped_since(began):
                return reply

    async def send(self, message: bytes, timeout_s: float = REQUEST_TIMEOUT_S, *, keep: bool = True) -> Reply:
        """The answer to one request; `keep` says whether others may follow on its connection."""
        while self._idle:
            channel = self._idle.pop()
            if channel.usable:
                break
        else:
            try:
                channel = await Channel.open(self._address)
            except OSError as error:
                return Reply(status=0, body=b"", fault=f"no connection: {error or type(error).__name__}")
        reply = await channel.send(message, timeout_s)
        if channel.usable and keep:
            self._idle.append(channel)
        else:
            channel.close()
        return reply
