"""The demo on a busy machine: it lowers the rate rather than print numbers that mean nothing."""

import io
import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from deploy import demo
from deploy.errors import DeployError


@pytest.fixture
def journey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, object]]], demo._Journey]:
    """A journey whose `torchport` gives these documents, one after the other."""

    def build(documents: list[dict[str, object]]) -> demo._Journey:
        answers = tmp_path / "answers"
        answers.write_text("".join(json.dumps(document) + "\n" for document in documents))
        fake = tmp_path / "torchport"
        fake.write_text(
            "#!/bin/sh\n"
            f'echo "$@" >> {tmp_path}/calls\n'
            f"line=$(head -n 1 {answers}); sed -i 1d {answers}\n"
            'echo "$line"; case $line in *\'"ok": true\'*) ;; *) exit 1 ;; esac\n'
        )
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(demo, "_TORCHPORT", (str(fake),))
        return demo._Journey(Console(file=io.StringIO()))

    return build


INVALID = {"ok": False, "valid": False, "invalid_reasons": ["the client sent late"]}


def rates(tmp_path: Path) -> list[str]:
    return [line.split("--rate ")[1].split()[0] for line in (tmp_path / "calls").read_text().splitlines()]


def test_an_invalid_measurement_is_tried_again_at_half_the_rate(journey, tmp_path) -> None:
    found = journey([INVALID, INVALID, {"ok": True, "valid": True}]).measure_latency("digits", rate=200)
    assert found["valid"] is True
    assert rates(tmp_path) == ["200", "100", "50"]


def test_a_machine_that_is_too_busy_throughout_is_said_to_be(journey, tmp_path) -> None:
    with pytest.raises(DeployError, match="too busy to measure latency"):
        journey([INVALID] * 9).measure_latency("digits", rate=2)
    assert rates(tmp_path) == ["2", "1", "1", "1"]


def test_any_other_failure_stops_the_demo(journey) -> None:
    with pytest.raises(DeployError, match=r"`torchport loadtest digits --rate 200` failed"):
        journey([{"ok": False, "valid": True}]).measure_latency("digits", rate=200)
