import json
import zipfile

import pytest

from loadtest.errors import PayloadError
from loadtest.payloads import Payload, read_files, read_golden_samples

SAMPLE = {
    "file": "golden/000.png",
    "content_type": "image/png",
    "outputs": {"logits": "golden/000.logits.npy"},
    "label": "7",
}


def write_archive(path, expected, files=(("golden/000.png", b"png"),)):
    with zipfile.ZipFile(path, "w") as opened:
        if expected is not None:
            opened.writestr("golden/expected.json", expected)
        for name, content in files:
            opened.writestr(name, content)
    return path


def test_golden_samples_come_with_their_labels(tmp_path):
    unlabelled = {key: value for key, value in SAMPLE.items() if key != "label"}
    archive = write_archive(tmp_path / "m.mar", json.dumps({"samples": [SAMPLE, unlabelled]}))
    assert read_golden_samples(archive) == [
        Payload(body=b"png", content_type="image/png", expected_label="7"),
        Payload(body=b"png", content_type="image/png", expected_label=None),
    ]


@pytest.mark.parametrize(
    ("content_type", "label"),
    [("application/json", None), ("application/json", "positive"), ("text/plain", "positive")],
)
def test_golden_samples_of_texts_and_tensors_are_sent_as_they_are(tmp_path, content_type, label):
    sample = {
        "file": "golden/000.json",
        "content_type": content_type,
        "outputs": {"logits": "golden/000.logits.npy"},
        "label": label,
    }
    body = b'{"inputs": "good"}'
    archive = write_archive(
        tmp_path / "m.mar",
        json.dumps({"samples": [sample]}),
        [("golden/000.json", body), ("golden/000.logits.npy", b"")],
    )
    assert read_golden_samples(archive) == [Payload(body=body, content_type=content_type, expected_label=label)]


@pytest.mark.parametrize(
    ("expected", "named"),
    [
        (None, "golden/expected.json"),
        ("{", "malformed"),
        ("[]", "malformed"),
        ("{}", "samples"),
        ('{"samples": []}', "no golden samples"),
        ('{"samples": [{"file": "golden/000.png"}]}', "content_type"),
        (json.dumps({"samples": [{**SAMPLE, "file": "golden/404.png"}]}), "golden/404.png"),
    ],
)
def test_an_archive_without_usable_samples_says_what_is_wrong(tmp_path, expected, named):
    archive = write_archive(tmp_path / "m.mar", expected)
    with pytest.raises(PayloadError, match=named) as raised:
        read_golden_samples(archive)
    assert str(archive) in str(raised.value)


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(PayloadError, match=r"there is no archive .*m\.mar"):
        read_golden_samples(tmp_path / "m.mar")


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "m.mar").write_bytes(b"not a zip")
    with pytest.raises(PayloadError, match="not a whole archive"):
        read_golden_samples(tmp_path / "m.mar")


def test_a_flipped_byte_in_a_sample_is_found(tmp_path):
    archive = write_archive(tmp_path / "m.mar", json.dumps({"samples": [SAMPLE]}), [("golden/000.png", b"pixels")])
    content = bytearray(archive.read_bytes())
    content[content.index(b"pixels")] ^= 1
    archive.write_bytes(content)
    with pytest.raises(PayloadError, match="not a whole archive"):
        read_golden_samples(archive)


@pytest.mark.parametrize(
    ("name", "content_type"),
    [
        ("a.PNG", "image/png"),
        ("a.jpg", "image/jpeg"),
        ("a.json", "application/json"),
        ("a.bin", "application/octet-stream"),
    ],
)
def test_the_suffix_decides_the_content_type(tmp_path, name, content_type):
    (tmp_path / name).write_bytes(b"body")
    assert read_files([tmp_path / name]) == [Payload(body=b"body", content_type=content_type)]


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(PayloadError, match=r"a\.png: No such file"):
        read_files([tmp_path / "a.png"])
