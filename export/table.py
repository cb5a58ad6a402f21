"""Tables of texts: CSV, TSV and JSON lines, with or without labels."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from export.errors import EvaluationError
from handlers.document import shown

Column = str | int
"""A column's name, or its position from 0 in a file without a header."""

_DEFAULT = ("text", "label")
_NAMES_SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Where a row's text and label stand.

    Attributes:
        text: Names, or positions from 0 in a file without a header; several are joined with a blank.
        label: The same for the label; None when there is none.
    """

    text: tuple[Column, ...]
    label: Column | None

    @classmethod
    def parse(cls, option: str) -> Columns:
        """Read ``--columns``: ``TEXT,LABEL``, or ``TEXT`` alone; ``TITLE+BODY,LABEL`` joins two columns.

        Raises:
            EvaluationError: If it has another form.
        """
        texts, _, label = option.partition(",")
        names = [*texts.split("+"), *([label] if label else [])]
        columns = [int(name) if name.isdecimal() else name for name in (part.strip() for part in names)]
        mixed = len({type(column) for column in columns}) > 1
        if "" in columns or "," in label or mixed or len(set(columns)) != len(columns):
            raise EvaluationError(
                f"the columns {shown(option)} are not usable; write TEXT,LABEL, both as names of the header or both as "
                "positions from 0, such as sentence,label or 1,0"
            )
        return cls(text=tuple(columns[: len(texts.split("+"))]), label=columns[-1] if label else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a table.

    Attributes:
        line: Where it begins, from 1.
        text: Its text.
        label: Its label as the file has it; None without a label column.
    """

    line: int
    text: str
    label: object


def read_table(path: Path, columns: Columns | None, *, labelled: bool) -> Iterator[Row]:
    """The rows of a ``.csv``, ``.tsv``, ``.jsonl`` or ``.ndjson`` file in UTF-8, compressed (``.gz``) or not.

    Args:
        path: The file.
        columns: Where text and label stand. None: the columns ``text`` and ``label`` of the header, or the first and
            the second one of a file without a header.
        labelled: Whether every row must have a label.

    Raises:
        EvaluationError: If the file cannot be read, has no such columns, or a row is broken.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] == [".gz"]
    suffix = "".join(suffixes[-2:-1] if compressed else suffixes[-1:])
    if suffix not in _READERS:
        raise EvaluationError(f"{path} is no table that torchport reads; the name must end in {', '.join(_READERS)}")
    if columns is not None and columns.label is None and labelled:
        raise EvaluationError("the columns name no label, which evaluation data must have; write TEXT,LABEL")
    opener: Any = gzip.open if compressed else open
    try:
        # newline="": the csv module wants line ends as they are.
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from _READERS[suffix](path, file, columns, labelled)
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 text; convert it") from error
    except csv.Error as error:
        raise EvaluationError(f"{path} is not a well-formed table: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise EvaluationError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _csv_rows(path: Path, file: IO[str], columns: Columns | None, labelled: bool) -> Iterator[Row]:
    yield from _delimited(path, csv.reader(file, strict=True), columns, labelled)


def _tsv_rows(path: Path, file: IO[str], columns: Columns | None, labelled: bool) -> Iterator[Row]:
    # IANA's text/tab-separated-values knows no quotes: a text may begin with one.
    reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    yield from _delimited(path, reader, columns, labelled)


def _delimited(path: Path, reader: Any, columns: Columns | None, labelled: bool) -> Iterator[Row]:
    positions: Sequence[int] | None = None
    label: int | None = None
    line = 1
    for cells in reader:
        start, line = line, reader.line_num + 1
        if not any(cells):
            continue
        if positions is None:
            positions, label, header = _positions(path, cells, columns, labelled)
            if header:
                continue
        wanted = [*positions, *([label] if label is not None else [])]
        if len(cells) <= max(wanted):
            raise EvaluationError(
                f"{path}, line {start}, has {len(cells)} columns, and column {max(wanted) + 1} is wanted"
            )
        yield Row(
            line=start,
            text=" ".join(cells[position] for position in positions),
            label=None if label is None else cells[label].strip(),
        )


def _positions(
    path: Path, first: Sequence[str], columns: Columns | None, labelled: bool
) -> tuple[list[int], int | None, bool]:
    """Where text and label stand, and whether the first row is a header."""
    header = [name.strip() for name in first]
    if columns is None:
        text, label = _DEFAULT
        if text in header and (label in header or not labelled):
            return [header.index(text)], header.index(label) if label in header else None, True
        if len(first) == 2 and text not in header:
            return [0], 1, False
        if len(first) == 1 and not labelled:
            return [0], None, False
        raise EvaluationError(
            f"{path} has the columns {', '.join(map(shown, header[:_NAMES_SHOWN]))}, and none called 'text' and "
            "'label'; name yours with --columns TEXT,LABEL"
        )
    named = [*columns.text, *([columns.label] if columns.label is not None else [])]
    if all(isinstance(column, int) for column in named):
        found, is_header = [int(column) for column in named], False
    else:
        missing = next((column for column in named if column not in header), None)
        if missing is not None:
            raise EvaluationError(
                f"{path} has no column {shown(missing)}; its columns are {', '.join(map(shown, header[:_NAMES_SHOWN]))}"
            )
        found, is_header = [header.index(str(column)) for column in named], True
    return found[: len(columns.text)], found[-1] if columns.label is not None else None, is_header


def _json_rows(path: Path, file: IO[str], columns: Columns | None, labelled: bool) -> Iterator[Row]:
    wanted = columns or Columns(text=_DEFAULT[:1], label=_DEFAULT[1])
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{path}, line {number}, is not valid JSON; write one object a line") from error
        if not isinstance(value, Mapping):
            raise EvaluationError(f"{path}, line {number}, is not a JSON object")
        needed = [*wanted.text, *([wanted.label] if labelled and wanted.label is not None else [])]
        missing = next((name for name in needed if name not in value), None)
        if missing is not None:
            raise EvaluationError(
                f"{path}, line {number}, has no {shown(missing)}; its keys are "
                f"{', '.join(map(shown, list(value)[:_NAMES_SHOWN]))}: name yours with --columns TEXT,LABEL"
            )
        texts = [value[name] for name in wanted.text]
        if not all(isinstance(text, str) for text in texts):
            raise EvaluationError(f"{path}, line {number}, has a text that is not a string")
        yield Row(line=number, text=" ".join(texts), label=value.get(wanted.label))


_READERS: dict[str, Callable[[Path, IO[str], Columns | None, bool], Iterator[Row]]] = {
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
}
