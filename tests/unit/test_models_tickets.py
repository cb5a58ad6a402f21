"""The tickets: the same on every machine, and neither trivial nor hopeless."""

import hashlib
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from models.dataset import Dataset
from models.errors import DataError
from models.text import LabelledTexts
from models.ticket_phrases import ASIDES, ISSUES, QUEUES, SLOTS
from models.tickets import evaluation_samples, generate_tickets, load_tickets_dataset

ROOT = Path(__file__).parents[2]
DIGEST = "1fd628f3407bdb8b"


@pytest.fixture(scope="module")
def tickets() -> LabelledTexts:
    return generate_tickets(seed=0)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_tickets_dataset(seed=0, count=600, vocab_size=400)


def digest(tickets: LabelledTexts) -> str:
    return hashlib.sha256("\n".join(f"{label} {text}" for text, label in tickets).encode()).hexdigest()[:16]


def test_the_tickets_of_a_seed_never_change(tickets: LabelledTexts) -> None:
    assert digest(tickets) == DIGEST
    assert digest(generate_tickets(seed=1)) != DIGEST


def test_hash_order_plays_no_part(dataset: Dataset) -> None:
    code = (
        "import hashlib; from models.tickets import load_tickets_dataset;"
        "d = load_tickets_dataset(seed=0, count=600, vocab_size=400);"
        "print(d.digest, hashlib.sha256(d.files['tokenizer.json']).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [dataset.digest, hashlib.sha256(dataset.files["tokenizer.json"]).hexdigest()]


def test_lengths_and_queues_are_realistic(tickets: LabelledTexts) -> None:
    words = np.array([len(text.split()) for text in tickets.texts])
    counts = np.bincount(tickets.labels, minlength=len(QUEUES))

    assert len(tickets) == 4000
    assert words.min() >= 5
    assert words.max() <= 60
    assert np.quantile(words, 0.9) - np.quantile(words, 0.1) > 20
    assert counts.min() > 0.9 * counts.mean()
    assert len(set(tickets.texts)) > 0.98 * len(tickets)
    assert not any("{" in text for text in tickets.texts)


def test_fewer_tickets_are_the_first_ones(tickets: LabelledTexts) -> None:
    assert generate_tickets(seed=0, count=50).texts == tickets.texts[:50]


def test_a_linear_model_over_words_leaves_something_to_learn(tickets: LabelledTexts) -> None:
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    features = vectorizer.fit_transform(tickets.texts[:3000])
    model = LogisticRegression(max_iter=300, C=10).fit(features, tickets.labels[:3000])

    accuracy = model.score(vectorizer.transform(tickets.texts[3000:]), tickets.labels[3000:])

    assert 0.85 < accuracy < 0.97


def test_every_slot_is_known_and_every_queue_has_phrases() -> None:
    assert list(ISSUES) == list(ASIDES) == list(QUEUES) == sorted(QUEUES)
    phrases = [phrase for group in (*ISSUES.values(), *ASIDES.values()) for phrase in group]
    used = {part.split("}")[0] for phrase in phrases for part in phrase.split("{")[1:]}
    assert used <= set(SLOTS)


def test_the_splits_are_stratified_and_chosen_by_the_seed(dataset: Dataset) -> None:
    other = load_tickets_dataset(seed=1, count=600, vocab_size=400)

    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.held_out)] == [432, 48, 120]
    shares = np.bincount(dataset.held_out.labels) / 120 - np.bincount(dataset.train.labels) / 432
    assert np.abs(shares).max() < 0.02
    assert dataset.class_names == QUEUES
    assert other.digest != dataset.digest
    assert load_tickets_dataset(seed=0, count=600, vocab_size=300).digest == dataset.digest


def test_evaluation_samples_are_those_held_out(dataset: Dataset) -> None:
    assert dataset.evaluation["source"] == "models.tickets:evaluation_samples"

    samples = list(evaluation_samples(**dataset.evaluation["options"]))

    assert [label for _, label in samples] == dataset.held_out.labels.tolist()
    text, label = next(islice(evaluation_samples(**dataset.evaluation["options"], split="train"), 1))
    assert isinstance(text, str)
    assert label == dataset.train.labels[0]


@pytest.mark.parametrize(("count", "message"), [(0, "count of tickets is 0"), (20, "add samples|too few samples")])
def test_too_few_tickets_are_refused(count: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tickets_dataset(seed=0, count=count)
