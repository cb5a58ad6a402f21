"""NaN and infinity: the training stops at once and leaves what is needed to find out why."""

from pathlib import Path

import pytest
import torch

from models import session
from models.batch import Batch
from models.errors import TrainingDivergedError
from models.recipe import load_recipe
from models.training import train


@pytest.fixture
def poisoned_sample(monkeypatch: pytest.MonkeyPatch) -> int:
    """One training image holds a NaN."""
    poisoned = 77
    build = session.build_loader

    def build_with_nan(split, sampler, collate, **options):  # type: ignore[no-untyped-def]
        def collate_with_nan(samples):  # type: ignore[no-untyped-def]
            batch: Batch = collate(samples)
            if isinstance(sampler, session.TrainingSampler):
                batch.inputs["image"][batch.ids == poisoned] = float("nan")
            return batch

        return build(split, sampler, collate_with_nan, **options)

    monkeypatch.setattr(session, "build_loader", build_with_nan)
    return poisoned


def test_a_nan_is_dumped_with_its_step_and_samples(poisoned_sample: int, tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["model.widths=[4]", "trainer.epochs=2", "trainer.batch_size=64"])

    with pytest.raises(TrainingDivergedError) as caught:
        train(recipe, tmp_path)

    dump = torch.load(tmp_path / "diverged.pt", weights_only=True)
    assert f"at step {dump['step']}," in str(caught.value)
    assert "places in the training split, counted from 0" in str(caught.value)
    assert str(tmp_path / "diverged.pt") in str(caught.value)
    assert dump["step"] == caught.value.step
    assert poisoned_sample in dump["ids"].tolist()
    assert len(dump["ids"]) == len(dump["labels"]) == 64
    assert dump["inputs"]["image"][dump["ids"] == poisoned_sample].isnan().all()
    assert all(tensor.isfinite().all() for name, tensor in dump["state_dict"].items() if "running" not in name)
    assert dump["recipe"] == recipe.as_dict()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_later_training_removes_the_dump(
    poisoned_sample: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("digits", ["model.widths=[4]", "trainer.epochs=1"])
    with pytest.raises(TrainingDivergedError):
        train(recipe, tmp_path)
    monkeypatch.undo()

    train(recipe, tmp_path)

    assert not (tmp_path / "diverged.pt").exists()
