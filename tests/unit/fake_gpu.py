"""What stands in for a GPU where there is none: copies that come late, recordings, and memory that runs out."""

import contextlib

import torch

GIB = 1 << 30


def out_of_memory(requested="2.00 GiB"):
    """What torch raises."""
    return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {requested}. GPU 0 has a total capacity of")


class LateTransfers:
    """Copies as late as a GPU may: in, when the computing stream waits for it; out, what was there, when the host does.

    Attributes:
        events: What was asked for, in order.
        capacity: Bytes of the device that are given out at once; None for any number. More raises.
    """

    def __init__(self, capacity=None):
        self.events = []
        self.capacity = capacity
        self._incoming = []
        self._outgoing = []

    @contextlib.contextmanager
    def on_device(self):
        self.events.append("enter")
        try:
            yield
        finally:
            self.events.append("exit")

    def pinned(self, size):
        self.events.append(f"pinned {size}")
        return torch.full((size,), 0xEE, dtype=torch.uint8)

    def room(self, size):
        if self.capacity is not None and size > self.capacity:
            raise out_of_memory()
        return torch.full((size,), 1, dtype=torch.uint8)

    def arrive(self):
        self.events.append("arrive")
        self._copy(self._incoming)

    def begin(self):
        self.events.append("begin")

    def copy_in(self, target, source):
        self.events.append("copy in")
        self._incoming.append((target, source))

    def join(self):
        self.events.append("join")
        self._copy(self._incoming)

    def copy_out(self, target, source):
        self.events.append("copy out")
        self._outgoing.append((target, source.clone()))

    def leave(self):
        self.events.append("leave")
        self._copy(self._outgoing)

    def _copy(self, queued):
        for target, source in queued:
            target.copy_(source)
        queued.clear()


class FakeRecorder:
    """Replays by running again, and writes to the same outputs, as a graph does.

    Args:
        model: What is recorded: gets the inputs, and gives the outputs. It may be set later.
        fails: Raised by the capture of that number, counted from 1; None for none.
        at: That number.
    """

    def __init__(self, model=None, *, fails=None, at=1):
        self.model = model
        self.captures = 0
        self.replays = 0
        self._fails = fails
        self._at = at

    def memory(self, size):
        return torch.zeros(size, dtype=torch.uint8)

    def capture(self, inputs):
        self.captures += 1
        if self._fails is not None and self.captures == self._at:
            raise self._fails
        outputs = [output.clone() for output in self.model(inputs)]

        def replay():
            self.replays += 1
            for output, new in zip(outputs, self.model(inputs), strict=True):
                output.copy_(new)

        return replay, outputs


class FakeGpu:
    """Numbers of a GPU's memory, in bytes; they may be changed."""

    def __init__(self, index=1, *, free=10 * GIB, reserved=0):
        self.index = index
        self.free_bytes = free
        self.reserved_bytes = reserved
        self.peak_bytes = 0
        self.limits = []

    def take(self, size):
        """torch takes it."""
        self.free_bytes -= size
        self.reserved_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)

    def free(self):
        return self.free_bytes

    def reserved(self):
        return self.reserved_bytes

    def peak(self):
        return self.peak_bytes

    def forget_peak(self):
        self.peak_bytes = self.reserved_bytes

    def limit(self, size):
        self.limits.append(size)
