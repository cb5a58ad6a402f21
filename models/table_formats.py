"""Table files: the rows of CSV, TSV, JSON lines and Parquet, each with its place in its file.

All are read as a stream. A row that cannot be read is yielded as a `BadRow`; only a file that cannot be read raises.
"""

import csv
import difflib
import gzip
import importlib
import itertools
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from models.errors import DataError

Column = str | int
"""A column's name, or its position from 0 in a file without a header."""

_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as its file has it."""

    line: int
    """Where it begins: a line of the file, from 1; in Parquet the row's number."""

    values: tuple[object, ...]
    """One for each column that was asked for."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used."""

    line: int
    """As in `RawRow`."""

    problem: str
    """The predicate of a sentence about the row, such as "has no text"."""


RowIterator = Iterator[RawRow | BadRow]


def iterate_raw_rows(path: str, columns: Sequence[Column]) -> RowIterator:
    """Yields the rows of a table file; its format follows from its suffix.

    A file whose columns are all given by position has no header; any name says that its first line is one. Text is
    UTF-8, with or without a byte order mark. Blank lines hold no row.

    Args:
        path: a .csv, .tsv, .jsonl, .ndjson or .parquet file; those of text may be compressed (.csv.gz).
        columns: what to take from each row.

    Raises:
        DataError: for a file that is missing, of another kind, damaged, or without one of the columns.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compressed = suffixes[-1:] == [".gz"]
    suffix = "".join(suffixes[-2:-1] if compressed else suffixes[-1:])
    if suffix == ".parquet" and not compressed:
        yield from _parquet_rows(path, columns)
        return
    if suffix not in _TEXT_READERS:
        known = ", ".join([*_TEXT_READERS, ".parquet"])
        raise DataError(f"{path} is no table that torchport reads; the name must end in {known}.")
    try:
        with _open_text(path, compressed=compressed) as file:
            yield from _TEXT_READERS[suffix](path, file, columns)
    except FileNotFoundError as error:
        raise DataError(
            f"There is no file {path}; say where it is with -s data.folder=FOLDER, from the working folder on."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({reason}); check the file and its permissions.") from error


def _open_text(path: str, *, compressed: bool) -> IO[str]:
    # Bytes that are not UTF-8 become lone surrogates, by which their row is found; a strict decoder would stop there.
    # newline="": the csv module wants line ends as they are.
    opener: Any = gzip.open if compressed else open
    file: IO[str] = opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
    return file


class _Lines:
    """A file's lines, counted; those of a row that turned out to be broken can be read again."""

    def __init__(self, file: IO[str]) -> None:
        self.number = 0
        self._file = file
        self._again: deque[str] = deque()
        self._row: list[str] = []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._file)
        self._row.append(line)
        self.number += 1
        return line

    def start_row(self) -> int:
        """Returns the number of the line that comes next."""
        self._row.clear()
        return self.number + 1

    def return_to_second_line(self) -> None:
        """Gives back all lines of the current row but the first."""
        returned = self._row[1:]
        self._again.extendleft(reversed(returned))
        self.number -= len(returned)


