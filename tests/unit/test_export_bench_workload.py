"""Requests of a benchmark: golden samples, files, texts."""

from pathlib import Path

import pytest

from export.archive import open_archive
from export.bench_workload import file_requests, golden_requests, text_file_requests
from export.errors import EvaluationError, MeasurementError
from export.table import Columns


def test_golden_samples_become_requests_as_a_client_sends_them(archive: Path) -> None:
    requests = golden_requests(open_archive(archive))
    assert len(requests) == 12
    assert {request.content_type for request in requests} == {"image/png"}
    assert all(request.body.startswith(b"\x89PNG") for request in requests)
    assert requests[0].where == "golden/000.png"


def test_a_files_name_says_what_it_is(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.jpg", "c.json", "d.txt"):
        (tmp_path / name).write_bytes(name.encode())
    requests = file_requests(sorted(tmp_path.iterdir()))
    assert [request.content_type for request in requests] == [
        "image/png",
        "image/jpeg",
        "application/json",
        "text/plain",
    ]
    assert [request.body for request in requests] == [b"a.PNG", b"b.jpg", b"c.json", b"d.txt"]
    with pytest.raises(MeasurementError, match=r"it must end in \.png, "):
        file_requests([tmp_path / "a.bin"])


def test_texts_come_one_a_line_or_from_a_table(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.txt", tmp_path / "a.csv"
    lines.write_text("eins\n\n  \nzw\u00f6lf\n", encoding="utf-8")
    table.write_text('text,label\n"a, b",x\nc,y\n')
    assert [request.body.decode() for request in text_file_requests(lines)] == [
        '{"inputs": "eins"}',
        '{"inputs": "zw\u00f6lf"}',
    ]
    assert text_file_requests(lines)[1].where == f"{lines}, line 4"
    assert [request.body.decode() for request in text_file_requests(table)] == ['{"inputs": "a, b"}', '{"inputs": "c"}']


def test_texts_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="there is no file of texts"):
        text_file_requests(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(MeasurementError, match="holds no text; write one a line"):
        text_file_requests(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(MeasurementError, match="is not UTF-8"):
        text_file_requests(tmp_path / "latin.txt")
    (tmp_path / "empty.csv").write_text("text\n")
    with pytest.raises(MeasurementError, match="holds no text"):
        text_file_requests(tmp_path / "empty.csv")
    (tmp_path / "other.csv").write_text("a,b,c\n1,2,3\n")
    with pytest.raises(EvaluationError, match="name yours with --columns"):
        text_file_requests(tmp_path / "other.csv")
    (request,) = text_file_requests(tmp_path / "other.csv", Columns.parse("b"))
    assert request.body == b'{"inputs": "2"}'
