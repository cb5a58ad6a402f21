"""The worker's side of TorchServe's wire, read in few pieces.

TorchServe 0.12.0 reads every length, header and body with a system call of its own, some forty for one request, and
logs a line for every batch. Its last release will stay as it is, so this replaces the one function that all of its
reading goes through; any other release keeps its own.
"""

from __future__ import annotations

import logging
import socket
import sys

_KNOWN_RELEASE = "0.12.0"
_CHUNK_BYTES = 1 << 16


class BufferedSocket:
    """Reads exactly what is asked for, from what has already arrived.

    Attributes:
        connection: A blocking stream socket; nothing else may read from it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._buffer = bytearray()
        self._start = 0

    def read(self, length: int) -> bytearray:
        """The next bytes; waits for them.

        Raises:
            EOFError: If the other side is gone.
        """
        stop = self._start + length
        while len(self._buffer) < stop:
            if self._start:
                del self._buffer[: self._start]
                stop, self._start = length, 0
            chunk = self.connection.recv(max(_CHUNK_BYTES, stop - len(self._buffer)))
            if not chunk:
                raise EOFError
            self._buffer += chunk
        piece = self._buffer[self._start : stop]
        self._start = stop
        return piece


def read_in_few_pieces() -> bool:
    """Let TorchServe's worker read its wire through buffers, if this is the release that is known.

    Returns:
        Whether it does.
    """
    try:
        import ts  # noqa: PLC0415  # only there inside TorchServe
        from ts.protocol import otf_message_handler  # noqa: PLC0415
    except ImportError:
        return False
    if ts.__version__ != _KNOWN_RELEASE or not hasattr(otf_message_handler, "_retrieve_buffer"):
        return False
    sockets: dict[int, BufferedSocket] = {}

    def retrieve_buffer(connection: socket.socket, length: int) -> bytearray:
        # One connection a worker; by descriptor, for a frontend that connects anew gets a new socket.
        buffered = sockets.get(connection.fileno())
        if buffered is None or buffered.connection is not connection:
            buffered = sockets[connection.fileno()] = BufferedSocket(connection)
        try:
            return buffered.read(length)
        except EOFError:
            sys.exit(0)  # as TorchServe's own does: the frontend is gone

    otf_message_handler._retrieve_buffer = retrieve_buffer
    return True


def quieten_frontend_lines() -> None:
    """Drop the lines that TorchServe's worker prints for every batch, which production's log drops anyway.

    The frontend reads and parses each of them. Its one metric, the time in the handler, goes with them: the worker's
    own say more.
    """
    logging.getLogger().setLevel(logging.WARNING)
