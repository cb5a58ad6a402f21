"""What a model card says, and that no name can break it."""

import dataclasses
import re

import pytest
import torch

from models.evaluation import ClassificationReport, ConfusionMatrix
from models.model_card import ModelCard, render_model_card


def report(names: tuple[str, ...] = ("billing", "login", "other")) -> ClassificationReport:
    matrix = ConfusionMatrix(names)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    matrix.update(torch.eye(len(names))[torch.tensor([0, 0, 1, 1, 1, 0])] * 3, labels)
    return matrix.report()


def card(**changes: object) -> ModelCard:
    values = ModelCard(
        name="tickets",
        task="text-classification",
        class_names=("billing", "login", "other"),
        architecture="models.text_encoder:build_text_classifier",
        model_config={"hidden_size": 64, "widths": [1, 2]},
        parameters=1234567,
        data_name="tickets",
        splits={"train": 1000, "validation": 100, "held_out": 6},
        data_digest="ab" * 32,
        skipped_rows=3,
        recipe={"name": "tickets", "trainer": {"epochs": 5}},
        epochs=5,
        weights_epoch=4,
        optimizer="AdamW, learning rate 0.003",
        schedule="one cycle",
        precision="bf16",
        seed=17,
        device="cpu",
        seconds=12.34,
        report=report(),
        git_revision="0123abcd",
        versions={"torch": "2.13.0", "torchport": "0.1.0"},
        command="torchport train tickets -s seed=17",
        limits=("Only English was seen.",),
    )
    return dataclasses.replace(values, **changes)  # type: ignore[arg-type]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows, as GitHub cuts them: at pipes without a backslash."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_card_says_everything() -> None:
    text = render_model_card(card())

    assert text.startswith("# tickets\n\nA model for text-classification that tells 3 classes apart: billing, login,")
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings == ["Architecture", "Data", "Training", "Results", "Reproducibility", "Limits"]
    cells = rows(text)
    for row in (
        ["Model", "`models.text_encoder:build_text_classifier`"],
        ["Trainable parameters", "1,234,567"],
        ["`hidden_size`", "`64`"],
        ["`widths`", "`[1, 2]`"],
        ["Data set", "tickets"],
        ["Samples, train", "1,000"],
        ["Samples, held-out", "6"],
        ["Skipped rows", "3"],
        ["SHA-256", f"`{'ab' * 32}`"],
        ["Epochs", "5, weights of epoch 4"],
        ["Optimizer", "AdamW, learning rate 0.003"],
        ["Schedule", "one cycle"],
        ["Precision", "bf16"],
        ["Seed", "17"],
        ["Device", "cpu"],
        ["Time", "12.3 s"],
        ["Accuracy", "0.6667"],
        ["Macro F1", "0.4889"],
        ["billing", "0.6667", "0.6667", "0.6667", "3"],
        ["login", "0.6667", "1.0000", "0.8000", "2"],
        ["other", "0.0000", "0.0000", "0.0000", "1"],
        ["", "billing", "login", "other"],
        ["**billing**", "2", "1", "0"],
        ["**other**", "1", "0", "0"],
        ["Source", "`0123abcd`"],
        ["torch", "2.13.0"],
    ):
        assert row in cells
    assert '"epochs": 5' in text
    assert "```sh\ntorchport train tickets -s seed=17\n```" in text
    assert "- The results hold for samples like the 6 held-out ones of tickets" in text
    assert "- It is weakest at other, with an F1 of 0.0000 on 1 samples." in text
    assert "- Only English was seen.\n" in text


def test_the_same_card_gives_the_same_text() -> None:
    assert render_model_card(card()) == render_model_card(card())


def test_source_outside_a_repository_is_said_so() -> None:
    assert ["Source", "not from a repository"] in rows(render_model_card(card(git_revision=None)))


@pytest.mark.parametrize(
    "evil", ["a|b", "a\nb", "a\r\n| b |", "# a", "`a`", "<script>", "[a](b)", "a\\|b", "*a*", "~a~"]
)
def test_no_class_name_breaks_the_tables(evil: str) -> None:
    names = (evil, "login", "other")
    text = render_model_card(
        card(class_names=names, report=report(names), model_config={evil: evil}, data_name=evil, name=evil)
    )
    plain = rows(render_model_card(card(model_config={"x": "x"})))

    assert [len(row) for row in rows(text)] == [len(row) for row in plain]
    assert len(re.findall(r"^#+ ", text, flags=re.MULTILINE)) == 7
    assert not re.search(r"(?<![\\`])<script>", re.sub(r"`[^`]*`|```.*?```", "", text, flags=re.DOTALL))


def test_backticks_do_not_end_a_block() -> None:
    text = render_model_card(card(command="echo '```'\n# not a heading"))

    assert "````sh\necho '```'\n# not a heading\n````" in text


def test_a_large_confusion_matrix_is_left_out() -> None:
    names = tuple(f"class {number}" for number in range(21))

    text = render_model_card(card(class_names=names, report=report(names)))

    assert "The confusion matrix of 21 classes is in `run.json`." in text
    assert max(len(row) for row in rows(text)) == 5
