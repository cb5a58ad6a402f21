"""A training killed at any moment resumes to the same bits: text and images, inside an epoch too."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.checkpoint import load_checkpoint, save_checkpoint
from models.errors import CheckpointFormatError, ResumeError
from models.recipe import Recipe, load_recipe
from models.run_folder import RunFolder
from models.session import EpochReport
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


def train_until_epoch(epoch: int, recipe: Recipe, run_dir: Path) -> None:
    def crash(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(recipe, run_dir, observer=Observer(on_epoch=crash))


@pytest.fixture(scope="module", params=sorted(RECIPES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp(f"reference-{kind}")
    train(recipe_for(kind), folder)
    return folder


def last_without_time(run: Path) -> bytes:
    """The bytes of a last.pt but for when and how long it was trained."""
    last = load_checkpoint(run / "last.pt")
    training = {key: value for key, value in (last.training or {}).items() if key not in ("started_at", "seconds")}
    save_checkpoint(replace(last, training=training), run / "untimed.pt")
    content = (run / "untimed.pt").read_bytes()
    (run / "untimed.pt").unlink()
    return content


def same_end(run: Path, reference: Path) -> bool:
    last, expected = (last_without_time(folder) for folder in (run, reference))
    return last == expected and (run / "checkpoint.pt").read_bytes() == (reference / "checkpoint.pt").read_bytes()


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
    for name in ("last.pt", "best.pt", "epoch-7.pt", "diverged.pt", "diverged-1.pt"):
        (tmp_path / name).write_bytes(b"old")

    run.start({"name": "new"}, {}, after_epoch=None)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "recipe.yaml"]


def test_a_resume_inside_the_first_epoch_keeps_what_it_resumes(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"present")

    RunFolder(tmp_path).start({"name": "same"}, {}, after_epoch=0)

    assert (tmp_path / "last.pt").read_bytes() == b"present"


def test_a_training_from_the_start_is_not_taken_for_the_earlier_one(tmp_path: Path) -> None:
    recipe = recipe_for("image")
    train_until_step(4, recipe, tmp_path)
    changed = load_recipe("digits", [*RECIPES["image"][1:], "trainer.threads=1", "seed=9"])
    train_until_step(1, changed, tmp_path)  # before its first save

    result = train(changed, tmp_path, resume=True)

    assert result.resumed_after_epoch == 0


TEXTS = """name: texts
data: {name: text, train: FILE, tokenizer: {vocab_size: 300}}
model: {hidden_dim: 16, num_layers: 1, num_heads: 2, intermediate_dim: 16}
trainer: {epochs: 2, batch_size: 8, threads: 1}
"""


def test_data_that_changed_is_not_resumed_with(tmp_path: Path) -> None:
    table, run = tmp_path / "texts.csv", tmp_path / "run"
    rows = [f"a {'good' if number % 2 else 'bad'} text {number},{number % 2}" for number in range(60)]
    table.write_text("\n".join(["text,label", *rows]))
    path = tmp_path / "texts.yaml"
    path.write_text(TEXTS.replace("FILE", str(table)))
    recipe = load_recipe(str(path))
    train_until_epoch(1, recipe, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    table.write_text("\n".join(["text,label", rows[0].replace("text 0", "text 7"), *rows[1:]]))

    with pytest.raises(ResumeError, match=r"The data has changed since .*run was started; restore it, or train into"):
        train(recipe, run, resume=True)

    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    table.write_text("\n".join(["text,label", *rows]))
    assert train(recipe, run, resume=True).resumed_after_epoch == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"files": {"tokenizer.json": "{}"}}, ResumeError, "The tokenizer.json has changed since"),
        ({"training": {}}, CheckpointFormatError, "does not say data_digest; train again without --resume"),
    ],
)
def test_a_last_pt_of_another_torchport_is_refused(
    tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    recipe = recipe_for("text")
    train_until_step(2, recipe, tmp_path)
    last = load_checkpoint(tmp_path / "last.pt")
    assert last.training is not None
    if "training" in change:
        change = {"training": {key: value for key, value in last.training.items() if key != "data_digest"}}
    save_checkpoint(replace(last, **change), tmp_path / "last.pt")  # type: ignore[arg-type]

    with pytest.raises(error, match=message):
        train(recipe, tmp_path, resume=True)


def test_the_time_before_a_resume_counts(tmp_path: Path) -> None:
    recipe = recipe_for("image")
    train_until_step(4, recipe, tmp_path)
    last = load_checkpoint(tmp_path / "last.pt")
    assert last.training is not None
    assert 0 < last.training["seconds"] < 60
    earlier = {"started_at": "2020-01-01T00:00:00+00:00", "seconds": 1000.0}
    save_checkpoint(replace(last, training={**last.training, **earlier}), tmp_path / "last.pt")

    result = train(recipe, tmp_path, resume=True)

    facts = json.loads((tmp_path / "run.json").read_text())
    assert 1000 < result.seconds < 1060
    assert facts["started_at"] == "2020-01-01T00:00:00+00:00"
    assert 1000 < facts["seconds"] < 1060
