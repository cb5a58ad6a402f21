"""Several processes train as one would: the same losses, one run folder, one clear error."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from torch import nn

from models.assembly import build_dataset
from models.checkpoint import load_checkpoint
from models.distributed import ALONE, Processes, read_processes
from models.errors import LaunchError
from models.launch import train_in_processes
from models.recipe import Recipe, load_recipe
from models.reproducibility import reproducible
from models.session import Session
from models.training import train

# Layer norm and no dropout: what differs between one process and two is the order of sums alone.
EQUAL = [
    "model.dropout=0.0",
    "model.hidden_dim=16",
    "model.intermediate_dim=16",
    "data.count=1000",
    "trainer.batch_size=24",
    "trainer.epochs=2",
    "trainer.threads=1",
]


def tickets(*overrides: str) -> Recipe:
    return load_recipe("tickets", [*EQUAL, *overrides])


# In processes of their own, for the losses of each step: the launcher returns the result of a whole training.
LOSSES = """
import json, sys
from pathlib import Path
from models.launch import _quiet_launcher
from models.recipe import Recipe
from models.training import Observer, train
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def losses(recipe, folder):
    found = []
    train(Recipe.model_validate(recipe), Path(folder), observer=Observer(on_step=lambda step: found.append(step.loss)))
    return found

if __name__ == "__main__":
    recipe, folder, count = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
    )
    with _quiet_launcher():
        print(json.dumps(elastic_launch(config, losses)(recipe, folder)))
