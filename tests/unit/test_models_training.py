"""Whole trainings: accuracy, equal bytes, exact resume, and run folders that survive anything."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from models import session
from models.assembly import build_dataset
from models.checkpoint import load_checkpoint, load_model_for_inference
from models.digits import evaluation_samples
from models.distributed import Processes
from models.errors import CheckpointCorruptError, RecipeError, ResumeError, RunFolderError, TrainingDivergedError
from models.evaluation import ClassificationReport, ClassReport
from models.provenance import git_revision
from models.recipe import Recipe, load_recipe
from models.session import EpochReport, Session
from models.training import Observer, train

REPOSITORY = Path(__file__).parents[2]
TINY = ["model.widths=[4]", "model.blocks_per_stage=1", "trainer.batch_size=128", "trainer.epochs=4"]


def tiny(*overrides: str) -> Recipe:
    return load_recipe("digits", [*TINY, *overrides])


class Interrupted(Exception):
    """Stands in for a crash."""


def train_until(epoch: int, recipe: Recipe, run_dir: Path) -> None:
    """Trains and crashes after `epoch`."""

    def crash(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(recipe, run_dir, observer=Observer(on_epoch=crash))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("reference")
    train(tiny(), run_dir)
    return run_dir


def metrics_epochs(run_dir: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_short_training_of_the_built_in_recipe_reads_digits(tmp_path: Path) -> None:
    result = train(load_recipe("digits", ["trainer.epochs=6"]), tmp_path)

    assert result.accuracy >= 0.97
    assert result.samples == 360


def test_the_checkpoint_says_what_its_weights_do(reference: Path) -> None:
    """Its metrics, recomputed from nothing but the file, as export will."""
    checkpoint = load_checkpoint(reference / "checkpoint.pt")
    model = load_model_for_inference(reference / "checkpoint.pt")
    prepare = checkpoint.signature["preprocessing"]["image"]
    correct = total = 0
    for image, label in evaluation_samples(**checkpoint.evaluation["options"]):
        x = (torch.from_numpy(image).float() / 255 - prepare["mean"][0]) / prepare["std"][0]
        correct += int(model(x[None, None]).argmax()) == label
        total += 1

    assert checkpoint.evaluation["source"] == "models.digits:evaluation_samples"
    assert checkpoint.evaluation["options"]["split"] == "held_out"
    assert checkpoint.metrics["samples"] == total == 360
    assert checkpoint.metrics["accuracy"] == correct / total
    assert checkpoint.recipe == tiny().as_dict()
    assert set(checkpoint.versions) == {"python", "torch", "torchport"}


def test_the_validation_split_chooses_the_checkpoint(reference: Path) -> None:
    lines = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: (line["validation"]["accuracy"], -line["validation"]["loss"]))

    assert load_checkpoint(reference / "checkpoint.pt").epoch == best["epoch"]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert all(line["train"]["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize(("final_weights", "epoch"), [("best", 3), ("last", 4)])
def test_the_recipe_chooses_whose_weights_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, final_weights: str, epoch: int
) -> None:
    accuracies = iter([0.2, 0.9, 0.9, 0.5, 0.1])  # four validations and the held-out split
    losses = iter([1.0, 0.6, 0.5, 0.1, 0.0])
    monkeypatch.setattr(
        Session,
        "_evaluate",
        lambda self, loader: ClassificationReport(
            accuracy=next(accuracies),
            loss=next(losses),
            samples=1,
            macro_f1=0.0,
            weighted_f1=0.0,
            classes=tuple(
                ClassReport(name=str(index), precision=0.0, recall=0.0, f1=0.0, support=0) for index in range(10)
            ),
            confusion=((0,) * 10,) * 10,
        ),
    )

    weights: list[torch.Tensor] = []

    def remember(report: EpochReport) -> None:
        weights.append(load_checkpoint(tmp_path / "last.pt").state_dict["classifier.weight"])

    recipe = tiny(f"trainer.final_weights={final_weights}")
    result = train(recipe, tmp_path, observer=Observer(on_epoch=remember))

    assert result.weights_epoch == epoch
    assert result.accuracy == 0.1
    kept = load_checkpoint(result.checkpoint_path).state_dict["classifier.weight"]
    assert [torch.equal(kept, weight) for weight in weights] == [number == epoch for number in (1, 2, 3, 4)]


def test_the_same_recipe_gives_the_same_bytes_in_any_folder(reference: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # the caller's generators do not matter
    train(tiny(), tmp_path / "some" / "where")

    assert (tmp_path / "some" / "where" / "checkpoint.pt").read_bytes() == (reference / "checkpoint.pt").read_bytes()


def test_the_seed_changes_the_weights(reference: Path, tmp_path: Path) -> None:
    train(tiny("seed=1"), tmp_path)

    weights = [load_checkpoint(run / "checkpoint.pt").state_dict["classifier.weight"] for run in (reference, tmp_path)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_a_resumed_run_ends_with_the_same_bytes(reference: Path, tmp_path: Path, epoch: int) -> None:
    train_until(epoch, tiny(), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5}\n{"epo')  # an epoch that last.pt does not know, and a torn line

    result = train(tiny(), tmp_path, resume=True)

    assert result.resumed_after_epoch == epoch
    assert (tmp_path / "checkpoint.pt").read_bytes() == (reference / "checkpoint.pt").read_bytes()
    assert metrics_epochs(tmp_path) == [1, 2, 3, 4]


def test_a_finished_run_resumes_to_itself(reference: Path) -> None:
    before = (reference / "checkpoint.pt").read_bytes()

    result = train(tiny(), reference, resume=True)

    assert result.resumed_after_epoch == 4
    assert (reference / "checkpoint.pt").read_bytes() == before
    assert metrics_epochs(reference) == [1, 2, 3, 4]


def test_resume_without_a_last_checkpoint_starts_from_the_beginning(reference: Path, tmp_path: Path) -> None:
    result = train(tiny(), tmp_path, resume=True)

    assert result.resumed_after_epoch == 0
    assert (tmp_path / "checkpoint.pt").read_bytes() == (reference / "checkpoint.pt").read_bytes()


def test_resume_with_another_recipe_names_what_differs(tmp_path: Path) -> None:
    train_until(1, tiny(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    with pytest.raises(ResumeError, match=r"started with trainer\.epochs = 4, and the recipe now says 5"):
        train(tiny("trainer.epochs=5"), tmp_path, resume=True)

    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resume_from_a_damaged_file_says_so(tmp_path: Path) -> None:
    train_until(1, tiny(), tmp_path)
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])

    with pytest.raises(CheckpointCorruptError, match=r"last\.pt is truncated"):
        train(tiny(), tmp_path, resume=True)


def test_last_pt_is_a_checkpoint_of_the_latest_epoch(tmp_path: Path) -> None:
    train_until(2, tiny(), tmp_path)

    last = load_checkpoint(tmp_path / "last.pt")

    assert last.epoch == 2
    assert last.evaluation["options"]["split"] == "validation"
    assert last.metrics["samples"] == 144
    assert last.training is not None
    load_model_for_inference(tmp_path / "last.pt")


def test_an_earlier_run_stays_until_the_new_one_is_finished(tmp_path: Path) -> None:
    train(tiny(), tmp_path)
    old = (tmp_path / "checkpoint.pt").read_bytes()

    train_until(2, tiny("seed=1"), tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == old

    train(tiny("seed=1"), tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pt").recipe["seed"] == 1
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.pt",
        "checkpoint.pt",
        "last.pt",
        "metrics.jsonl",
        "model_card.md",
        "recipe.yaml",
        "run.json",
        "tensorboard",
    ]


def test_a_folder_in_use_is_refused(reference: Path, tmp_path: Path) -> None:
    def intrude(report: EpochReport) -> None:
        with pytest.raises(RunFolderError, match="Another training is writing to"):
            train(tiny("seed=1"), tmp_path)

    train(tiny(), tmp_path, observer=Observer(on_epoch=intrude))

    assert (tmp_path / "checkpoint.pt").read_bytes() == (reference / "checkpoint.pt").read_bytes()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")

    with pytest.raises(RunFolderError, match=r"taken cannot be used \(File exists\)"):
        train(tiny(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"trainer\.batch_size is 5000, and the training split has 1293 samples"):
        train(tiny("trainer.batch_size=5000"), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "world_size", "remedy"),
    [
        (["trainer.batch_size=4", "trainer.accumulation=4"], 1, "raise trainer.batch_size to 8"),
        (["trainer.batch_size=2"], 2, "raise trainer.batch_size to 4"),
        (["trainer.batch_size=8", "trainer.accumulation=4"], 1, None),
    ],
)
def test_parts_of_one_sample_are_too_small_for_batch_normalisation(
    overrides: list[str], world_size: int, remedy: str | None
) -> None:
    recipe = tiny(*overrides)
    if remedy is None:
        Session(recipe, build_dataset(recipe), torch.device("cpu"))
        return
    with pytest.raises(RecipeError, match=remedy):
        Session(recipe, build_dataset(recipe), torch.device("cpu"), processes=Processes(world_size=world_size))


def test_the_validation_loader_lasts_for_the_whole_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    build = session.build_loader

    def count(split, *arguments, **options):  # type: ignore[no-untyped-def]
        sizes.append(len(split))
        return build(split, *arguments, **options)

    monkeypatch.setattr(session, "build_loader", count)

    train(tiny(), tmp_path)

    assert sorted(sizes) == [144, 360, 1293]  # four epochs, and one loader for each split


def test_a_training_that_diverges_writes_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match=r"lower optimizer\.learning_rate"):
        train(tiny("optimizer.learning_rate=1e38", "trainer.epochs=20"), tmp_path)

    assert not (tmp_path / "checkpoint.pt").exists()


def test_source_outside_a_repository_has_no_revision(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None


def test_the_revision_names_the_commit_and_its_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "code.py").write_text("a")
    git("add", "code.py")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD")

    assert git_revision(tmp_path) == commit
    (tmp_path / "code.py").write_text("b")
    assert git_revision(tmp_path) == f"{commit}-dirty"
    (tmp_path / "site-packages").mkdir()
    assert git_revision(tmp_path / "site-packages") is None


STEPPED_TRAININGS = """
import itertools, sys
from pathlib import Path
from models.recipe import load_recipe
from models.training import Observer, train

