"""Table files: every row exactly, or an error that names its line."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import DataError
from models.table import BadRow, Columns, Row, iterate_rows, plain_text, read_table

NAMED = Columns(text=("text",), label="label")
PLACED = Columns(text=(0,), label=1)

Write = Callable[[str, str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def problems(path: str, columns: Columns, **options: object) -> list[tuple[int, str]]:
    rows = iterate_rows(path, columns, **options)  # type: ignore[arg-type]
    return [(row.line, row.problem) for row in rows if isinstance(row, BadRow)]


def good(path: str, columns: Columns, **options: object) -> list[tuple[int, str, str]]:
    rows = iterate_rows(path, columns, **options)  # type: ignore[arg-type]
    return [(row.line, row.text, row.label) for row in rows if isinstance(row, Row)]


# Text as people have it: anything but NUL, surrogates and blank texts, which are bad rows.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40).filter(str.strip)
labels = st.text("abc XYZ,\"'é1", min_size=1, max_size=8).map(str.strip).filter(bool)
tables = st.lists(st.tuples(texts, labels), min_size=1, max_size=8)
examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@examples
@given(rows=tables)
def test_csv_gives_back_what_was_written(rows: list[tuple[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    # The module's own line ends are CR LF; inside a text a lone CR ends a line, too.
    content = path.read_bytes().decode()
    starts, at = [], 0
    for row in [("text", "label"), *rows]:
        starts.append(1 + len(content[:at].replace("\r\n", "\n").replace("\r", "\n").split("\n")) - 1)
        at += sum(len(cell.replace('"', '""')) + 2 for cell in row) + 1 + 2

    table = read_table(str(path), NAMED)

    assert list(zip(table.texts, table.labels, strict=True)) == rows
    assert [line for line, _, _ in good(str(path), NAMED)] == starts[1:]


@examples
@given(rows=tables, ascii_only=st.booleans())
def test_json_lines_give_back_what_was_written(rows: list[tuple[str, str]], ascii_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [json.dumps({"label": label, "text": text, "id": 7}, ensure_ascii=ascii_only) for text, label in rows]
    path.write_text("\n\n".join(lines), encoding="utf-8", newline="")

    assert good(str(path), NAMED) == [(1 + 2 * i, text, label) for i, (text, label) in enumerate(rows)]


@examples
@given(rows=tables)
def test_parquet_gives_back_what_was_written(rows: list[tuple[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    written = pa.table({"text": [text for text, _ in rows], "label": pa.array([label for _, label in rows])})
    pq.write_table(written.set_column(1, "label", written["label"].dictionary_encode()), path)

    expected = [(1 + i, text, label) for i, (text, label) in enumerate(rows)]
    assert good(str(path), NAMED) == good(str(path), PLACED) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "text,label\nfine,pos\n"),
        ("t.CSV", "\ufefftext,label\r\nfine,pos\r\n"),
        ("t.csv.gz", gzip.compress(b"text,label\nfine,pos")),
        ("t.tsv", "label\tn\ttext\n\n pos \t1\tfine"),
        ("t.ndjson", '\n{"text": "fine", "label": "pos"}\n'),
        ("t.jsonl.gz", gzip.compress(b'{"text": "fine", "label": "pos"}')),
    ],
)
def test_the_suffix_tells_the_format(write: Write, name: str, content: str | bytes) -> None:
    table = read_table(write(name, content), NAMED)

    assert (table.texts, table.labels, table.skipped) == (["fine"], ["pos"], 0)


def test_columns_by_position_mean_that_there_is_no_header(write: Write) -> None:
    path = write("t.csv", '"3","A title","A ""quoted"" text, \\$415"\n"1","Only a title",""\n')

    columns = Columns(text=(1, 2), label=0, separator=". ")

    assert good(path, columns) == [(1, 'A title. A "quoted" text, \\$415', "3"), (2, "Only a title", "1")]


def test_quotes_are_characters_like_any_other_in_tsv(write: Write) -> None:
    path = write("t.tsv", '"the one , the only\t1\nso "good"\t0\n')

    assert good(path, PLACED) == [(1, '"the one , the only', "1"), (2, 'so "good"', "0")]


def test_labels_of_json_and_parquet_may_be_numbers_and_booleans(write: Write, tmp_path: Path) -> None:
    path = write("t.jsonl", '{"text": "a", "label": 3}\n{"text": "b", "label": true}\n')
    pq.write_table(pa.table({"text": ["a"], "label": [3]}), tmp_path / "t.parquet")

    assert good(path, NAMED) == [(1, "a", "3"), (2, "b", "true")]
    assert good(str(tmp_path / "t.parquet"), NAMED) == [(1, "a", "3")]


def test_the_line_is_that_of_the_file_after_texts_of_several_lines(write: Write) -> None:
    path = write("t.csv", 'text,label\n"one\ntwo\r\nthree",a\n\n"four\n\n",b\nfive\nsix,a\n')

    assert good(path, NAMED) == [(2, "one\ntwo\r\nthree", "a"), (6, "four\n\n", "b"), (10, "six", "a")]
    assert problems(path, NAMED) == [(9, "has 1 column where the first line has 2; quote texts that hold commas")]


@pytest.mark.parametrize(
    ("name", "content", "line", "problem"),
    [
        ("t.csv", "text,label\na,x\nb\n", 3, "has 1 column where the first line has 2"),
        ("t.csv", "text,label\na, b,x\n", 2, "has 3 columns where the first line has 2; quote texts"),
        ("t.csv", "text,label\n  ,x\n", 2, "has no text"),
        ("t.csv", "text,label\na,\n", 2, "has no label in the column 'label'"),
        ("t.csv", "text,label\na,z\n", 2, "has the unknown label 'z'; known are 2, 10, x"),
        ("t.csv", b"text,label\na,x\n\xff\xfe,x\n", 3, "is not UTF-8"),
        ("t.csv", "text,label\na\0b,x\n", 2, "holds a NUL byte"),
        ("t.csv", 'text,label\na,x\n"b,x\n', 3, "opens a quote that is never closed"),
        ("t.csv", 'text,label\n"a" b,x\n', 2, "has something between a closing quote and the next comma"),
        ("t.csv", f"text,label\n{'a' * 140_000},x\n", 2, "has a text of more than 131,072 characters"),
        ("t.tsv", "text\tlabel\na\tb\tx\n", 2, "has 3 columns where the first line has 2"),
        ("t.tsv", b"text\tlabel\n\xe9t\xe9\tx\n", 2, "is not UTF-8"),
        ("t.jsonl", '{"text": "a", "label": "x"}\n{"text": "a"\n', 2, "is no JSON (Expecting ',' delimiter"),
        ("t.jsonl", "[1, 2]\n", 1, "is a JSON list; each line must be an object"),
        ("t.jsonl", "[" * 100_000 + "\n", 1, "is JSON beyond what can be read"),
        ("t.jsonl", '{"text": "a", "lable": "x"}\n', 1, "has no field 'label'; its fields are text, lable"),
        ("t.jsonl", '{"text": 7, "label": "x"}\n', 1, "has a value of type int in the text column 'text'"),
        ("t.jsonl", '{"text": null, "label": "x"}\n', 1, "has no text"),
        (
            "t.jsonl",
            '{"text": "a", "label": 1.5}\n',
            1,
            "has a label of type float in the column 'label', where text is expected",
        ),
        ("t.jsonl", '{"text": "a", "label": ["x"]}\n', 1, "has a label of type list in the column 'label'"),
        ("t.jsonl", '{"text": "a", "label": null}\n', 1, "has no label in the column 'label'"),
        ("t.jsonl", '{"text": "\\ud800", "label": "x"}\n', 1, "is not UTF-8"),
        ("t.jsonl", '{"text": "a\\u0000", "label": "x"}\n', 1, "holds a NUL byte"),
    ],
)
def test_a_bad_row_is_named_by_its_line_or_skipped_and_counted(
    write: Write, name: str, content: str | bytes, line: int, problem: str
) -> None:
    path = write(name, content)
    rest = {"t.csv": b"\nfine,x\n", "t.tsv": b"\nfine\tx\n", "t.jsonl": b'\n{"text": "fine", "label": "x"}\n'}[name]

    with pytest.raises(DataError) as caught:
        read_table(path, NAMED, known_labels=("x", "10", "2"))
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}, {problem}")
    assert message.endswith("; correct it, or leave such rows out with --skip-bad-rows.")

    before = Path(path).read_bytes()
    table = read_table(write(name, before + rest), NAMED, known_labels=("x", "10", "2"), skip_bad_rows=True)
    assert table.texts[-1:] == ["fine"]
    assert table.skipped == 1


def test_an_open_quote_costs_one_row_and_not_those_that_it_swallows(write: Write) -> None:
    rows = [f'"text {i}",a' for i in range(3000)]
    rows[10], rows[2000] = '"open,a', "plain,a"
    path = write("t.csv", "\n".join(["text,label", *rows]))

    table = read_table(path, NAMED, skip_bad_rows=True)

    assert table.skipped == 1
    assert len(table.texts) == 2999
    assert [line for line, _, _ in good(path, NAMED)] == [line for line in range(2, 3002) if line != 12]


def test_bad_rows_of_parquet_have_numbers(tmp_path: Path) -> None:
    path = str(tmp_path / "t.parquet")
    raw = pa.array([b"a", b"\xff", b"c", None]).cast(pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({"text": broken, "label": ["x", "x", None, "x"]}), path)

    with pytest.raises(DataError, match=r"t\.parquet, row 2, is not UTF-8; .*--skip-bad-rows\.$"):
        read_table(path, NAMED)
    assert problems(path, NAMED) == [
        (2, "is not UTF-8"),
        (3, "has no label in the column 'label'"),
        (4, "has no text"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("t.xlsx", "", NAMED, "is no table that torchport reads; the name must end in .csv, .tsv, .jsonl, .ndjson"),
        ("t.parquet.gz", "", NAMED, "is no table that torchport reads"),
        ("t.csv", "txt,label\na,x\n", NAMED, "has no column named 'text'; did you mean 'txt'?"),
        ("t.csv", "a,b\n", NAMED, "has no column named 'text'; its first line has 'a', 'b'."),
        ("t.csv", "text,text,label\n", NAMED, "has 2 columns named 'text'; rename all but one."),
        ("t.csv", "a\n", PLACED, "has 1 column, and no column 1; positions count from 0, so the last one is 0."),
        ("t.jsonl", "{}\n", PLACED, "have names and no positions; replace 0 by a name."),
        ("t.csv", "", NAMED, "holds no row that can be used; check the file and the names of its columns."),
        ("t.csv", "text,label\n", NAMED, "holds no row that can be used; check"),
        ("t.csv.gz", b"text,label\na,x\n", NAMED, "cannot be read (Not a gzipped file"),
        ("t.csv.gz", gzip.compress(b"text,label\n" + b"a,x\n" * 999)[:-20], NAMED, "cannot be read (Compressed file"),
        ("t.parquet", b"PAR1 but no more", NAMED, "cannot be read as Parquet ("),
    ],
)
def test_a_file_that_cannot_be_read_raises_whatever_is_skipped(
    write: Write, name: str, content: str | bytes, columns: Columns, message: str
) -> None:
    path = write(name, content)

    with pytest.raises(DataError) as caught:
        read_table(path, columns, skip_bad_rows=True)

    assert path in str(caught.value)
    assert message in str(caught.value)
    assert str(caught.value).endswith((".", "?"))


@pytest.mark.parametrize("name", ["none.csv", "none.jsonl", "none.parquet"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(DataError, match=rf"There is no file {name}; say where it is with -s data."):
        read_table(name, NAMED)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "t.csv").mkdir()

    with pytest.raises(DataError, match=r"t\.csv cannot be read \(Is a directory\); check"):
        read_table(str(tmp_path / "t.csv"), NAMED)


def test_a_file_of_bad_rows_only_says_what_the_first_one_is(write: Write) -> None:
    path = write("t.jsonl", '\n{"txt": "a"}\nno\n')

    with pytest.raises(DataError, match=r"; line 2, the first of 2, has no field 'text'; its fields are txt; check"):
        read_table(path, NAMED, skip_bad_rows=True)


def test_parquet_without_pyarrow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)

    with pytest.raises(DataError, match=r"needs pyarrow.*pip install 'torchport\[parquet\]'\.$"):
        read_table("t.parquet", NAMED)


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        ((), "label", "No text column is named"),
        ((-1,), 0, "position is -1; positions count from 0."),
        (("a",), "a", "'a' is named twice"),
        ((True,), 0, "True is neither a name nor a position"),
    ],
)
def test_columns_are_checked(text: tuple[str | int, ...], label: str | int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Columns(text=text, label=label)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("AT&amp;T &lt;b&gt;wins&lt;/b&gt;", "AT&T  wins "),
        (r"yesterday #39;s  #36;10 deal, \$415 \again", "yesterday's $10 deal, $415  again"),
        (" quot;Now, quot; he said", '"Now," he said'),
        ("1 < 2 > 0 & no tag", "1 < 2 > 0 & no tag"),
    ],
)
def test_plain_text_of_html(before: str, after: str) -> None:
    assert plain_text(before).split() == after.split()


def test_html_is_cleaned_on_request_and_before_a_text_counts_as_empty(write: Write) -> None:
    path = write("t.csv", "text,label\na &amp; b,x\n&lt;br&gt;,x\n")

    assert read_table(path, NAMED).texts == ["a &amp; b", "&lt;br&gt;"]
    assert good(path, NAMED, clean_html=True) == [(2, "a & b", "x")]
    assert problems(path, NAMED, clean_html=True) == [(3, "has no text")]


def test_rows_come_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "a,x\n" * 50_000 + "b\n", encoding="utf-8")

    rows = iterate_rows(str(path), NAMED)

    assert next(rows) == Row(2, "a", "x")
    path.write_text("", encoding="utf-8")  # what is not in the buffer yet is gone
    assert sum(1 for _ in rows) < 40_000
