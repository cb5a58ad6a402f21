"""Text data sets: splits, token ids, padded batches, and the samples that a checkpoint is measured on."""

import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.corpus import LabelledTexts, TextSource, read_corpus
from models.dataloader import build_loader
from models.dataset import Dataset
from models.errors import DataError
from models.sampler import EvaluationSampler
from models.signature import text_classification_signature
from models.text import TextSample, TextSplit, collate_texts, evaluation_samples, load_text_dataset
from models.tokenizer import TextTokenizer

DATA = Path(os.environ.get("TORCHPORT_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (DATA / "sst2").is_dir() or not (DATA / "ag_news").is_dir(),
    reason="SST-2 and AG News are not there; set TORCHPORT_DATA to the folder that holds sst2/ and ag_news/",
)

WORDS = {"cat": ["purr", "meow", "whisker"], "dog": ["bark", "woof", "fetch"], "emu": ["peck", "feather", "run"]}

WriteTable = Callable[..., str]


@pytest.fixture
def write_table(tmp_path: Path) -> WriteTable:
    """Writes a CSV of so many rows; labels go round, or are given."""

    def write(name: str = "all.csv", *, rows: int = 60, labels: list[str] | None = None) -> str:
        order = labels or [list(WORDS)[i % 3] for i in range(rows)]
        lines = [
            f'"{" ".join(WORDS.get(label, ["odd"] * 3)[j % 3] for j in range(i % 5 + 1))} {name} {i}",{label}'
            for i, label in enumerate(order)
        ]
        path = tmp_path / name
        path.write_text("\n".join(["text,label", *lines, ""]), encoding="utf-8")
        return str(path)

    return write


def load(source: TextSource, **options: int) -> Dataset:
    return load_text_dataset(source, **{"vocab_size": 300, "max_length": 12, **options})


def test_fractions_give_disjoint_stratified_splits_of_all_rows(write_table: WriteTable) -> None:
    corpus = read_corpus(TextSource(path=write_table(rows=60)))

    splits = [corpus.train, corpus.validation, corpus.held_out]
    assert [len(split) for split in splits] == [43, 5, 12]
    assert Counter(text for split in splits for text in split.texts).most_common(1)[0][1] == 1
    assert sum(len(split) for split in splits) == 60
    assert np.bincount(corpus.held_out.labels).tolist() == [4, 4, 4]
    assert corpus.class_names == ("cat", "dog", "emu")
    for split in splits:
        for text, label in split:
            assert set(text.split()) & set(WORDS[corpus.class_names[label]])


def test_the_seed_chooses_the_splits(write_table: WriteTable) -> None:
    path = write_table()
    first, again, other = (read_corpus(TextSource(path=path, seed=seed)) for seed in (3, 3, 4))

    assert first.held_out.texts == again.held_out.texts
    assert first.train.texts == again.train.texts
    assert set(first.held_out.texts) != set(other.held_out.texts)


def test_the_last_rows_can_be_held_out(write_table: WriteTable) -> None:
    corpus = read_corpus(TextSource(path=write_table(rows=60), held_out_rows=15, validation_fraction=0.2))

    assert [text.split()[-1] for text in corpus.held_out.texts] == [str(i) for i in range(45, 60)]
    assert len(corpus.validation) == 9
    assert len(corpus.train) == 36


def test_each_split_can_have_its_own_file(write_table: WriteTable) -> None:
    source = TextSource(
        path=write_table("a.csv", rows=12),
        validation_path=write_table("b.csv", rows=6),
        held_out_path=write_table("c.csv", labels=["emu", "cat"]),
    )
    corpus = read_corpus(source)

    assert [len(corpus.train), len(corpus.validation), len(corpus.held_out)] == [12, 6, 2]
    assert corpus.held_out.labels.tolist() == [2, 0]
    assert all("b.csv" in text for text in corpus.validation.texts)


def test_a_held_out_file_leaves_the_other_rows_to_training_and_validation(write_table: WriteTable) -> None:
    held_out = write_table("c.csv", rows=3)
    corpus = read_corpus(TextSource(path=write_table("a.csv", rows=40), held_out_path=held_out))

    assert [len(corpus.train), len(corpus.validation), len(corpus.held_out)] == [36, 4, 3]


def test_names_are_given_to_labels_whatever_their_order(write_table: WriteTable) -> None:
    path = write_table(labels=["10", "9"] * 20)

    corpora = [
        read_corpus(TextSource(path=path, label_names=names))
        for names in ({"9": "nine", "10": "ten"}, {"10": "ten", "9": "nine"}, None)
    ]

    assert [corpus.class_names for corpus in corpora] == [("nine", "ten"), ("nine", "ten"), ("9", "10")]
    assert corpora[0].train.labels.tolist() == corpora[1].train.labels.tolist() == corpora[2].train.labels.tolist()


def test_bad_rows_of_all_files_are_counted(write_table: WriteTable) -> None:
    source = TextSource(
        path=write_table("a.csv", labels=["cat", "dog", "", "cat", "dog", "cat", "dog"]),
        validation_path=write_table("b.csv", labels=["cat", "yak", "dog"]),
        held_out_path=write_table("c.csv", labels=["yak", "dog", "yak"]),
        skip_bad_rows=True,
    )

    dataset = load(source)

    assert dataset.skipped_rows == 4
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.held_out)] == [6, 2, 1]


