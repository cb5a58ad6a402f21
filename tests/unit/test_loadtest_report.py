import json
import re
import resource
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loadtest.answers import Fault
from loadtest.errors import LoadTestError
from loadtest.plan import Plan
from loadtest.recorder import Recorder
from loadtest.report import format_ms, write_report
from loadtest.result import Result
from loadtest.tally import Tally
from loadtest.verdict import judge

VOID = {"meta", "link", "img", "br", "hr", "input", "use", "path", "circle", "rect"}


def new_result(*, right=300, failed=3, **options):
    plan = Plan(**{"model": "digits", "url": "http://127.0.0.1:8080", "rate_rps": 100.0, "duration_s": 3.0, **options})
    recorder = Recorder(start_s=0, warm_up_s=0, duration_s=3, interval_s=1, late_s=0.01)
    for number in range(right):
        planned_s = number * 3 / right
        recorder.record(planned_s=planned_s, sent_s=planned_s, done_s=planned_s + 0.01 + number / 1e4, fault=None)
    for _ in range(failed):
        recorder.record(planned_s=1, sent_s=1, done_s=1.1, fault=Fault("HTTP 500", "<script>alert(1)</script>"))
    recorder.tally.cpu_shares.append(0.25)
    return Result(
        plan=plan,
        tally=recorder.tally,
        verdict=judge(plan, recorder.tally),
        measured_at=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        samples=4,
        command=plan.command,
        hardware={"processor": "Some CPU", "cores": "2 usable of 2"},
        versions={"python": "3.11.7", "locust": "2.47.0"},
    )


class Balance(HTMLParser):
    """Checks that every element is closed, and that no id is used twice."""

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"failed": 0},
        {"slo_p99_ms": 20.0},
        {"rate_rps": None, "users": 4},
        {"right": 0},
        {"right": 0, "failed": 0},
        {"rate_rps": None, "users": 4, "right": 0},
    ],
)
def test_the_page_is_well_formed_and_needs_no_network(tmp_path, options):
    files = write_report(new_result(**options), tmp_path / "deep" / "report")
    page = files.page.read_text(encoding="utf-8")
    # SVG's namespaces and the measured server's own address are names; nothing on the page may load an address.
    assert not re.search(r"""(?:src|href|action|data|poster)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"<link|<script|@import|url\(\s*['\"]?(?!#)", page)
    assert "<metadata" not in page
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert page.count("<svg") == 3


def test_a_report_goes_into_a_relative_folder_too_and_over_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        files = write_report(new_result(), Path("reports") / "digits")
    assert sorted(path.name for path in (tmp_path / "reports" / "digits").iterdir()) == sorted(
        path.name for path in (files.page, files.results, files.distribution)
    )


def test_the_page_escapes_what_the_server_said(tmp_path):
    page = write_report(new_result(), tmp_path).page.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_says_what_was_found_and_how(tmp_path):
    page = write_report(new_result(slo_p99_ms=20.0), tmp_path).page.read_text(encoding="utf-8")
    for text in ("SLO MISSED", "Open: Poisson arrivals", "Some CPU", "locust 2.47.0", "--slo-p99-ms 20", "HTTP 500"):
        assert text in page


def test_an_invalid_measurement_says_so_on_the_page(tmp_path):
    page = write_report(new_result(right=0), tmp_path).page.read_text(encoding="utf-8")
    assert "INVALID" in page
    assert "must not be used" in page


@pytest.mark.parametrize("loop", [{}, {"rate_rps": None, "users": 4}])
def test_an_invalid_measurement_has_no_latency_to_quote(tmp_path, loop):
    quoted = ("<dt>p50</dt>", "<dt>p99</dt>", "<th>From the actual send</th>")
    page = write_report(new_result(**loop), tmp_path).page.read_text(encoding="utf-8")
    assert all(text in page for text in quoted)
    page = write_report(new_result(max_client_cpu=0.1, **loop), tmp_path).page.read_text(encoding="utf-8")
    assert "it measured itself" in page
    assert not any(text in page for text in quoted)


def test_a_closed_loop_says_that_it_measures_capacity(tmp_path):
    page = write_report(new_result(rate_rps=None, users=4), tmp_path).page.read_text(encoding="utf-8")
    assert "There is no planned send" in page
    assert "From the planned send" not in page


def test_the_same_result_gives_the_same_bytes(tmp_path):
    first, second = (write_report(new_result(), tmp_path / name).page.read_bytes() for name in "ab")
    assert first == second


def test_the_json_is_whole(tmp_path):
    result = new_result()
    files = write_report(result, tmp_path)
    document = json.loads(files.results.read_text(encoding="utf-8"))
    assert document["requests"] == document["right"] + document["failed"] == 303
    assert document["errors"] == {"HTTP 500": {"count": 3, "example": "<script>alert(1)</script>"}}
    assert document["latency_ms"]["p99"] == result.latency.p99
    assert document["latency_ms"]["max"] is None
    assert Tally.from_json(document["tally"]).requests == 303
    assert files.distribution.read_text().split()[0] == "Value"


def test_a_report_replaces_the_earlier_one_and_leaves_nothing_else(tmp_path):
    write_report(new_result(), tmp_path)
    files = write_report(new_result(failed=0), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latency.hgrm", "report.html", "results.json"]
    assert json.loads(files.results.read_text())["failed"] == 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadTestError, match=r"cannot write the report to .*file.*--out"):
        write_report(new_result(), tmp_path / "file")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "—"), (0.1234, "0.12"), (9.876, "9.88"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_durations_are_short(value, text):
    assert format_ms(value) == text


def test_a_full_disk_leaves_the_earlier_report_and_nothing_else(tmp_path):
    files = write_report(new_result(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        with pytest.raises(LoadTestError, match=r"cannot write the report to .*; give another folder with --out"):
            write_report(new_result(right=7), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert files.page.name in before
