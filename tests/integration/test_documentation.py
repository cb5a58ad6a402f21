"""The documentation works when pasted: its blocks run, in order, in an empty folder, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.ports import Ports

from .conftest import READY_TIMEOUT_S, STOP_TIMEOUT_S

ROOT = Path(__file__).parents[2]
PAGES_THAT_RUN = (
    "README.md",
    "docs/export.md",
    "docs/requests.md",
    "docs/archives.md",
    "docs/own_model.md",
    "docs/training.md",
)
# The first runs alone, since it measures latency; most of what the others do keeps one core busy.
ALONE = "README.md"
PAGES_AT_ONCE = 2
# A measurement that the machine was too busy for says so, and is repeated, as a reader would.
TRIES = 3
TRAINING = "torchport train digits"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

FENCE = re.compile(r"^```(?P<language>\w*)(?P<attributes>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")
TOO_BUSY = re.compile(r"^INVALID\n\s+the client sent late", re.MULTILINE)
MAKE = re.compile(r"^make ([a-z-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: shell commands, a file to write (`file="…"`), or a server (`background="what it prints"`)."""

    language: str
    attributes: dict[str, str]
    body: str


def blocks(page: str) -> Iterator[Block]:
    for match in FENCE.finditer((ROOT / page).read_text(encoding="utf-8")):
        yield Block(match["language"], dict(ATTRIBUTE.findall(match["attributes"])), match["body"])


@pytest.fixture(scope="module")
def pages(
    request: pytest.FixtureRequest, run_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[int]]]:
    """The run of each page that was asked for, a few at a time; it gives how many commands there were."""
    chosen = [
        item.callspec.params["page"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "pages" in item.fixturenames
    ]
    first_port = Ports.first_of_free_range()
    with ThreadPoolExecutor(PAGES_AT_ONCE) as pool:
        runs: dict[str, Future[int]] = {}
        for i, page in enumerate(chosen):
            runs[page] = pool.submit(run_page, page, tmp_path_factory.mktemp("page"), first_port + 5 * i, run_folder)
            if page == ALONE:
                wait([runs[page]])
        yield runs
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(1200)  # it may wait for others first
@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_the_blocks_of_a_page_run_as_they_stand(pages: dict[str, Future[int]], page: str) -> None:
    assert pages[page].result() > 0


def run_page(page: str, folder: Path, port: int, trained: Path) -> int:
    """Run the blocks of a page, and count its commands; only the README trains the digits, others copy ``trained``."""
    (folder / ".venv").symlink_to(sys.prefix)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TORCHPORT_PORT": str(port),
        "TORCHPORT_URL": f"http://127.0.0.1:{port}",
    }
    servers: list[subprocess.Popen[bytes]] = []
    commands = 0
    try:
        for number, block in enumerate(blocks(page)):
            if "file" in block.attributes:
                (folder / block.attributes["file"]).write_text(block.body, encoding="utf-8")
            elif "background" in block.attributes:
                servers.append(start(block, folder, folder / f"{number}.out", environment))
            elif block.language == "sh" and not MAKE.search(block.body):
                commands += 1
                body = block.body
                if page != "README.md":
                    body = body.replace(TRAINING, f"mkdir runs && cp -r '{trained}' runs/digits")
                for _ in range(TRIES):
                    done = subprocess.run(
                        ["bash", "-euo", "pipefail", "-c", body],
                        cwd=folder,
                        env=environment,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                        check=False,
                    )
                    if not TOO_BUSY.search(done.stdout):
                        break
                assert done.returncode == 0, f"{block.body}\n{done.stdout[-3000:]}"
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=STOP_TIMEOUT_S)
    return commands


def start(block: Block, folder: Path, output: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Run a command that stays in the foreground until it has printed what its block says."""
    with output.open("wb") as stream:
        # exec: the signal that stops it must reach the command, not the shell around it.
        server = subprocess.Popen(
            ["bash", "-c", f"exec {block.body}"], cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + READY_TIMEOUT_S
    while block.attributes["background"] not in output.read_text(errors="replace"):
        assert server.poll() is None, output.read_text(errors="replace")[-3000:]
        if time.monotonic() > deadline:
            server.terminate()
            raise AssertionError(output.read_text(errors="replace")[-3000:])
        time.sleep(0.1)
    return server


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    targets = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert missing == []


def test_every_make_target_that_the_documentation_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {target for page in PAGES for block in blocks(page) for target in MAKE.findall(block.body)}
    named |= {
        target for page in PAGES for target in re.findall(r"`make ([a-z-]+)", (ROOT / page).read_text(encoding="utf-8"))
    }
    assert {"demo", "test"} <= named
    assert [target for target in sorted(named) if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_first_screen_of_the_readme_tries_and_tests_it() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:25])
    assert set(MAKE.findall(first_screen)) == {"demo", "test"}
