"""Who waits for whom when there are fewer cores than threads that want one: the others for the one that computes.

By default Linux lets a thread that wakes up interrupt one that has computed for long: a request that arrives interrupts
the model, though it could have waited for the other core. Threads of the class ``SCHED_BATCH`` have the same share of
the time, and interrupt nobody when they wake up. See docs/decisions/014 for what it brings. Everything here may be done
without privileges; where the system knows no such classes, or forbids it, all stays as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def interrupt_nobody() -> None:
    """Let this thread, and what it starts from now on, wait for its turn when it wakes up."""
    if hasattr(os, "SCHED_BATCH"):
        _set(os.SCHED_BATCH)


def interrupt_others() -> None:
    """Let this thread, and what it starts from now on, be run when it wakes up, as is usual."""
    if hasattr(os, "SCHED_BATCH"):
        _set(os.SCHED_OTHER)


@contextlib.contextmanager
def interrupting_nobody() -> Iterator[None]:
    """What is started meanwhile interrupts nobody."""
    before = os.sched_getscheduler(0) if hasattr(os, "SCHED_BATCH") else None
    interrupt_nobody()
    try:
        yield
    finally:
        if before is not None:
            _set(before)


def _set(policy: int) -> None:
    # Whoever gave this process a class of another kind, such as a real-time one, had reasons.
    usual = (os.SCHED_OTHER, os.SCHED_BATCH)
    with contextlib.suppress(OSError):
        if policy in usual and os.sched_getscheduler(0) in usual:
            os.sched_setscheduler(0, policy, os.sched_param(0))
