"""Ports that are free, taken, or none at all."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deploy.errors import PortError
from deploy.ports import Ports, check_host, is_free


def numbers(ports: Ports) -> list[int]:
    return [ports.inference, ports.management, ports.metrics, ports.grpc_inference, ports.grpc_management]


@contextmanager
def listening(host: str, port: int = 0) -> Iterator[int]:
    with socket.create_server((host, port)) as server:
        yield server.getsockname()[1]


def test_zero_finds_five_different_free_ports() -> None:
    found = numbers(Ports.from_first(0))
    assert len(set(found)) == 5
    assert all(map(is_free, found))


def test_five_consecutive_ports_follow_the_first() -> None:
    first = Ports.first_of_free_range()
    assert first >= 8080
    assert numbers(Ports.from_first(first)) == list(range(first, first + 5))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("offset", [0, 4])
def test_a_taken_port_is_named_with_the_remedy(host: str, offset: int) -> None:
    first = Ports.first_of_free_range()
    with (
        listening(host, first + offset),
        pytest.raises(PortError, match=rf"port {first + offset} is in use .*{first} to {first + 4}.*--port \(0 for"),
    ):
        Ports.from_first(first)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_range_with_a_taken_port_is_passed_over(host: str) -> None:
    first = Ports.first_of_free_range()
    with listening(host, first + 2):
        assert Ports.first_of_free_range() > first


@pytest.mark.parametrize("first", [-1, 65532, 65535, 70000])
def test_a_port_out_of_range_is_refused(first: int) -> None:
    with pytest.raises(PortError, match=rf"port {first} is not usable: give one from 1 to 65531, or 0"):
        Ports.from_first(first)


def test_a_port_whose_last_connection_has_just_ended_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ours = socket.create_connection(("127.0.0.1", port))
        theirs, _ = server.accept()
        theirs.close()  # the side that closes first keeps the port in TIME_WAIT
        ours.close()
    with socket.socket() as strict, pytest.raises(OSError, match="in use"):
        strict.bind(("127.0.0.1", port))
    assert is_free(port)


def test_a_port_that_needs_rights_is_not_called_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Denying(socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("socket.socket", Denying)
    with pytest.raises(PortError, match=r"port 80 is for the system's own services .*--port"):
        Ports.from_first(80)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_addresses_of_this_machine_are_accepted(host: str) -> None:
    check_host(host)