def test_a_label_that_training_never_saw_names_its_line(write_table: WriteTable) -> None:
    path, other = write_table("a.csv"), write_table("b.csv", labels=["cat", "yak"])

    with pytest.raises(DataError, match=r"b\.csv, line 3, has the unknown label 'yak'; known are cat, dog, emu; "):
        read_corpus(TextSource(path=path, validation_path=other))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["cat"] * 9, {}, "has only the label 'cat'; a classifier needs two, so check label_column."),
        ([f"label {i}" for i in range(9)], {}, "too few samples to be split (1 left); add some"),
        (["cat"] * 9 + ["dog"], {}, "The class 'dog' has too few samples to be split (1 left)"),
        (["cat", "dog"] * 3, {}, "10% of 4 samples cannot hold all 2 classes; add samples or change the fractions."),
        (["cat", "dog"] * 3, {"held_out_rows": 6}, "held_out_rows is 6, and "),
        (["cat"] * 5 + ["dog"] * 5, {"held_out_rows": 5}, "The class 'dog' has too few samples"),
        (["cat", "dog"] * 20, {"label_names": {"cat": "a", "dog": "b", "emu": "c"}}, "The class 'c' has too few"),
        (["cat", "dog"] * 20, {"label_names": {"cat": "a", "emu": "c"}}, "the unknown label 'dog'; known are cat, emu"),
    ],
)
def test_rows_that_cannot_be_split_are_refused(
    write_table: WriteTable, labels: list[str], options: dict[str, object], message: str
) -> None:
    path = write_table(labels=labels)

    with pytest.raises(DataError) as caught:
        read_corpus(TextSource(path=path, **options))  # type: ignore[arg-type]

    assert message in str(caught.value)


def test_a_class_without_training_texts_is_refused(write_table: WriteTable) -> None:
    source = TextSource(
        path=write_table("a.csv", labels=["cat"] * 5 + ["dog"] * 5),
        validation_path=write_table("b.csv", labels=["cat"]),
        held_out_rows=5,
    )
    with pytest.raises(DataError, match="The training split has no text of the class 'dog'"):
        read_corpus(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_path": "b", "held_out_rows": 3}, "both say what is held out; remove one of them."),
        ({"held_out_rows": 0}, "held_out_rows is 0; it must be at least 1."),
        ({"label_names": {"0": "bad", "1": "bad"}}, "gives the name 'bad' to several labels"),
        ({"label_names": {"0": "bad", "1": ""}}, "gives the label '1' an empty name; name its class."),
        ({"label_names": {}}, "label_names has 0 entries; a classifier needs two, so add some."),
        ({"label_names": {"0": "bad"}}, "label_names has 1 entries"),
    ],
)
def test_a_source_is_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TextSource(path="a", **options)  # type: ignore[arg-type]


