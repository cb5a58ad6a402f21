import hashlib
import os
import py_compile
import sys
from py_compile import PycInvalidationMode

import pytest

from handlers.digests import (
    DIGESTS_FILE,
    compare_digests,
    digests_document,
    file_sha256,
    parse_digests,
    sha256,
    verify_folder,
)
from handlers.errors import DigestError

FILES = {"a.txt": b"one", "sub/b.bin": b"two" * 1000}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    (tmp_path / DIGESTS_FILE).write_bytes(digests_document(digests))
    return tmp_path


def test_the_digest_is_that_of_hashlib(folder):
    expected = hashlib.sha256(FILES["sub/b.bin"]).hexdigest()
    assert sha256([FILES["sub/b.bin"][:10], FILES["sub/b.bin"][10:]]) == expected
    assert file_sha256(folder / "sub/b.bin") == expected


def test_the_document_does_not_depend_on_the_order():
    assert digests_document({"b": "1", "a": "2"}) == digests_document({"a": "2", "b": "1"})
    assert parse_digests(digests_document({"b": "1", "a": "2"})) == {"a": "2", "b": "1"}


def test_an_untouched_folder_passes(folder):
    verify_folder(folder)


@pytest.fixture
def module_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/module.py").write_text("VALUE = 1\n")
    digest = hashlib.sha256(b"VALUE = 1\n").hexdigest()
    (tmp_path / DIGESTS_FILE).write_bytes(digests_document({"sub/module.py": digest}))
    return tmp_path


def test_bytecode_that_python_wrote_is_ignored(module_folder):
    py_compile.compile(str(module_folder / "sub/module.py"), invalidation_mode=PycInvalidationMode.TIMESTAMP)
    (module_folder / "sub/__pycache__/module.cpython-311.pyc.140234").write_bytes(b"")  # another worker writes it now
    assert len(list((module_folder / "sub/__pycache__").iterdir())) == 2
    verify_folder(module_folder)


@pytest.mark.parametrize("mode", list(PycInvalidationMode))
def test_bytecode_that_came_in_the_archive_is_refused(module_folder, mode):
    other = module_folder / "other.py"
    other.write_text("VALUE = 2\n")
    os.utime(other, (0, 0))  # whoever packed it could not know when it would be extracted
    cached = module_folder / f"sub/__pycache__/module.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(str(other), cfile=str(cached), invalidation_mode=mode)
    other.unlink()
    with pytest.raises(DigestError, match=r"module\..*\.pyc is not recorded"):
        verify_folder(module_folder)


def test_bytecode_without_a_module_is_refused(folder):
    (folder / "sub/__pycache__").mkdir()
    (folder / "sub/__pycache__/b.pyc").write_bytes(b"x")
    with pytest.raises(DigestError, match=r"b\.pyc is not recorded"):
        verify_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "a.txt").write_bytes(b"onf"), "a.txt has changed"),
        (lambda folder: (folder / "sub/b.bin").unlink(), "sub/b.bin is missing"),
        (lambda folder: (folder / "sub/c").write_bytes(b""), "sub/c is not recorded"),
        (lambda folder: (folder / DIGESTS_FILE).unlink(), "digests.json is missing"),
        (lambda folder: (folder / DIGESTS_FILE).write_bytes(b"{"), "digests.json cannot be read"),
        (lambda folder: (folder / DIGESTS_FILE).write_bytes(b"\xff"), "digests.json cannot be read"),
        (lambda folder: (folder / DIGESTS_FILE).write_bytes(b'{"sha256": {"a.txt": 1}}'), "cannot be read"),
        (lambda folder: (folder / DIGESTS_FILE).write_bytes(b'{"sha256": {}, "x": 1}'), "x is not a known field"),
    ],
)
def test_any_change_is_refused(folder, change, message):
    change(folder)
    with pytest.raises(DigestError, match=message):
        verify_folder(folder)


def test_many_faults_are_counted_and_the_remedy_is_given():
    with pytest.raises(DigestError, match=r"and 2 more.*; export it again or fetch a clean copy"):
        compare_digests({str(i): "" for i in range(5)}, {})
