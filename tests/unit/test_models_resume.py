"""A training killed at any moment resumes to the same bits: text and images, inside an epoch too."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models.checkpoint import load_checkpoint
from models.errors import ResumeError
from models.recipe import Recipe, load_recipe
from models.run_folder import RunFolder
from models.trainer import StepMetrics
from models.training import Observer, train

KILLS = 3  # of each kind here; benchmarks/kill_and_resume.py does twenty
RECIPES = {
    "image": ["digits", "model.widths=[4]", "model.blocks_per_stage=1", "trainer.batch_size=128", "trainer.epochs=3"],
    "text": [
        "tickets",
        "data.count=400",
        "model.hidden_dim=16",
        "model.num_layers=1",
        "model.intermediate_dim=16",
        "trainer.epochs=2",
        "trainer.batch_size=32",
        "trainer.early_stopping=null",
        "trainer.keep_epochs=1",
    ],
}


def recipe_for(kind: str) -> Recipe:
    name, *overrides = RECIPES[kind]
    return load_recipe(name, [*overrides, "trainer.save_every_steps=2", "trainer.threads=1"])


class Interrupted(Exception):
    """Stands in for a crash."""


def train_until_step(step: int, recipe: Recipe, run_dir: Path) -> None:
    def crash(metrics: StepMetrics) -> None:
        if metrics.step == step:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(recipe, run_dir, observer=Observer(on_step=crash))


@pytest.fixture(scope="module", params=sorted(RECIPES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp(f"reference-{kind}")
    train(recipe_for(kind), folder)
    return folder


def same_end(run: Path, reference: Path) -> bool:
    return all((run / name).read_bytes() == (reference / name).read_bytes() for name in ("checkpoint.pt", "last.pt"))


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8, 9])
def test_a_training_interrupted_inside_an_epoch_ends_with_the_same_bytes(
    kind: str, reference: Path, tmp_path: Path, step: int
) -> None:
    train_until_step(step, recipe_for(kind), tmp_path)

    result = train(recipe_for(kind), tmp_path, resume=True)

    assert same_end(tmp_path, reference)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, result.epochs + 1)
    )


def test_a_resumed_training_does_not_repeat_what_was_saved(kind: str, tmp_path: Path) -> None:
    train_until_step(4, recipe_for(kind), tmp_path)
    steps: list[int] = []

    train(recipe_for(kind), tmp_path, resume=True, observer=Observer(on_step=lambda step: steps.append(step.step)))

    # The crash at step 4 came after its save.
    assert steps[0] == 5
    saved = load_checkpoint(tmp_path / "last.pt").training
    assert saved is not None
    assert saved["trainer"]["steps"] == steps[-1]


def test_a_kill_at_any_moment_is_resumed_to_the_same_bytes(kind: str, reference: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    name, *overrides = RECIPES[kind]
    settings = [
        word
        for override in [*overrides, "trainer.save_every_steps=2", "trainer.threads=1"]
        for word in ("-s", override)
    ]
    command = [sys.executable, "-m", "torchport", "train", name, *settings, "--out", str(tmp_path), "--resume"]
    root = Path(__file__).parents[2]
    for _ in range(KILLS):
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (tmp_path / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()

    subprocess.run(command, cwd=root, check=True, capture_output=True)

    assert same_end(tmp_path, reference)
    assert not list(tmp_path.glob(".*.part"))


def test_another_number_of_processes_is_not_the_same_training(reference: Path, tmp_path: Path) -> None:
    last = load_checkpoint(reference / "last.pt")
    assert last.training is not None
    content = torch.load(reference / "last.pt", weights_only=True)
    content["training"]["rng"] = content["training"]["rng"] * 2
    torch.save(content, tmp_path / "last.pt")

    with pytest.raises(ResumeError, match="was started with 2 processes, and now there are 1; resume with --nproc 2"):
        train(Recipe.model_validate(last.recipe), tmp_path, resume=True)


def test_the_run_folder_says_what_was_trained(reference: Path, kind: str) -> None:
    facts = json.loads((reference / "run.json").read_text())
    checkpoint = load_checkpoint(reference / "checkpoint.pt")

    assert facts["state"] == "finished"
    assert facts["data"]["name"] == {"image": "digits", "text": "tickets"}[kind]
    assert len(facts["data"]["digest"]) == 64
    assert facts["result"]["accuracy"] == checkpoint.metrics["accuracy"]
    assert facts["result"]["weights_epoch"] == checkpoint.epoch
    assert len(facts["result"]["confusion"]) == len(checkpoint.signature["labels"])
    assert facts["versions"] == checkpoint.versions
    assert facts["git_revision"] == checkpoint.git_revision
    card = (reference / "model_card.md").read_text()
    assert f"{checkpoint.metrics['accuracy']:.4f}" in card
    assert facts["data"]["digest"] in card
    assert list((reference / "tensorboard").glob("events.out.tfevents.*"))
    kept = [path.name for path in reference.glob("epoch-*.pt")]
    assert kept == {"image": [], "text": [f"epoch-{checkpoint.epoch}.pt"]}[kind]
    best = load_checkpoint(reference / "best.pt")
    assert best.epoch == checkpoint.epoch
    assert all(torch.equal(best.state_dict[name], tensor) for name, tensor in checkpoint.state_dict.items())


def test_a_text_checkpoint_holds_its_tokenizer(tmp_path: Path) -> None:
    train(recipe_for("text"), tmp_path)

    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")

    assert checkpoint.files["tokenizer.json"].encode() == (tmp_path / "tokenizer.json").read_bytes()
    assert checkpoint.signature["preprocessing"]["text"]["tokenizer"] == "tokenizer.json"


def test_an_earlier_training_leaves_no_checkpoints_of_its_epochs(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in ("best.pt", "epoch-7.pt", "diverged.pt"):
        (tmp_path / name).write_bytes(b"old")

    run.start({"name": "new"}, {}, after_epoch=0)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "recipe.yaml"]
