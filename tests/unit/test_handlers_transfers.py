"""Which stream waits for which, when a batch is brought to a GPU and back."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from handlers.transfers import CudaTransfers


@pytest.fixture
def events(monkeypatch):
    """What is asked of ``torch.cuda``, in order."""
    events = []
    names = iter(["in", "out"])
    streams = {name: stream(name, events) for name in ("copying", "computing")}
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams["copying"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["computing"])
    monkeypatch.setattr(torch.cuda, "Event", lambda: event(next(names), events))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on(stream.name, events))
    return events


def stream(name, events):
    return SimpleNamespace(
        name=name,
        wait_stream=lambda other: events.append(f"{name} waits for {other.name}"),
        wait_event=lambda event: events.append(f"{name} waits for event {event.name}"),
    )


def event(name, events):
    return SimpleNamespace(
        name=name,
        record=lambda stream: events.append(f"event {name} after {stream.name}"),
        synchronize=lambda: events.append(f"host waits for event {name}"),
    )


@contextlib.contextmanager
def on(name, events):
    events.append(f"on {name}")
    yield
    events.append(f"off {name}")


def test_streams_wait_for_each_other_and_the_host_for_the_end(events):
    transfers = CudaTransfers(torch.device("cuda", 1))
    source = torch.ones(2)
    target = torch.zeros(2)
    transfers.arrive()
    transfers.begin()
    transfers.copy_in(target, source)
    transfers.join()
    transfers.copy_out(source, target)
    transfers.leave()
    assert target.tolist() == [1, 1]
    assert events == [
        "host waits for event in",
        "copying waits for computing",
        "on copying",
        "event in after copying",
        "off copying",
        "computing waits for event in",
        "event out after computing",
        "host waits for event out",
    ]
