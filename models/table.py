"""Labelled texts from a table file, each row checked."""

import html
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from models.errors import DataError
from models.table_formats import BadRow, Column, RawRow, iterate_raw_rows

_SHOWN_LABELS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Where a row's text and label stand."""

    text: tuple[Column, ...]
    """Names from the header, or positions from 0 in a file without one; several are joined in this order."""

    label: Column
    """As for `text`."""

    separator: str = " "
    """Stands between the texts of two columns."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            DataError: naming the column.
        """
        if not self.text:
            raise DataError("No text column is named; give at least one.")
        chosen = [*self.text, self.label]
        for column in chosen:
            if isinstance(column, bool) or not isinstance(column, str | int) or column == "":
                raise DataError(f"The column {column!r} is neither a name nor a position; give one of them.")
            if isinstance(column, int) and column < 0:
                raise DataError(f"The column's position is {column}; positions count from 0.")
            if chosen.count(column) > 1:
                raise DataError(f"The column {column!r} is named twice; name it once.")


@dataclass(frozen=True, slots=True)
class Row:
    """A text and its label."""

    line: int
    """Where it begins in its file: a line, from 1; in Parquet the row's number."""

    text: str
    """Never blank."""

    label: str
    """As the file has it, without white space around it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """All good rows of a file, in its order."""

    texts: list[str]

    labels: list[str]
    """One for each text."""

    skipped: int
    """Bad rows that were left out."""


def read_table(
    path: str,
    columns: Columns,
    *,
    known_labels: Collection[str] | None = None,
    clean_html: bool = False,
    skip_bad_rows: bool = False,
) -> Table:
    """Reads a table file into memory.

    Args:
        path: as in `iterate_rows`.
        columns: as in `iterate_rows`.
        known_labels: as in `iterate_rows`.
        clean_html: as in `iterate_rows`.
        skip_bad_rows: count bad rows and go on, where the first one would raise otherwise.

    Raises:
        DataError: for a bad row, naming file, line and remedy; for a file that cannot be read, or has no good row.
    """
    texts, labels = [], []
    unit = "row" if path.lower().endswith(".parquet") else "line"
    first_bad: BadRow | None = None
    skipped = 0
    for row in iterate_rows(path, columns, known_labels=known_labels, clean_html=clean_html):
        if isinstance(row, Row):
            texts.append(row.text)
            labels.append(row.label)
        elif skip_bad_rows:
            first_bad = first_bad or row
            skipped += 1
        else:
            raise DataError(
                f"{path}, {unit} {row.line}, {row.problem}; correct it, or leave such rows out with --skip-bad-rows."
            )
    if not texts:
        found = f"; {unit} {first_bad.line}, the first of {skipped}, {first_bad.problem}" if first_bad else ""
        raise DataError(f"{path} holds no row that can be used{found}; check the file and the names of its columns.")
    return Table(texts=texts, labels=labels, skipped=skipped)


def iterate_rows(
    path: str, columns: Columns, *, known_labels: Collection[str] | None = None, clean_html: bool = False
) -> Iterator[Row | BadRow]:
    """Yields the rows of a table file, in constant memory.

    Args:
        path: a .csv, .tsv, .jsonl, .ndjson or .parquet file in UTF-8; those of text may be compressed (.csv.gz).
        columns: where text and label stand. Names mean that the file has a header, positions that it has none.
        known_labels: a row with another label is bad; None takes any.
        clean_html: make plain text of HTML, see `plain_text`.

    Yields:
        Each row that can be used, and a `BadRow` in place of each other. After a row with broken quotes reading goes
        on at the next line.

    Raises:
        DataError: for a file that is missing, of another kind, damaged, or without one of the columns.
    """
    known = None if known_labels is None else frozenset(known_labels)
    for row in iterate_raw_rows(path, (*columns.text, columns.label)):
        yield row if isinstance(row, BadRow) else _checked(row, columns, known, clean_html=clean_html)


def _checked(row: RawRow, columns: Columns, known: frozenset[str] | None, *, clean_html: bool) -> Row | BadRow:
    *values, raw_label = row.values
    parts: list[str] = []
    for name, value in zip(columns.text, values, strict=True):
        if value is not None and not isinstance(value, str):
            return BadRow(row.line, f"has a value of type {type(value).__name__} in the text column {name!r}")
        if value and not value.isspace():
            parts.append(plain_text(value) if clean_html else value)
    text = columns.separator.join(parts)
    if not isinstance(raw_label, str | int | None):  # not 1.0 either: which of its spellings would be the name?
        kind = type(raw_label).__name__
        return BadRow(row.line, f"has a label of type {kind} in the column {columns.label!r}, where text is expected")
    label = _label(raw_label)
    problem = _problem(text, label, columns, known)
    return Row(row.line, text, label) if problem is None else BadRow(row.line, problem)


def _problem(text: str, label: str, columns: Columns, known: frozenset[str] | None) -> str | None:
    problem = None
    if not text or text.isspace():
        problem = "has no text"
    elif not label:
        problem = f"has no label in the column {columns.label!r}"
    elif "\0" in text or "\0" in label:
        problem = "holds a NUL byte"
    elif not _is_unicode(text) or not _is_unicode(label):
        problem = "is not UTF-8"
    elif known is not None and label not in known:
        names = sorted(known, key=label_order)
        shown = ", ".join(names[:_SHOWN_LABELS]) + (", …" if len(names) > _SHOWN_LABELS else "")
        problem = f"has the unknown label {label[:60]!r}; known are {shown}"
    return problem


def _label(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip() if isinstance(value, str | int) else ""


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def label_order(label: str) -> tuple[bool, int, str]:
    """A sort key: whole numbers by value and first, then the other labels by their characters."""
    number = label.isascii() and label.isdigit() and len(label) < 19
    return not number, int(label) if number else 0, label


# AG News has lost the ampersand of most entities (" #39;s", " quot;"), with a blank in its place.
_LOST_AMPERSAND = re.compile(r"(?<!&) (?=(?:#\d{2,5}|quot|amp|lt|gt);)")
_TAG = re.compile(r"</?[A-Za-z!][^<>]*>")


def plain_text(text: str) -> str:
    r"""Makes plain text of HTML as news feeds and scrapers leave it.

    Entities become characters, also those that lost their ampersand; tags go; a backslash before a dollar sign goes,
    any other is a line break that was lost, and becomes a blank.

    >>> plain_text(r"A \$5 deal: &lt;b&gt;it #39;s on&lt;/b&gt;\again")
    "A $5 deal:  it's on  again"
    """
    unescaped = html.unescape(_LOST_AMPERSAND.sub("&", text))
    return _TAG.sub(" ", unescaped).replace("\\$", "$").replace("\\", " ")
