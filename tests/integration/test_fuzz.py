"""Broken requests in their thousands among good ones: ``tests/benchmarks/serving_fuzz.py`` sends a hundred thousand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from export.archive import open_archive

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
COUNT = 2000
IN_FLIGHT = 32


@pytest.fixture(scope="module")
def serving_fuzz() -> Iterator[ModuleType]:
    """The benchmark as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import serving_fuzz as benchmark

        yield benchmark
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.timeout(600)
def test_broken_requests_hurt_neither_the_worker_nor_their_neighbours(
    serving_fuzz: ModuleType, archives: dict[str, Path]
) -> None:
    with serving_fuzz.serving([archives["torchscript"]]) as server:
        known = [one for archive in server.archives for one in serving_fuzz.golden_answers(archive)]
        fuzzed = serving_fuzz.fuzz(server, known, count=COUNT, in_flight=IN_FLIGHT, seed=20)
    from serving_mutations import MUTATIONS
    from serving_raw import KINDS

    tally = fuzzed.tally
    assert fuzzed.ok, json.dumps(fuzzed.to_document(), indent=1)
    assert (tally.good, tally.wrong, tally.broken) == (COUNT, 0, COUNT)
    assert not fuzzed.restarted
    # That it was broken requests which were sent, of every kind.
    refused = sum(count for status, count in tally.by_status.items() if status.startswith("4"))
    assert refused > COUNT / 3
    assert {mutation.__name__ for mutation in MUTATIONS} <= tally.by_kind.keys()
    assert sum(kind.startswith("raw ") for kind in tally.by_kind) == len(KINDS) + 1


def test_the_same_seed_makes_the_same_requests(serving_fuzz: ModuleType, archives: dict[str, Path]) -> None:
    archive = open_archive(archives["onnx"])
    known = serving_fuzz.golden_answers(archive)
    first, second, other = ([serving_fuzz.make(i, known, seed, "t") for i in range(200)] for seed in (1, 1, 2))
    assert first == second != other


def test_what_must_not_be_is_found(serving_fuzz: ModuleType, archives: dict[str, Path]) -> None:
    known = serving_fuzz.golden_answers(open_archive(archives["onnx"]))
    one, reply = known[0], serving_fuzz.Reply
    assert serving_fuzz.is_right(one, reply(status=200, body=json.dumps(one.answer).encode()))
    wrong = {**one.answer, "label": "another"}
    assert not serving_fuzz.is_right(one, reply(status=200, body=json.dumps(wrong).encode()))
    assert not serving_fuzz.is_right(one, reply(status=503, body=json.dumps(one.answer).encode()))
    assert not serving_fuzz.is_right(one, reply(status=200, body=b"{"))
    assert serving_fuzz.is_error(reply(status=400, body=b'{"code": 400, "type": "BadRequestException"}'))
    assert serving_fuzz.is_error(reply(status=400, body=b'{"error": {"code": "malformed_json", "message": "x"}}'))
    assert not serving_fuzz.is_error(reply(status=400, body=b'{"message": "x"}'))
    assert not serving_fuzz.is_error(reply(status=400, body=b"x"))
