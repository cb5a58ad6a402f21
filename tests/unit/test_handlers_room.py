import threading

from handlers.room import Room

DEADLINE_S = 60


def entering(room, size):
    thread = threading.Thread(target=room.enter, args=(size,), daemon=True)
    thread.start()
    return thread


def test_what_fits_goes_in_at_once_and_is_counted():
    room = Room(10)
    room.enter(4)
    room.enter(6)
    assert room.held == 10
    assert room.is_full
    room.leave(1)
    assert not room.is_full


def test_who_brings_more_waits_until_others_have_left():
    room = Room(10)
    room.enter(8)
    waiting = entering(room, 3)
    waiting.join(0.05)
    assert waiting.is_alive()
    room.leave(8)
    waiting.join(DEADLINE_S)
    assert not waiting.is_alive()
    assert room.held == 3


def test_what_shrinks_makes_room_and_what_grows_does_not_wait():
    room = Room(10)
    room.enter(10)
    waiting = entering(room, 5)
    room.change(10, 4)
    waiting.join(DEADLINE_S)
    assert room.held == 9
    room.change(4, 100)
    assert room.held == 105


def test_what_is_larger_than_the_room_gets_in_alone():
    room = Room(10)
    room.enter(1)
    waiting = entering(room, 50)
    waiting.join(0.05)
    assert waiting.is_alive()
    room.leave(1)
    waiting.join(DEADLINE_S)
    assert room.held == 50
