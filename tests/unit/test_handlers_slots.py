"""Compute slots: as many at a time as there are, whoever dies, without writing anything."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from handlers.errors import LoadError
from handlers.slots import MOST_SLOTS, ComputeSlot

DEADLINE_S = 200
# Takes the slot and keeps it; its arguments are the folder and the number of slots.
HOLDER = """\
import sys, time
from pathlib import Path
from handlers.slots import ComputeSlot
with ComputeSlot(Path(sys.argv[1]), int(sys.argv[2])):
    print("in", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "handlers").mkdir()
    for i in range(2 * MOST_SLOTS + 4):
        path = tmp_path / "handlers" / f"{i:02}.py"
        path.write_bytes(b"x = 1\n")
        path.chmod(0o444)
    return tmp_path


@pytest.fixture
def slot(folder):
    """Makes the slot of another worker; all are given back after the test."""
    made = []

    def make(slots):
        made.append(ComputeSlot(folder, slots))
        return made[-1]

    yield make
    for one in made:
        for descriptor in (*one._slots, getattr(one, "_number", -1)):
            if descriptor >= 0:
                os.close(descriptor)


class Waiter:
    """Another worker, in a thread: waits for a slot, then says so and leaves."""

    def __init__(self, slot, monkeypatch, note=lambda: None):
        self.asked, self.entered = threading.Event(), threading.Event()
        flock = fcntl.flock

        def noted(descriptor, operation):
            if descriptor == slot._slots[0] and operation == fcntl.LOCK_EX:
                self.asked.set()
            flock(descriptor, operation)

        def work():
            with slot:
                note()
                self.entered.set()

        monkeypatch.setattr(fcntl, "flock", noted)
        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        assert self.asked.wait(DEADLINE_S)

    def join(self):
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def holder(folder, slots):
    """Another process that is in the slot."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(slots)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "in\n"
            yield process
        finally:
            process.kill()


def test_the_second_worker_waits_for_the_first(slot, monkeypatch):
    order = []
    first, second = slot(1), slot(1)
    with first:
        waiter = Waiter(second, monkeypatch, note=lambda: order.append("second"))
        # The lock itself, without which the order below could be luck.
        with pytest.raises(BlockingIOError):
            fcntl.flock(second._slots[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        order.append("first")
    waiter.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize(("slots", "workers"), [(1, 3), (2, 3), (2, 5), (8, 8)])
def test_no_more_are_in_than_there_are_slots(slot, slots, workers):
    inside, most, lock = 0, 0, threading.Lock()

    def work(mine):
        nonlocal inside, most
        for _ in range(200):
            with mine:
                with lock:
                    inside += 1
                    most = max(most, inside)
                os.sched_yield()
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=work, args=(slot(slots),)) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert 1 <= most <= slots
    assert inside == 0


def test_two_slots_are_for_two_workers_and_the_third_waits(slot, monkeypatch):
    first, second, third = slot(2), slot(2), slot(2)
    with contextlib.ExitStack() as stack:
        stack.enter_context(first)
        stack.enter_context(second)  # would wait for ever if it had the first's
        waiter = Waiter(third, monkeypatch)
        assert not waiter.entered.is_set()
        with pytest.raises(BlockingIOError):
            fcntl.flock(third._slots[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    waiter.join()


def test_a_slot_is_free_again_after_an_error(slot):
    first, second = slot(1), slot(1)
    with pytest.raises(ZeroDivisionError), first:
        raise ZeroDivisionError
    fcntl.flock(second._slots[0], fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_free_slot_is_taken_though_ones_own_is_not(slot):
    first, second, third = slot(2), slot(2), slot(2)
    # The third's own slot is the first's.
    with first, third, pytest.raises(BlockingIOError):
        fcntl.flock(second._slots[0], fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_slots_mean_no_waiting_and_no_files(tmp_path):
    nobody = ComputeSlot(tmp_path / "absent", 0)
    with nobody, nobody, ComputeSlot(tmp_path / "absent", 0):
        assert not list(tmp_path.iterdir())


def test_a_killed_process_frees_its_slot_and_its_number(folder, slot, monkeypatch):
    with holder(folder, 1) as process:
        mine = slot(1)
        waiter = Waiter(mine, monkeypatch)
        with pytest.raises(BlockingIOError):
            fcntl.flock(mine._slots[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not waiter.entered.is_set()
        process.kill()
        waiter.join()
        process.wait(DEADLINE_S)
    # The next worker has the killed one's number, and so the slot that was its.
    assert os.readlink(f"/proc/self/fd/{slot(1)._number}").endswith("00.py")


def test_two_processes_with_two_slots_are_both_in(folder, slot):
    with holder(folder, 2), slot(2):
        pass


def test_files_are_only_read(folder, slot):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    one = slot(1)
    with one:
        for descriptor in (one._number, *one._slots):
            assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            assert not os.get_inheritable(descriptor)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_more_workers_than_numbers_still_have_a_slot(slot):
    for _ in range(2 * MOST_SLOTS + 4):
        with slot(MOST_SLOTS):
            pass


def test_a_real_archive_has_files_enough(extracted):
    with ComputeSlot(extracted, MOST_SLOTS) as nothing:
        assert nothing is None


@pytest.mark.parametrize("count", [0, 2 * MOST_SLOTS - 1])
def test_too_few_files_are_refused(tmp_path, count):
    (tmp_path / "handlers").mkdir()
    for i in range(count):
        (tmp_path / "handlers" / f"{i}.py").touch()
    with pytest.raises(LoadError, match="no handlers to lock; export it again, or set computing to 0"):
        ComputeSlot(tmp_path, 1)


def test_a_file_system_without_locks_is_named(folder, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LoadError, match=r"cannot be locked \(No locks available\); set computing to 0"):
        ComputeSlot(folder, 1)
