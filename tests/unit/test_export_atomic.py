"""Files that several processes replace at once, and that any of them may be killed at."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from export.atomic import replacing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "digits.mar"
    path.write_bytes(b"old")
    return path


def write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def test_the_new_file_takes_the_place_of_the_old_one_and_nothing_else_is_left(path: Path) -> None:
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path) == ["digits.mar"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), replacing(path) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(path) == ["digits.mar"]


def test_the_old_file_is_there_until_the_block_ends(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        # TorchServe skips hidden files when it loads a whole model store.
        assert all(name.startswith(".") for name in names(path) if name != "digits.mar")


def test_a_new_file_obeys_the_umask_and_a_replaced_one_keeps_its_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "new.mar", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.mar").stat().st_mode) == 0o640
    (tmp_path / "new.mar").chmod(0o604)
    write(tmp_path / "new.mar", b"x")
    assert stat.S_IMODE((tmp_path / "new.mar").stat().st_mode) == 0o604


def test_what_killed_writers_left_is_removed(path: Path) -> None:
    for name in (".digits.mar.123.part", ".digits.mar.0f.part", ".other.mar.1.part"):
        (path.parent / name).write_bytes(b"half")
    write(path, b"new")
    assert names(path) == [".other.mar.1.part", "digits.mar"]


def test_writers_at_once_take_nothing_from_each_other(path: Path) -> None:
    with replacing(path) as slow:
        slow.write(b"slow")
        slow.flush()
        write(path, b"quick")  # must not remove the open file, nor put it in place half-written
        assert path.read_bytes() == b"quick"
    assert path.read_bytes() == b"slow"
    assert names(path) == ["digits.mar"]


def test_the_file_of_another_living_process_is_not_a_leftover(path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from export.atomic import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'theirs')\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        write(path, b"ours")
        assert path.read_bytes() == b"ours"
        process.communicate("\n", timeout=30)
    assert process.returncode == 0
    assert path.read_bytes() == b"theirs"
    assert names(path) == ["digits.mar"]


def test_many_writers_leave_one_whole_file(path: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(8)]
    errors: list[BaseException] = []

    def work(content: bytes) -> None:
        try:
            for _ in range(10):
                write(path, content)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_bytes() in contents
    assert names(path) == ["digits.mar"]
