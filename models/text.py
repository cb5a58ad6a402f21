"""Texts for training: cut into tokens once, and padded batch by batch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from models import tokenizer as tokenizers
from models.batch import Batch
from models.corpus import LabelledTexts, TextCorpus, TextSource, read_corpus
from models.dataset import Dataset
from models.digest import sample_digest
from models.signature import text_classification_signature
from models.splits import IntArray, SplitName
from models.tokenizer import TextTokenizer

EVALUATION_SOURCE = "models.text:evaluation_samples"
"""Import path of `evaluation_samples`, as a checkpoint names it."""

# Tokens of this many texts are Python integers at a time; then they are packed, in a tenth of the memory.
_TEXTS_PER_CHUNK = 8192


class TextSample(NamedTuple):
    """One text, as `collate_texts` takes it."""

    id: int
    """Its place in the split."""

    tokens: npt.NDArray[np.int32]
    """[length] token ids."""

    label: int
    """An index into the class names."""


class TextSplit:
    """Texts as token ids, packed one after the other; a `models.dataset.Split`.

    Args:
        texts: what to keep.
        tokenizer: cuts them into tokens.
    """

    in_memory = True

    def __init__(self, texts: LabelledTexts, tokenizer: TextTokenizer) -> None:
        self.labels = texts.labels
        chunks: list[npt.NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
        lengths: list[int] = []
        for start in range(0, len(texts), _TEXTS_PER_CHUNK):
            rows = tokenizer.encode_batch(texts.texts[start : start + _TEXTS_PER_CHUNK])
            lengths.extend(map(len, rows))
            chunks.append(np.fromiter((token for row in rows for token in row), dtype=np.int32))
        self.lengths: IntArray | None = np.asarray(lengths, dtype=np.int64)
        self._tokens = np.concatenate(chunks)
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> TextSample:
        if not 0 <= index < len(self.labels):
            raise IndexError(f"there are {len(self.labels)} texts, and none with the index {index}")
        start = self._ends[index - 1] if index else 0
        return TextSample(index, self._tokens[start : self._ends[index]], int(self.labels[index]))


def collate_texts(samples: Sequence[TextSample]) -> Batch:
    """Pads texts to the longest one (B = batch, T = its tokens).

    Returns:
        Inputs input_ids [B, T] int64, and attention_mask [B, T] int64: 1 at tokens, 0 at padding.
    """
    lengths = np.fromiter((len(sample.tokens) for sample in samples), dtype=np.int64)
    mask = np.arange(lengths.max()) < lengths[:, np.newaxis]
    input_ids = np.full(mask.shape, tokenizers.PAD_ID, dtype=np.int64)
    input_ids[mask] = np.concatenate([sample.tokens for sample in samples])
    return Batch(
        inputs={"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))},
        labels=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
    )


def load_text_dataset(source: TextSource, *, vocab_size: int, max_length: int, lower_case: bool = True) -> Dataset:
    """Reads and splits texts, and trains a tokenizer on the training split.

    Args:
        source: where they come from, and how they are split.
        vocab_size: as in `TextTokenizer.train`.
        max_length: as in `TextTokenizer.train`.
        lower_case: as in `TextTokenizer.train`.

    Raises:
        DataError: as in `read_corpus` and `TextTokenizer.train`.
    """
    return build_text_dataset(
        read_corpus(source),
        vocab_size=vocab_size,
        max_length=max_length,
        lower_case=lower_case,
        evaluation={"source": EVALUATION_SOURCE, "options": source.options()},
    )


def evaluation_samples(*, split: SplitName = "held_out", **options: Any) -> Iterator[tuple[str, int]]:
    """Yields the texts a checkpoint's metrics were measured on.

    Args:
        split: the split to yield; only `last.pt` names another than "held_out".
        **options: the fields of a `TextSource`; relative paths count from the working folder.

    Yields:
        A text, before tokenisation, and its label's index.
    """
    yield from read_corpus(TextSource.from_options(options)).split(split)


def build_text_dataset(
    corpus: TextCorpus, *, vocab_size: int, max_length: int, lower_case: bool, evaluation: Mapping[str, Any]
) -> Dataset:
    """Trains a tokenizer on the training split and cuts all texts into tokens.

    Args:
        corpus: the texts.
        vocab_size: as in `TextTokenizer.train`.
        max_length: as in `TextTokenizer.train`.
        lower_case: as in `TextTokenizer.train`.
        evaluation: see `Dataset.evaluation`.

    Raises:
        TokenizerError: as in `TextTokenizer.train`.
    """
    tokenizer = TextTokenizer.train(
        corpus.train.texts, vocab_size=vocab_size, max_length=max_length, lower_case=lower_case
    )
    splits = (corpus.train, corpus.validation, corpus.held_out)
    return Dataset(
        train=TextSplit(corpus.train, tokenizer),
        validation=TextSplit(corpus.validation, tokenizer),
        held_out=TextSplit(corpus.held_out, tokenizer),
        class_names=corpus.class_names,
        collate=collate_texts,
        model_arguments={
            "vocab_size": tokenizer.vocab_size,
            "max_length": tokenizer.max_length,
            "num_classes": len(corpus.class_names),
            "pad_id": tokenizer.pad_id,
        },
        signature=text_classification_signature(
            corpus.class_names,
            tokenizer=tokenizers.FILE_NAME,
            vocab_size=tokenizer.vocab_size,
            max_length=tokenizer.max_length,
            pad_id=tokenizer.pad_id,
        ),
        evaluation=evaluation,
        digest=sample_digest(corpus.class_names, (((text.encode(), label) for text, label in part) for part in splits)),
        files={tokenizers.FILE_NAME: tokenizer.to_bytes()},
        skipped_rows=corpus.skipped_rows,
    )