def test_texts_are_kept_as_the_tokenizer_gives_them() -> None:
    tokenizer = TextTokenizer.train(["a bb ccc dddd"] * 9, vocab_size=300, max_length=6)
    texts = LabelledTexts(texts=["a bb", "ccc dddd a", "", "x" * 50], labels=np.array([1, 0, 1, 0]))

    split = TextSplit(texts, tokenizer)

    rows = tokenizer.encode_batch(texts.texts)
    assert [split[i].tokens.tolist() for i in range(4)] == rows
    assert [(split[i].id, split[i].label) for i in range(4)] == [(0, 1), (1, 0), (2, 1), (3, 0)]
    assert split.lengths is not None
    assert split.lengths.tolist() == [len(row) for row in rows]
    assert split.lengths.min() == 1
    assert split.lengths.max() == 6
    assert split[0].tokens.dtype == np.int32
    with pytest.raises(IndexError):
        split[4]


def test_more_texts_than_a_chunk_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.text._TEXTS_PER_CHUNK", 3)
    tokenizer = TextTokenizer.train(["ab"], vocab_size=258, max_length=9)
    texts = [chr(97 + i) * (1 + i % 4) for i in range(10)]

    split = TextSplit(LabelledTexts(texts=texts, labels=np.zeros(10, dtype=np.int64)), tokenizer)

    assert [split[i].tokens.tolist() for i in range(10)] == tokenizer.encode_batch(texts)


