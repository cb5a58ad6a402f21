"""Ports: TorchServe listens on five."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.errors import PortError

LOOPBACK = "127.0.0.1"
_HIGHEST = 65535


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """The TCP ports of one server."""

    inference: int
    management: int
    metrics: int
    grpc_inference: int
    grpc_management: int

    @classmethod
    def from_first(cls, first: int) -> Ports:
        """Five consecutive ports; 0 finds free ones.

        Raises:
            PortError: If one of them is taken or out of range.
        """
        if first == 0:
            return cls.free()
        if not 1 <= first <= _HIGHEST - 4:
            raise PortError(f"the port {first} is not usable: give one from 1 to {_HIGHEST - 4}, or 0 for any free one")
        numbers = range(first, first + 5)
        for port in numbers:
            try:
                _bind(port)
            except PermissionError as error:
                raise PortError(
                    f"the port {port} is for the system's own services here; choose one from 1024 with --port"
                ) from error
            except OSError as error:
                raise PortError(
                    f"the port {port} is in use (TorchServe takes {first} to {first + 4}); "
                    "stop what listens there, or choose another with --port (0 for any free one)"
                ) from error
        return cls._of(numbers)

    @classmethod
    def free(cls) -> Ports:
        """Five free ports, wherever they are."""
        # All held at once, so that the system does not give out one of them twice.
        sockets = [socket.socket() for _ in range(5)]
        try:
            for held in sockets:
                held.bind((LOOPBACK, 0))
            numbers = [held.getsockname()[1] for held in sockets]
        finally:
            for held in sockets:
                held.close()
        return cls._of(numbers)

    @staticmethod
    def first_of_free_range() -> int:
        """The first of five consecutive free ports, from TorchServe's own upwards.

        Raises:
            PortError: If there is no such range.
        """
        for first in range(8080, _HIGHEST - 4, 5):
            if all(is_free(port) for port in range(first, first + 5)):
                return first
        raise PortError("there are no five consecutive free ports from 8080 upwards; stop some of the servers here")

    @classmethod
    def _of(cls, numbers: Sequence[int]) -> Ports:
        inference, management, metrics, grpc_inference, grpc_management = numbers
        return cls(
            inference=inference,
            management=management,
            metrics=metrics,
            grpc_inference=grpc_inference,
            grpc_management=grpc_management,
        )


def is_free(port: int) -> bool:
    """Whether a server could listen on a port, on any address."""
    try:
        _bind(port)
    except OSError:
        return False
    return True


def check_host(host: str) -> None:
    """Refuse an address on which TorchServe could not listen.

    Raises:
        PortError: If it is not an IPv4 address or name of this machine.
    """
    try:
        if host:
            _bind(0, host)
            return
        reason = "it is empty"
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be looked up, such as "a..b"
        reason = getattr(error, "strerror", None) or str(error)
    raise PortError(
        f"TorchServe cannot listen on {host!r} ({reason}); give an IPv4 address of this machine with --host, "
        "or 0.0.0.0 for all of them"
    )


def _bind(port: int, host: str = "") -> None:
    """Take a port for a moment."""
    with socket.socket() as probe:
        # As servers do: a port whose last connection is still in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
