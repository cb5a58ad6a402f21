"""Tests that need a GPU. Without one they are skipped, or rehearsed on the CPU with TORCHPORT_GPU_TESTS_ON=cpu."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from export.candidate import Candidate, Prepared, Source, convert_and_check, prepare
from export.combinations import Combination, refusal
from export.convert import convert_in_this_process
from handlers.model import ServedModel

from . import subjects
from .subjects import REHEARSED, Subject

HERE = Path(__file__).parent
NO_GPU = "no CUDA GPU here"


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not REHEARSED:
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Subject, Prepared]]:
    """A subject's checkpoint with the answers that are right: of fp32 on the CPU."""
    known: dict[str, tuple[Subject, Prepared]] = {}

    def get(name: str) -> tuple[Subject, Prepared]:
        if name not in known:
            subject = subjects.SUBJECTS[name]
            folder = tmp_path_factory.mktemp(name)
            torch.save(subject.build().state_dict(), folder / "weights.pt")
            (folder / "signature.yaml").write_text(subject.document, encoding="utf-8")
            source = Source(
                path=folder / "weights.pt",
                factory=subject.factory,
                signature_file=folder / "signature.yaml",
                config=subject.config,
            )
            known[name] = subject, prepare(source)
        return known[name]

    return get


@pytest.fixture(scope="session")
def candidate(
    prepared: Callable[[str], tuple[Subject, Prepared]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Combination], Candidate]:
    """A subject converted in one way, with its gates; each is made when it is first asked for."""
    known: dict[tuple[str, Combination], Candidate] = {}

    def get(name: str, combination: Combination) -> Candidate:
        reason = refusal(combination)
        if reason is not None:
            pytest.skip(reason)
        if (name, combination) not in known:
            baseline: ServedModel | None = None
            if combination.precision != "fp32":
                fp32 = Combination(format=combination.format, precision="fp32", device=combination.device)
                baseline = get(name, fp32).served
            _, source = prepared(name)
            # Models of this size say nothing of speed.
            known[name, combination] = convert_and_check(
                source, combination, tmp_path_factory.mktemp("artifact"), allow_slower=True, baseline=baseline
            )
        return known[name, combination]

    return get


@pytest.fixture(autouse=True, scope="module")
def converting_here() -> Iterator[None]:
    """Convert in this process: a new one would import torch again for each of dozens of artifacts.

    Not for the session: tests of other folders would convert here, too, and not write the same bytes.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
    patch = pytest.MonkeyPatch()
    patch.setattr("export.candidate.convert_in_fresh_process", convert_in_this_process)
    yield
    patch.undo()