def test_a_batch_is_padded_to_its_longest_text() -> None:
    samples = [
        TextSample(7, np.array([5, 6], dtype=np.int32), 1),
        TextSample(2, np.array([8, 9, 10], dtype=np.int32), 0),
        TextSample(4, np.array([3], dtype=np.int32), 2),
    ]

    batch = collate_texts(samples)

    assert batch.inputs["input_ids"].tolist() == [[5, 6, 0], [8, 9, 10], [3, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [1, 0, 2]
    assert batch.ids.tolist() == [7, 2, 4]
    tensors = [*batch.inputs.values(), batch.labels, batch.ids]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_yields_every_text_once(write_table: WriteTable, workers: int) -> None:
    dataset = load(TextSource(path=write_table()))
    split = dataset.train
    sampler = EvaluationSampler(len(split), batch_size=8, lengths=split.lengths)

    batches = list(build_loader(split, sampler, dataset.collate, device=torch.device("cpu"), workers=workers))

    ids = torch.cat([batch.ids for batch in batches])
    assert sorted(ids.tolist()) == list(range(len(split)))
    assert torch.cat([batch.labels for batch in batches]).tolist() == split.labels[ids.numpy()].tolist()
    assert split.in_memory
    assert pickle.loads(pickle.dumps(dataset.collate)) is dataset.collate


def test_the_tokenizer_learns_from_the_training_split_alone(write_table: WriteTable) -> None:
    path = write_table("a.csv")
    datasets = [
        load(TextSource(path=path, held_out_path=write_table(name, rows=rows)))
        for name, rows in (("b.csv", 6), ("c.csv", 30))
    ]
    assert datasets[0].files == datasets[1].files
    assert datasets[0].digest != datasets[1].digest
    tokenizer = TextTokenizer.from_bytes(datasets[0].files["tokenizer.json"])
    (row,) = tokenizer.encode_batch([read_corpus(TextSource(path=path, held_out_path=path)).train.texts[5]])
    assert datasets[0].train[5].tokens.tolist() == row


def test_the_data_set_says_what_model_and_signature_need(write_table: WriteTable) -> None:
    dataset = load(TextSource(path=write_table(labels=["0", "1"] * 30), label_names={"0": "no", "1": "yes"}))

    assert dataset.model_arguments == {"vocab_size": 271, "max_length": 12, "num_classes": 2, "pad_id": 0}
    assert dataset.signature == text_classification_signature(
        ("no", "yes"), tokenizer="tokenizer.json", vocab_size=271, max_length=12, pad_id=0
    )
    assert dataset.signature == {
        "format_version": 1,
        "task": "text-classification",
        "inputs": [
            {
                "name": "input_ids",
                "dtype": "int64",
                "shape": ["batch", "length"],
                "minimum": 0,
                "maximum": 270,
                "padding": 0,
            },
            {
                "name": "attention_mask",
                "dtype": "int64",
                "shape": ["batch", "length"],
                "minimum": 1,
                "maximum": 1,
                "padding": 0,
            },
        ],
        "axes": {"length": {"minimum": 1, "maximum": 12}},
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
        "labels": ["no", "yes"],
        "preprocessing": {"text": {"tokenizer": "tokenizer.json", "max_length": 12, "pad_id": 0}},
    }


@pytest.mark.parametrize("change", [("purr", "purs"), (",cat", ",dog")])
def test_the_digest_changes_with_every_text_and_label(write_table: WriteTable, change: tuple[str, str]) -> None:
    path = write_table()
    source = TextSource(path=path, held_out_path=path, validation_path=path)
    before = load(source).digest
    assert load(source, vocab_size=280).digest == before

    content = Path(path).read_text(encoding="utf-8")
    Path(path).write_text(content.replace(*change, 1), encoding="utf-8")

    assert load(source).digest != before


def test_evaluation_samples_are_those_held_out(
    write_table: WriteTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table()
    monkeypatch.chdir(tmp_path)
    source = TextSource(path="all.csv", seed=5, label_names={"emu": "Emu", "cat": "Cat", "dog": "Dog"})
    dataset = load(source)

    assert dataset.evaluation["source"] == "models.text:evaluation_samples"
    options = dataset.evaluation["options"]
    assert options["path"] == "all.csv"
    assert all(type(value) in (str, int, float, bool, list, dict, type(None)) for value in options.values())
    assert TextSource.from_options(options) == source
    for split, expected in (("held_out", dataset.held_out), ("validation", dataset.validation)):
        samples = list(evaluation_samples(**options, split=split))
        assert [label for _, label in samples] == expected.labels.tolist()
        rows = TextTokenizer.from_bytes(dataset.files["tokenizer.json"]).encode_batch([text for text, _ in samples])
        assert rows == [expected[i].tokens.tolist() for i in range(len(expected))]


@needs_data
def test_sst2_loads_whole() -> None:
    source = TextSource(
        path=str(DATA / "sst2/train.tsv"),
        validation_path=str(DATA / "sst2/dev.tsv"),
        held_out_path=str(DATA / "sst2/test.tsv"),
        text_columns=(0,),
        label_column=1,
        label_names={"0": "negative", "1": "positive"},
    )
    corpus = read_corpus(source)

    assert [len(corpus.train), len(corpus.validation), len(corpus.held_out)] == [6920, 872, 1821]
    assert corpus.train.texts[3].startswith("this is a visually stunning rumination on love")
    assert corpus.train.labels[:4].tolist() == [1, 0, 0, 1]


@needs_data
def test_ag_news_loads_whole() -> None:
    source = TextSource(
        path=str(DATA / "ag_news/all.csv"), text_columns=(1, 2), label_column=0, held_out_rows=1600, clean_html=True
    )
    corpus = read_corpus(source)

    assert len(corpus.train) + len(corpus.validation) == 6000
    assert len(corpus.held_out) == 1600
    assert corpus.class_names == ("1", "2", "3", "4")
    texts = [*corpus.train.texts, *corpus.validation.texts, *corpus.held_out.texts]
    assert not any("#39;" in text or "&lt;" in text or "\\" in text for text in texts)