"""


def losses_by_rank(recipe: Recipe, folder: Path, *, processes: int) -> dict[str, list[float]]:
    script = folder / "losses.py"
    script.write_text(LOSSES)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(recipe.as_dict()), str(folder / f"run-{processes}"), str(processes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    (alone,) = losses_by_rank(tickets(), tmp_path, processes=1).values()
    # In parts too: gradients are exchanged with the last part only.
    together = losses_by_rank(tickets("trainer.accumulation=2"), tmp_path, processes=2)

    assert len(alone) == 60
    assert together["0"][:50] == pytest.approx(alone[:50], abs=1e-4)
    assert together["1"] == []  # only the first process reports
    one, two = (load_checkpoint(tmp_path / f"run-{count}" / "checkpoint.pt") for count in (1, 2))
    assert two.metrics["accuracy"] == pytest.approx(one.metrics["accuracy"], abs=0.02)
    assert two.metrics["samples"] == one.metrics["samples"] == 200
    facts = json.loads((tmp_path / "run-2" / "run.json").read_text())
    assert facts["processes"] == 2
    assert facts["command"].endswith("--nproc 2")


def test_a_training_in_two_processes_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole = tickets("model.dropout=0.2", "data.count=400", "trainer.save_every_steps=3")
    train_in_processes(whole, tmp_path / "whole", processes=2)
    half = load_checkpoint(tmp_path / "whole" / "last.pt")
    assert half.training is not None
    assert len(half.training["rng"]) == 2
    assert not torch.equal(half.training["rng"][0]["cpu"], half.training["rng"][1]["cpu"])  # each its own dropout

    with subprocess.Popen(
        [
            *(sys.executable, "-m", "torchport", "train", str(tmp_path / "whole" / "recipe.yaml")),
            *("--nproc", "2", "--out", str(tmp_path / "cut")),
        ],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as killed:
        assert killed.stderr is not None
        killed.stderr.readline()  # the first epoch's line
        killed.kill()
    result = train_in_processes(whole, tmp_path / "cut", processes=2, resume=True)

    assert result.resumed_after_epoch >= 1
    whole_bytes = (tmp_path / "whole" / "checkpoint.pt").read_bytes()
    assert (tmp_path / "cut" / "checkpoint.pt").read_bytes() == whole_bytes


def test_an_error_in_a_process_is_its_own_sentence(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"batch_size is 25, which does not divide among 2 processes"):
        train_in_processes(tickets("trainer.batch_size=25"), tmp_path / "run", processes=2)


def test_one_process_alone_needs_no_group() -> None:
    value = torch.tensor([1.0, 2.0])

    assert read_processes() == ALONE == Processes(rank=0, local_rank=0, world_size=1)
    assert torch.equal(ALONE.sum(value), value)
    assert ALONE.gather("mine") == ["mine"]
    assert ALONE.from_main("mine") == "mine"
    model = torch.nn.Linear(1, 1)
    assert ALONE.wrap(model, torch.device("cpu")) is model


def test_torchrun_names_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)

    processes = read_processes()

    assert (processes.rank, processes.local_rank, processes.world_size) == (3, 1, 4)
    assert not processes.is_main


def test_a_single_training_has_the_same_bytes_however_it_is_started(tmp_path: Path) -> None:
    train(tickets("data.count=400"), tmp_path / "here")
    train_in_processes(tickets("data.count=400"), tmp_path / "launched", processes=1)

    here, launched = ((tmp_path / name / "checkpoint.pt").read_bytes() for name in ("here", "launched"))
    assert here == launched


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is missing where RANK or WORLD_SIZE is set; start the processes with"),
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', which is no whole number"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is '', which is no whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, and WORLD_SIZE is 2; ranks count from 0"),
    ],
)
def test_a_variable_that_is_missing_or_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(LaunchError, match=message):
        read_processes()


def test_a_launcher_of_one_process_a_machine_leaves_the_local_rank_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert read_processes() == Processes(rank=1, local_rank=0, world_size=2)


def test_each_process_has_dropout_of_its_own() -> None:
    recipe = tickets("data.count=400")
    dataset, cpu = build_dataset(recipe), torch.device("cpu")
    states, weights = [], []
    for rank in (0, 1):
        with reproducible(recipe.seed, cpu, threads=1):
            session = Session(recipe, dataset, cpu, processes=StandIn(rank=rank, world_size=2))
            states.append(torch.get_rng_state())
            weights.append(session.weights()["classifier.weight"])

    assert torch.equal(*weights)
    assert not torch.equal(*states)


class StandIn(Processes):
    """One of two processes, without the other."""

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model


@pytest.mark.parametrize(
    ("number", "group", "code", "sentence"),
    [
        (signal.SIGINT, False, 130, "Error: interrupted"),
        (signal.SIGINT, True, 130, "Error: interrupted"),  # as a terminal does on Ctrl-C
        (signal.SIGTERM, False, 143, "Error: The training was ended by SIGTERM; continue it with --resume."),
    ],
)
def test_a_signal_ends_all_processes_with_one_sentence(
    tmp_path: Path, number: signal.Signals, group: bool, code: int, sentence: str
) -> None:
    with training_in_two_processes(tmp_path) as process:
        (os.killpg if group else os.kill)(process.pid, number)
        said = everything_but_epochs(process)

    assert said == [sentence]
    assert process.returncode == code


def test_a_process_that_is_interrupted_again_while_it_ends_says_nothing(tmp_path: Path) -> None:
    # The launcher passes on what the terminal has sent already; when the second comes is chance, so here come more.
    with training_in_two_processes(tmp_path) as process:
        started = [child for child in psutil.Process(process.pid).children() if "spawn_main" in str(child.cmdline())]
        assert len(started) == 2
        os.killpg(process.pid, signal.SIGINT)
        for child in [*started, *started, *started]:
            time.sleep(0.01)
            with suppress(psutil.NoSuchProcess):  # it has ended
                child.send_signal(signal.SIGINT)
        said = everything_but_epochs(process)

    assert said == ["Error: interrupted"]
    assert process.returncode == 130


@contextmanager
def training_in_two_processes(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """After its first epoch, in a process group of its own."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tickets("trainer.epochs=1000", "data.count=400").as_dict()))
    with subprocess.Popen(
        [*(sys.executable, "-m", "torchport", "train", str(path), "--nproc", "2", "--out", str(folder / "run"))],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()  # the first epoch's line
        yield process


def everything_but_epochs(process: subprocess.Popen[str]) -> list[str]:
    assert process.stderr is not None
    return [line for line in process.stderr.read().splitlines() if not line.startswith("epoch ")]


def test_the_launcher_leaves_no_signal_handlers_behind(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    train_in_processes(tickets("data.count=400", "trainer.epochs=1"), tmp_path / "run", processes=1)

    assert signal.getsignal(signal.SIGTERM) == before
