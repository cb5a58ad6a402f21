"""Early stopping, kept epochs, and trackers: what a training does between its epochs."""

from pathlib import Path

import pytest

from models.checkpoint import load_checkpoint
from models.recipe import load_recipe
from models.runs import read_run
from models.session import EpochReport
from models.training import Observer, train

TINY = ["model.widths=[4]", "model.blocks_per_stage=1", "trainer.batch_size=128"]


def test_a_training_without_progress_stops_early(tmp_path: Path) -> None:
    # A learning rate too small to change any prediction.
    recipe = load_recipe(
        "digits", [*TINY, "trainer.epochs=30", "trainer.early_stopping=2", "optimizer.learning_rate=1e-12"]
    )
    reports: list[EpochReport] = []

    result = train(recipe, tmp_path, observer=Observer(on_epoch=reports.append))

    assert result.epochs < 30
    assert result.epochs == result.weights_epoch + 2
    assert [report.improved for report in reports][-2:] == [False, False]
    assert read_run(tmp_path).epochs == result.epochs


def test_only_the_weights_epochs_are_kept(tmp_path: Path) -> None:
    recipe = load_recipe("digits", [*TINY, "trainer.epochs=6", "trainer.keep_epochs=2"])
    reports: list[EpochReport] = []

    train(recipe, tmp_path, observer=Observer(on_epoch=reports.append))

    ranked = sorted(reports, key=lambda report: (report.validation.accuracy, -report.validation.loss), reverse=True)
    best = {report.epoch for report in ranked[:2]}
    assert {path.name for path in tmp_path.glob("epoch-*.pt")} == {f"epoch-{epoch}.pt" for epoch in best}
    for epoch in best:
        kept = load_checkpoint(tmp_path / f"epoch-{epoch}.pt")
        assert kept.epoch == epoch
        assert kept.evaluation["options"]["split"] == "validation"


def test_a_profile_lies_in_the_run_folder(tmp_path: Path) -> None:
    train(load_recipe("digits", [*TINY, "trainer.epochs=2"]), tmp_path, profile=True)

    assert "aten::convolution" in (tmp_path / "profile" / "table.txt").read_text()
    assert (tmp_path / "profile" / "trace.json").stat().st_size > 1000


def test_wandb_records_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")

    train(load_recipe("digits", [*TINY, "trainer.epochs=1", "tracking.wandb_project=digits"]), tmp_path)

    assert list((tmp_path / "wandb").glob("offline-run-*"))
