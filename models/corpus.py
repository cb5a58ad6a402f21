"""A corpus: labelled texts in three splits, read from table files."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from models.errors import DataError
from models.splits import IntArray, SplitName, divide, stratified_splits
from models.table import Columns, Table, label_order, read_table
from models.table_formats import Column


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """Where labelled texts come from, and how they are split."""

    path: str
    """The file of the training split, and of all splits that have no file of their own."""

    validation_path: str | None = None
    """A file of its own for what chooses the best epoch."""

    held_out_path: str | None = None
    """A file of its own for what measures the finished model."""

    text_columns: tuple[Column, ...] = ("text",)
    """Names from the header, or positions from 0 in files without one; several are joined."""

    label_column: Column = "label"
    """As for `text_columns`."""

    separator: str = " "
    """Stands between the texts of two columns."""

    label_names: Mapping[str, str] | None = None
    """Names the classes: the file's label -> the name. Another label makes a bad row. None takes labels as names."""

    clean_html: bool = False
    """Make plain text of HTML; see `models.table.plain_text`. Clients are expected to send plain text."""

    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, and count them."""

    seed: int = 0
    """Chooses the splits."""

    held_out_fraction: float = 0.2
    """Share of all rows that only measures the finished model, when it has no file and `held_out_rows` is None."""

    held_out_rows: int | None = None
    """The last so many rows are held out: for data sets with a fixed split in one file."""

    validation_fraction: float = 0.1
    """Share of the remaining rows that chooses the best epoch, when it has no file."""

    def __post_init__(self) -> None:
        """Checks what concerns several fields.

        Raises:
            DataError: naming the fields.
        """
        if self.held_out_path is not None and self.held_out_rows is not None:
            raise DataError("held_out_path and held_out_rows both say what is held out; remove one of them.")
        if self.held_out_rows is not None and self.held_out_rows < 1:
            raise DataError(f"held_out_rows is {self.held_out_rows}; it must be at least 1.")
        if self.label_names is None:
            return
        if len(self.label_names) < 2:
            raise DataError(f"label_names has {len(self.label_names)} entries; a classifier needs two, so add some.")
        unnamed = [label for label, name in self.label_names.items() if not name]
        if unnamed:
            raise DataError(f"label_names gives the label {unnamed[0]!r} an empty name; name its class.")
        names = list(self.label_names.values())
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DataError(f"label_names gives the name {twice[0]!r} to several labels; give each one of its own.")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """The opposite of `options`."""
        columns = {"text_columns": tuple(options["text_columns"])} if "text_columns" in options else {}
        return cls(**{**options, **columns})

    def options(self) -> dict[str, Any]:
        """All fields as plain values, for a checkpoint to keep."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        names = None if self.label_names is None else dict(self.label_names)
        return {**values, "text_columns": list(self.text_columns), "label_names": names}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledTexts:
    """Texts and their classes, index by index."""

    texts: list[str]

    labels: IntArray
    """[N], each an index into the class names."""

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return zip(self.texts, self.labels.tolist(), strict=True)

    def select(self, indices: IntArray) -> "LabelledTexts":
        """Some of the texts, in the order of `indices`."""
        return LabelledTexts(texts=[self.texts[index] for index in indices], labels=self.labels[indices])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TextCorpus:
    """Labelled texts in three splits."""

    train: LabelledTexts
    """What the weights and the tokenizer learn from."""

    validation: LabelledTexts
    """What chooses the best epoch."""

    held_out: LabelledTexts
    """What measures the finished model, and nothing else."""

    class_names: tuple[str, ...]
    """Index i names class i."""

    skipped_rows: int = 0
    """Bad rows that were left out."""

    def split(self, name: SplitName) -> LabelledTexts:
        """A split by its name."""
        return {"train": self.train, "validation": self.validation, "held_out": self.held_out}[name]

    @classmethod
    def stratified(
        cls,
        texts: LabelledTexts,
        class_names: Sequence[str],
        *,
        seed: int,
        held_out_fraction: float,
        validation_fraction: float,
    ) -> Self:
        """Splits texts; see `models.splits.stratified_splits`."""
        splits = stratified_splits(
            texts.labels,
            class_names,
            seed=seed,
            held_out_fraction=held_out_fraction,
            validation_fraction=validation_fraction,
        )
        return cls(
            train=texts.select(splits.train),
            validation=texts.select(splits.validation),
            held_out=texts.select(splits.held_out),
            class_names=tuple(class_names),
        )


def read_corpus(source: TextSource) -> TextCorpus:
    """Reads and splits texts.

    Args:
        source: where they come from, and how they are split.

    Raises:
        DataError: for a file or row that cannot be used, or texts that cannot be split; names what and the remedy.
    """
    names = source.label_names
    main = _read(source, source.path, known_labels=names)
    # Sorted, and not in the order of the mapping or the file: neither outlives every way of storing a recipe.
    raw_labels = sorted(names or set(main.labels), key=label_order)
    class_names = tuple(names[label] if names else label for label in raw_labels)
    if len(class_names) < 2:
        raise DataError(
            f"{source.path} has only the label {class_names[0]!r}; a classifier needs two, so check label_column."
        )
    index = {label: place for place, label in enumerate(raw_labels)}
    skipped = main.skipped

    def indexed(table: Table) -> LabelledTexts:
        labels = np.fromiter((index[label] for label in table.labels), dtype=np.int64)
        return LabelledTexts(texts=table.texts, labels=labels)

    def read_split(path: str) -> LabelledTexts:
        nonlocal skipped
        table = _read(source, path, known_labels=raw_labels)
        skipped += table.skipped
        return indexed(table)

    texts = indexed(main)
    development = np.arange(len(texts))
    if source.held_out_path is not None:
        held_out = read_split(source.held_out_path)
    else:
        development, taken = _hold_out(source, texts.labels, class_names)
        held_out = texts.select(taken)
    if source.validation_path is not None:
        train, validation = development, read_split(source.validation_path)
    else:
        train, taken = divide(
            development, texts.labels, class_names, share=source.validation_fraction, seed=source.seed
        )
        validation = texts.select(taken)
    missing = np.flatnonzero(np.bincount(texts.labels[train], minlength=len(class_names)) == 0)
    if len(missing):
        raise DataError(
            f"The training split has no text of the class {class_names[missing[0]]!r}; add some, or leave it out."
        )
    return TextCorpus(
        train=texts.select(train),
        validation=validation,
        held_out=held_out,
        class_names=class_names,
        skipped_rows=skipped,
    )


def _read(source: TextSource, path: str, *, known_labels: Collection[str] | None) -> Table:
    return read_table(
        path,
        Columns(text=source.text_columns, label=source.label_column, separator=source.separator),
        known_labels=known_labels,
        clean_html=source.clean_html,
        skip_bad_rows=source.skip_bad_rows,
    )


def _hold_out(source: TextSource, labels: IntArray, class_names: Sequence[str]) -> tuple[IntArray, IntArray]:
    indices = np.arange(len(labels))
    if source.held_out_rows is None:
        return divide(indices, labels, class_names, share=source.held_out_fraction, seed=source.seed)
    if source.held_out_rows >= len(labels):
        raise DataError(
            f"held_out_rows is {source.held_out_rows}, and {source.path} has {len(labels)} rows; "
            "leave some to learn from."
        )
    return indices[: -source.held_out_rows], indices[-source.held_out_rows :]