def _csv_rows(path: str, file: IO[str], columns: Sequence[Column]) -> RowIterator:
    yield from _delimited_rows(path, file, columns, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _tsv_rows(path: str, file: IO[str], columns: Sequence[Column]) -> RowIterator:
    # IANA's text/tab-separated-values knows no quotes: a text may begin with one.
    yield from _delimited_rows(path, file, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _delimited_rows(
    path: str, file: IO[str], columns: Sequence[Column], *, delimiter: str, quoting: Any
) -> RowIterator:
    lines = _Lines(file)
    records = _records(lines, delimiter=delimiter, quoting=quoting)
    positions: list[int] | None = None
    width = 0
    for line, record in records:
        if isinstance(record, str):
            yield BadRow(line, record)
            continue
        if positions is None:
            width = len(record)
            positions = _positions(path, columns, record)
            if any(isinstance(column, str) for column in columns):
                continue
        if len(record) != width:
            quotes = "" if quoting == csv.QUOTE_NONE else "; quote texts that hold commas"
            yield BadRow(line, f"has {_columns(len(record))} where the first line has {width}{quotes}")
        else:
            yield RawRow(line, tuple(record[position] for position in positions))


def _records(lines: _Lines, *, delimiter: str, quoting: Any) -> Iterator[tuple[int, list[str] | str]]:
    """Yields (line, fields) or (line, problem)."""

    def new_reader() -> Any:
        return csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)

    reader = new_reader()
    while True:
        line = lines.start_row()
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that is never closed swallows what follows it: the rows on the next lines may well be sound.
            lines.return_to_second_line()
            reader = new_reader()
            yield line, _csv_problem(error)
        else:
            if record:
                yield line, record


def _csv_problem(error: csv.Error) -> str:
    reason = str(error)
    if "unexpected end of data" in reason:
        return "opens a quote that is never closed"
    if "expected after" in reason:
        return "has something between a closing quote and the next comma; write a quote inside a quoted text twice"
    if "field limit" in reason:
        return f"has a text of more than {csv.field_size_limit():,} characters, or a quote that is never closed"
    return f"is broken ({reason})"


def _positions(path: str, columns: Sequence[Column], first: Sequence[str]) -> list[int]:
    positions = []
    for column in columns:
        if isinstance(column, int):
            if column >= len(first):
                raise DataError(
                    f"{path} has {_columns(len(first))}, and no column {column}; positions count from 0, "
                    f"so the last one is {len(first) - 1}."
                )
            positions.append(column)
        else:
            if first.count(column) > 1:
                raise DataError(f"{path} has {first.count(column)} columns named {column!r}; rename all but one.")
            if column not in first:
                raise _unknown_column(path, column, first)
            positions.append(first.index(column))
    return positions


def _unknown_column(path: str, column: str, names: Sequence[str]) -> DataError:
    close = difflib.get_close_matches(column, names, n=1)
    known = ", ".join(repr(name[:40]) for name in names[:12])
    hint = f"did you mean {close[0]!r}?" if close else f"its first line has {known}."
    return DataError(f"{path} has no column named {column!r}; {hint}")


def _columns(count: int) -> str:
    return f"{count} column" + ("" if count == 1 else "s")


def _json_rows(path: str, file: IO[str], columns: Sequence[Column]) -> RowIterator:
    positions = [column for column in columns if isinstance(column, int)]
    if positions:
        raise DataError(f"The columns of {path} have names and no positions; replace {positions[0]} by a name.")
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        yield _json_row(number, line, columns)


def _json_row(number: int, line: str, columns: Sequence[Column]) -> RawRow | BadRow:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(number, f"is no JSON ({error.msg} at character {error.colno})")
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits; lists nested beyond the stack
        return BadRow(number, "is JSON beyond what can be read")
    if not isinstance(content, dict):
        return BadRow(number, f"is a JSON {_json_type(content)}; each line must be an object")
    missing = [str(column) for column in columns if column not in content]
    if missing:
        known = ", ".join(str(name)[:40] for name in itertools.islice(content, 12))
        return BadRow(number, f"has no field {missing[0]!r}; its fields are {known or 'none'}")
    return RawRow(number, tuple(content[str(column)] for column in columns))


def _json_type(value: object) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]


_TEXT_READERS: dict[str, Callable[[str, IO[str], Sequence[Column]], RowIterator]] = {
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
}


def _parquet_rows(path: str, columns: Sequence[Column]) -> RowIterator:
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            f"Reading {path} needs pyarrow, which is not installed; run: pip install 'torchport[parquet]'."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            positions = _positions(path, columns, names)
            chosen = [names[position] for position in positions]
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=chosen):
                values = [_arrow_values(arrow, batch.column(name)) for name in chosen]
                for row in zip(*values, strict=True):
                    number += 1
                    yield RawRow(number, row)
    except FileNotFoundError as error:
        raise DataError(
            f"There is no file {path}; say where it is with -s data.folder=FOLDER, from the working folder on."
        ) from error
    except (OSError, arrow.ArrowException) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"{path} cannot be read as Parquet ({reason}); check the file.") from error


def _arrow_values(arrow: Any, column: Any) -> list[object]:
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
        # Arrow does not check what writers call UTF-8. As in text files, one bad row must not stop the others.
        raw = column.cast(arrow.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
    values: list[object] = column.to_pylist()
    return values
