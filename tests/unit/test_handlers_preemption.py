"""Scheduling classes: what computes may be interrupted by others, what arrives interrupts nobody."""

import os
import subprocess
import sys
import threading

import pytest

from handlers import preemption
from handlers.preemption import interrupt_nobody, interrupt_others, interrupting_nobody

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="the system has no such scheduling classes")

SHOW = "import os; print(os.sched_getscheduler(0))"


def policy_of_child() -> int:
    return int(subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True).stdout)


@pytest.fixture(autouse=True)
def usual():
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_a_thread_chooses_for_itself():
    found = []

    def run():
        interrupt_nobody()
        found.append(os.sched_getscheduler(0))
        interrupt_others()
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [os.SCHED_BATCH, os.SCHED_OTHER]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_what_is_started_meanwhile_interrupts_nobody():
    with interrupting_nobody():
        assert policy_of_child() == os.SCHED_BATCH
    assert policy_of_child() == os.SCHED_OTHER


def test_what_was_chosen_before_is_restored_after_a_failure():
    interrupt_nobody()
    with pytest.raises(KeyError), interrupting_nobody():
        raise KeyError
    assert os.sched_getscheduler(0) == os.SCHED_BATCH


def test_another_class_is_left_alone():
    os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    with interrupting_nobody():
        assert os.sched_getscheduler(0) == os.SCHED_OTHER | os.SCHED_RESET_ON_FORK


def test_where_it_is_forbidden_all_stays_as_it_is(monkeypatch):
    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(preemption.os, "sched_setscheduler", refuse)
    with interrupting_nobody():
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
    monkeypatch.undo()


def test_where_there_is_no_such_class(monkeypatch):
    monkeypatch.delattr(preemption.os, "SCHED_BATCH")
    with interrupting_nobody():
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
    interrupt_nobody()
    interrupt_others()
    monkeypatch.undo()
