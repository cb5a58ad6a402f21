import hashlib
import json
import os
import py_compile
import sys
from py_compile import PycInvalidationMode

import pytest

from handlers.digests import (
    DIGESTS_FILE,
    Digests,
    compare_digests,
    digests_document,
    file_sha256,
    parse_digests,
    sha256,
    verify_folder,
)
from handlers.errors import DigestError
from handlers.manifest import MANIFEST_FILE

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
    assert parse_digests(digests_document({"b": "1", "a": "2"})) == Digests(files={"a": "2", "b": "1"})


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
        (lambda folder: (folder / DIGESTS_FILE).write_bytes(b"[" * 100_000), "digests.json cannot be read"),
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


MANIFEST = {
    "createdOn": "24/11/2026 12:00:00",
    "runtime": "python",
    "model": {
        "modelName": "digits",
        "serializedFile": "a.txt",
        "handler": "a.txt",
        "modelVersion": "1.0",
        "configFile": "a.txt",
    },
    "archiverVersion": "0.12.0",
}
NAMED = dict.fromkeys(("handler", "serializedFile", "configFile"), "a.txt")


@pytest.fixture
def packed_by_hand(folder):
    recorded = parse_digests((folder / DIGESTS_FILE).read_bytes())
    (folder / DIGESTS_FILE).write_bytes(digests_document(recorded.files, NAMED))
    (folder / MANIFEST_FILE).parent.mkdir()
    (folder / MANIFEST_FILE).write_text(json.dumps(MANIFEST))
    return folder


def test_a_manifest_that_is_not_recorded_may_have_any_date_name_and_version(packed_by_hand):
    verify_folder(packed_by_hand)
    model = {**MANIFEST["model"], "modelName": "other", "modelVersion": "2"}
    (packed_by_hand / MANIFEST_FILE).write_text(json.dumps({**MANIFEST, "createdOn": "now", "model": model}))
    verify_folder(packed_by_hand)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"handler": "b.txt"}, r"model\.handler is 'b\.txt' instead of 'a\.txt'"),
        ({"serializedFile": "b.txt"}, r"model\.serializedFile is 'b\.txt'"),
        ({"configFile": "b.txt"}, r"model\.configFile is 'b\.txt'"),
        ({"handler": None}, r"model\.handler must be a non-empty string"),
        ({"modelName": "../x"}, r"model\.modelName is '\.\./x', which is not usable"),
        ({"modelVersion": "1 0"}, r"modelVersion is '1 0'"),
        ({"modelVersion": 1}, r"modelVersion must be a non-empty string"),
        ({"requirementsFile": "a.txt"}, r"requirementsFile is not a known field"),
        ({"modelFile": "a.txt"}, r"modelFile is not a known field"),
    ],
)
def test_a_manifest_that_is_not_recorded_must_mean_what_is(packed_by_hand, change, message):
    document = {**MANIFEST, "model": {**MANIFEST["model"], **change}}
    (packed_by_hand / MANIFEST_FILE).write_text(json.dumps(document))
    with pytest.raises(
        DigestError, match=rf"MANIFEST\.json is not what .*{message}.*; pack the folder again"
    ) as caught:
        verify_folder(packed_by_hand)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps({**MANIFEST, "runtime": "LSP"}),
        json.dumps({**MANIFEST, "x": 1}),
        json.dumps(MANIFEST).replace('"handler": "a.txt"', '"handler": "b.txt", "handler": "a.txt"'),
        json.dumps(MANIFEST) + "{}",
        "\ufeff" + json.dumps(MANIFEST),
        json.dumps(MANIFEST).replace("now", "n\u00f6w").replace("24/11", "\u0662"),
    ],
)
def test_a_manifest_that_java_may_read_differently_is_refused(packed_by_hand, content):
    (packed_by_hand / MANIFEST_FILE).write_bytes(content.encode("utf-8"))
    with pytest.raises(DigestError, match=r"MANIFEST\.json is not what the staged folder's command writes"):
        verify_folder(packed_by_hand)


def test_nothing_but_the_manifest_escapes_its_digest(packed_by_hand):
    (packed_by_hand / "sub/b.bin").write_bytes(b"other")
    with pytest.raises(DigestError, match=r"sub/b\.bin has changed"):
        verify_folder(packed_by_hand)
    (packed_by_hand / "sub/b.bin").write_bytes(FILES["sub/b.bin"])
    (packed_by_hand / "MAR-INF/more.json").write_bytes(b"{}")
    with pytest.raises(DigestError, match=r"MAR-INF/more\.json is not recorded"):
        verify_folder(packed_by_hand)
    (packed_by_hand / "MAR-INF/more.json").unlink()
    (packed_by_hand / MANIFEST_FILE).unlink()
    with pytest.raises(DigestError, match=r"MANIFEST\.json is missing"):
        verify_folder(packed_by_hand)


@pytest.mark.parametrize(
    ("files", "named", "message"),
    [
        ({"a.txt": "0", MANIFEST_FILE: "0"}, NAMED, "has a digest and a description"),
        ({"a.txt": "0"}, {**NAMED, "handler": "b.txt"}, r"manifest\.handler names 'b\.txt', which has no digest"),
        ({"a.txt": "0"}, {}, r"configFile is missing"),
        ({"a.txt": "0"}, {**NAMED, "requirementsFile": "a.txt"}, "requirementsFile is not a known field"),
    ],
)
def test_a_description_of_the_manifest_is_whole_or_refused(files, named, message):
    with pytest.raises(DigestError, match=message):
        parse_digests(digests_document(files, named))


def test_a_recorded_manifest_is_compared_byte_by_byte(folder):
    content = json.dumps(MANIFEST).encode()
    (folder / MANIFEST_FILE).parent.mkdir()
    (folder / MANIFEST_FILE).write_bytes(content)
    recorded = dict(parse_digests((folder / DIGESTS_FILE).read_bytes()).files)
    (folder / DIGESTS_FILE).write_bytes(digests_document({**recorded, MANIFEST_FILE: sha256([content])}))
    verify_folder(folder)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (folder / MANIFEST_FILE).write_bytes(damaged)
        with pytest.raises(DigestError, match=r"MANIFEST\.json has changed"):
            verify_folder(folder)
