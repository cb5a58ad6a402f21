"""The model card of a run: what a reader must know before relying on the model, in Markdown."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.evaluation import ClassificationReport

# Beyond this a table of the confusions cannot be read any more; run.json holds them all.
_MAX_CONFUSION_CLASSES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """Everything that the card of a run says."""

    name: str
    """Of the run."""

    task: str
    """As in the signature, such as "text-classification"."""

    class_names: tuple[str, ...]
    """By index."""

    architecture: str
    """The model's class or factory."""

    model_config: Mapping[str, Any]
    """What it was built with."""

    parameters: int
    """Trainable numbers."""

    data_name: str
    """Of the data set."""

    splits: Mapping[str, int]
    """Samples of each split by its name."""

    data_digest: str
    """SHA-256 of all samples and labels."""

    skipped_rows: int
    """Bad rows that were left out."""

    recipe: Mapping[str, Any]
    """As resolved, in sections."""

    epochs: int
    """That were trained."""

    weights_epoch: int
    """Whose weights were kept."""

    optimizer: str
    """In words, such as "AdamW, learning rate 0.003, weight decay 0.01"."""

    schedule: str
    """In words, such as "one cycle, warm-up 25 % of the steps"."""

    precision: str
    """Of the training's arithmetic, such as "bf16"."""

    seed: int
    """That ruled everything random."""

    device: str
    """Where it was trained."""

    seconds: float
    """How long that took."""

    report: ClassificationReport
    """How well it does on the held-out split."""

    git_revision: str | None
    """Of torchport's source; None outside a repository."""

    versions: Mapping[str, str]
    """Of what decides the result."""

    command: str
    """Trains it again."""

    limits: Sequence[str] = ()
    """What else the model should not be trusted with, a sentence each."""


def render_model_card(card: ModelCard) -> str:
    """Writes the card in GitHub's Markdown; the same card gives the same text."""
    sections = [
        f"# {_text(card.name)}",
        _summary(card),
        "## Architecture",
        _architecture(card),
        "## Data",
        _data(card),
        "## Training",
        _training(card),
        "## Results",
        _results(card.report),
        "## Reproducibility",
        _reproducibility(card),
        "## Limits",
        _limits(card),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(card: ModelCard) -> str:
    names = ", ".join(_text(name) for name in card.class_names)
    return (
        f"A model for {_text(card.task)} that tells {len(card.class_names)} classes apart: {names}. "
        f"On held-out samples it is right {card.report.accuracy:.2%} of the time."
    )


def _architecture(card: ModelCard) -> str:
    facts = [("Model", _code(card.architecture)), ("Trainable parameters", f"{card.parameters:,}")]
    options = [(_code(key), _code(_json(value))) for key, value in card.model_config.items()]
    return _table(("", ""), facts) + "\n\n" + _table(("Option", "Value"), options)


def _data(card: ModelCard) -> str:
    splits = [(f"Samples, {_text(name.replace('_', '-'))}", f"{count:,}") for name, count in card.splits.items()]
    return _table(
        ("", ""),
        [
            ("Data set", _text(card.data_name)),
            *splits,
            ("Skipped rows", f"{card.skipped_rows:,}"),
            ("SHA-256", _code(card.data_digest)),
        ],
    )


def _training(card: ModelCard) -> str:
    facts = [
        ("Epochs", f"{card.epochs}, weights of epoch {card.weights_epoch}"),
        ("Optimizer", _text(card.optimizer)),
        ("Schedule", _text(card.schedule)),
        ("Precision", _text(card.precision)),
        ("Seed", str(card.seed)),
        ("Device", _text(card.device)),
        ("Time", f"{card.seconds:,.1f} s"),
    ]
    return _table(("", ""), facts) + "\n\nThe recipe:\n\n" + _block(_json(card.recipe, indent=2), language="json")


def _results(report: ClassificationReport) -> str:
    totals = [
        ("Accuracy", f"{report.accuracy:.4f}"),
        ("Macro F1", f"{report.macro_f1:.4f}"),
        ("Weighted F1", f"{report.weighted_f1:.4f}"),
        ("Loss", f"{report.loss:.4f} nats"),
        ("Samples", f"{report.samples:,}"),
    ]
    classes = [
        (
            _text(entry.name),
            f"{entry.precision:.4f}",
            f"{entry.recall:.4f}",
            f"{entry.f1:.4f}",
            f"{entry.support:,}",
        )
        for entry in report.classes
    ]
    return "\n\n".join(
        [
            "Measured on the held-out split, which neither the weights nor the choice of the epoch have seen.",
            _table(("", ""), totals),
            _table(("Class", "Precision", "Recall", "F1", "Samples"), classes),
            _confusion(report),
        ]
    )


def _confusion(report: ClassificationReport) -> str:
    if len(report.classes) > _MAX_CONFUSION_CLASSES:
        return f"The confusion matrix of {len(report.classes)} classes is in `run.json`."
    names = [_text(entry.name) for entry in report.classes]
    rows = [
        (f"**{name}**", *(f"{count:,}" for count in row)) for name, row in zip(names, report.confusion, strict=True)
    ]
    return "Confusions; a row is a true class, a column a predicted one:\n\n" + _table(("", *names), rows)


def _reproducibility(card: ModelCard) -> str:
    facts = [
        ("Source", _code(card.git_revision) if card.git_revision else "not from a repository"),
        *((_text(name), _text(version)) for name, version in card.versions.items()),
    ]
    return (
        _block(card.command, language="sh")
        + "\n\nThe same recipe, data, versions and kind of device give the same weights.\n\n"
        + _table(("", ""), facts)
    )


def _limits(card: ModelCard) -> str:
    weakest = min(card.report.classes, key=lambda entry: entry.f1)
    limits = [
        f"The results hold for samples like the {card.report.samples:,} held-out ones of {_text(card.data_name)}; "
        "on other data, measure first.",
        "Every input gets one of the classes above, also one that belongs to none of them.",
        "Its probabilities were not calibrated.",
        f"It is weakest at {_text(weakest.name)}, with an F1 of {weakest.f1:.4f} on {weakest.support:,} samples.",
        *(_text(limit) for limit in card.limits),
    ]
    return "\n".join(f"- {limit}" for limit in limits)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(value: str) -> str:
    """Takes the meaning from what Markdown or a table would read as more than text."""
    words = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", words)


def _code(value: str) -> str:
    """A code span, which a table still cuts at a pipe."""
    words = " ".join(str(value).split()).replace("|", r"\|")
    if "`" not in words:
        return f"`{words}`"
    fence = _fence(words, shortest=2)
    return f"{fence} {words} {fence}"


def _block(content: str, *, language: str) -> str:
    fence = _fence(content, shortest=3)
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"


def _fence(content: str, *, shortest: int) -> str:
    """More backticks in a row than the content has."""
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    return "`" * max(shortest, longest + 1)


def _json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str)