def wait_for_leave(report):
    print(report.epoch, flush=True)
    sys.stdin.readline()

for seed in itertools.cycle([0, 1]):
    recipe = load_recipe("digits", [*sys.argv[2:], f"seed={seed}"])
    train(recipe, Path(sys.argv[1]), observer=Observer(on_epoch=wait_for_leave))
"""


def kill_after(process: subprocess.Popen[bytes], *, epochs: int, delay_s: float) -> None:
    """Lets the process train on after each of `epochs` epochs, and kills it a moment after the last of them."""
    assert process.stdin is not None
    assert process.stdout is not None
    for _ in range(epochs):
        assert process.stdout.readline(), "the training ended by itself"
        process.stdin.write(b"\n")
        process.stdin.flush()
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of processes that trained seed 0 (four epochs), seed 1, seed 0, ... until SIGKILL."""
    folders = [tmp_path_factory.mktemp("killed") for _ in range(3)]
    command = [sys.executable, "-c", STEPPED_TRAININGS]
    processes = [
        subprocess.Popen([*command, str(folder), *TINY], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for folder in folders
    ]
    try:
        kill_after(processes[0], epochs=1, delay_s=0.02)  # in the second epoch of the first training
        kill_after(processes[1], epochs=4, delay_s=0.01)  # as the first checkpoint.pt is about to be written
        kill_after(processes[2], epochs=8, delay_s=0.01)  # as the second one is about to replace it
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return folders


def test_a_killed_training_leaves_no_checkpoint_the_old_or_the_new(
    killed_runs: list[Path], reference: Path, tmp_path: Path
) -> None:
    train(tiny("seed=1"), tmp_path)
    whole = {(run / "checkpoint.pt").read_bytes() for run in (reference, tmp_path)}

    for folder in killed_runs:
        if (folder / "checkpoint.pt").exists():
            assert (folder / "checkpoint.pt").read_bytes() in whole
        if (folder / "last.pt").exists():  # the training after a finished one removes it when it starts
            load_checkpoint(folder / "last.pt")
    assert not (killed_runs[0] / "checkpoint.pt").exists()
    assert (killed_runs[2] / "checkpoint.pt").exists()


def test_a_killed_training_resumes_to_the_same_bytes(killed_runs: list[Path], reference: Path) -> None:
    folder = killed_runs[0]
    (folder / ".last.pt.99999.part").write_bytes(b"half")  # what a kill in mid-write leaves

    result = train(tiny(), folder, resume=True)

    assert result.resumed_after_epoch >= 1
    assert (folder / "checkpoint.pt").read_bytes() == (reference / "checkpoint.pt").read_bytes()
    assert not list(folder.glob(".*"))
