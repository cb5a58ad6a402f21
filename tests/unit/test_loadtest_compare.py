"""The plan of a comparison, its sums, and its report."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loadtest.closed_loop import LoadRecord
from loadtest.compare_archive import check_reference, unpack
from loadtest.compare_breakdown import break_down
from loadtest.compare_cli import command_of
from loadtest.compare_limit import Limit, measure_limit
from loadtest.compare_plan import ComparePlan, parse_users, usable_cores
from loadtest.compare_report import write_comparison
from loadtest.compare_requests import read_bodies
from loadtest.compare_result import Comparison, Visit
from loadtest.compare_systems import DEFAULT_PEERS, PEERS, SYSTEMS, parse_peers
from loadtest.compare_whole import Whole
from loadtest.errors import LoadTestError, PayloadError, PlanError, RunError
from loadtest.histogram import Histogram
from loadtest.payloads import Payload

MAR = Path("model_store/digits.mar")


def new_plan(**options):
    return ComparePlan(**{"archive": MAR, "reference": MAR, **options})


class TestPlan:
    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"duration_s": 0}, "--duration"),
            ({"duration_s": float("nan")}, "--duration"),
            ({"rounds": 0}, "--rounds"),
            ({"threads": 0}, "--threads"),
            ({"warm_up_s": -1}, "--warm-up"),
            ({"cores": 0}, "--cores"),
            ({"cores": len(usable_cores()) + 1}, "--cores"),
        ],
    )
    def test_a_value_out_of_range_is_named(self, options, name):
        with pytest.raises(PlanError, match=name):
            new_plan(**options)

    @pytest.mark.parametrize("text", ["", "0", "1,1", "1;2", "1001", "-1", "one"])
    def test_users_that_are_none_are_refused(self, text):
        with pytest.raises(PlanError, match="like 1,64"):
            parse_users(text)

    def test_users_are_sorted(self):
        assert parse_users("64, 1") == (1, 64)

    def test_peers(self):
        assert parse_peers("mosec, ray") == ("mosec", "ray")
        assert parse_peers("none") == ()
        assert set(parse_peers("all")) == set(PEERS) > set(DEFAULT_PEERS)

    @pytest.mark.parametrize("text", ["", "mosec,mosec", "triton", "torchport", "none,ray"])
    def test_peers_that_are_none_are_refused_with_those_that_are(self, text):
        with pytest.raises(PlanError, match=r"choose from torchserve, .*fastapi"):
            parse_peers(text)

    def test_the_order_is_turned_in_every_other_round(self):
        plan = new_plan(peers=("mosec", "ray"))
        names = [[system.name for system in plan.order(number)] for number in range(3)]
        assert names == [["torchport", "mosec", "ray"], ["ray", "mosec", "torchport"], ["torchport", "mosec", "ray"]]

    def test_only_the_named_peers_are_installed(self):
        assert new_plan(peers=("torchserve",)).packages == ()
        assert new_plan(peers=("torchserve", "ray")).packages == ("ray[serve]",)

    def test_the_command_repeats_it(self):
        plan = new_plan(peers=(), users=(2, 8), cores=1)
        words = command_of(plan, {"TORCHPORT_THREADS": "4"})
        assert " ".join(words) == (
            "torchport compare model_store/digits.mar --peers none --users 2,8 --duration 8 --warm-up 2 --rounds 5 "
            "--threads 1 --workers 1 --seed 0 --cores 1"
        )
        assert command_of(plan, {"TORCHPORT_MAX_BATCH": "8"}) == ["TORCHPORT_MAX_BATCH=8", *words]


def test_every_peer_has_a_server_and_its_packages_are_pinned():
    folder = Path(command_of.__code__.co_filename).parent / "peers"
    pinned = {
        re.split(r"==", line)[0].strip().lower().replace("_", "-")
        for line in (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    for system in SYSTEMS.values():
        assert bool(system.module) == (system.name != "torchport")
        if system.module:
            assert (folder / f"{system.module}.py").is_file()
        assert {package.partition("[")[0] for package in system.packages} <= pinned


def record(rps, *, latency_ms=10.0, failed=0, cpu=0.1, stall_s=0.05):
    latency = Histogram()
    for _ in range(100):
        latency.record(latency_ms / 1e3)
    faults = {"HTTP 503": (failed, "<script>full</script>")} if failed else {}
    return LoadRecord(
        sent=rps * 2 + failed,
        right=rps * 2,
        failed=failed,
        duration_s=2.0,
        cpu_share=cpu,
        stall_s=stall_s,
        latency=latency,
        faults=faults,
    )


def new_whole(speed=1.0):
    """150 and 250 requests/s times `speed`, 4 ms alone over `speed`."""
    stages = {"decode": 1.5, "stack": 0.25, "compute": 2.0, "encode": 0.25}
    return Whole(
        alone_ms=4.0 / speed,
        one_per_s=150.0 * speed,
        one_batch=8,
        all_per_s=250.0 * speed,
        all_batch=1,
        lanes=2,
        stages_ms={size: {name: value / speed for name, value in stages.items()} for size in (1, 8, 32)},
    )


def new_comparison(visits, *, plan=None, failures=None):
    plan = plan or new_plan(peers=("mosec",), users=(8,), rounds=3)
    limits = [
        (
            Limit(arrival_per_s=200.0 + 100 * n, grouped_per_s=500.0, whole=new_whole(), expected=()),
            Limit(arrival_per_s=400.0, grouped_per_s=800.0, whole=new_whole(2.0), expected=()),
        )
        for n in range(plan.rounds)
    ]
    archive = {"archive": "digits.mar", "model": "digits", "format": "onnx", "precision": "int8", "device": "cpu"}
    return Comparison(
        plan=plan,
        visits=visits,
        failures=failures or {},
        lost=(),
        limits=limits,
        archives=({**archive, "threads": 1}, {**archive, "threads": 1}),
        requests="3 golden samples",
        bodies=3,
        files=True,
        cores="not bound",
        measured_at=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        command="torchport compare digits.mar",
        hardware={"processor": "Some CPU"},
        versions={"mosec": "0.9.8"},
    )


def visits(*, users=8, **rates):
    return [
        Visit(
            system=name,
            users=users,
            round=number,
            record=each if isinstance(each, LoadRecord) else record(each),
            cpu_ms={"java": 0.5, "python": 2.5 + number},
            stages_ms={"decode": 1.0, "wait": 0.5, "compute": 4.0, "encode": 0.25} if name == "torchport" else {},
        )
        for name, rounds in rates.items()
        for number, each in enumerate(rounds)
    ]


class TestResult:
    def test_rates_are_medians_and_ratios_are_taken_within_rounds(self):
        comparison = new_comparison(visits(torchport=[300, 100, 500], mosec=[100, 200, 100]))
        ours, theirs = comparison.cell("torchport", 8), comparison.cell("mosec", 8)
        assert (ours.rps, ours.lowest_rps, ours.highest_rps) == (300, 100, 500)
        assert theirs.rps == 100
        # 3, 0.5 and 5 in the three rounds; the ratio of the medians happens to be the same, that of the means is not.
        assert theirs.torchport_ratio == 3
        assert ours.torchport_ratio == 1
        # Each against the limit of what it serves: 400 throughout; 200, 300 and 400.
        assert ours.of_limit == pytest.approx(0.75)
        assert theirs.of_limit == pytest.approx(0.5)
        # Whole requests: 300 and 500 of torchport's artifact, 150 and 250 of the peers'.
        assert (ours.of_one, ours.of_all) == (pytest.approx(1.0), pytest.approx(0.6))
        assert (theirs.of_one, theirs.of_all) == (pytest.approx(100 / 150), pytest.approx(0.4))
        assert ours.cpu_ms == 4.0  # 3, 4 and 5 in the three rounds
        assert ours.added_ms is None
        assert comparison.limit(ours=False, grouped=False) == 300
        assert comparison.ok

    def test_percentiles_are_of_all_rounds_together(self):
        slow = record(100, latency_ms=90.0)
        cell = new_comparison(visits(torchport=[100, 100, slow])).cell("torchport", 8)
        assert cell.p50_ms == pytest.approx(10, rel=0.01)
        assert cell.p99_ms == pytest.approx(90, rel=0.01)

    def test_alone_the_latency_is_held_against_that_in_process(self):
        plan = new_plan(peers=("mosec",), users=(1,), rounds=3)
        records = [record(100, latency_ms=latency_ms) for latency_ms in (9.0, 5.0, 6.0)]
        comparison = new_comparison(visits(users=1, torchport=records, mosec=records), plan=plan)
        # In process torchport's artifact takes 2 ms and the peers' 4.
        assert comparison.cell("torchport", 1).added_ms == pytest.approx(4.0, abs=0.02)
        assert comparison.cell("mosec", 1).added_ms == pytest.approx(2.0, abs=0.02)

    def test_where_the_time_goes(self):
        plan = new_plan(peers=(), users=(1, 8), rounds=3)
        alone = visits(users=1, torchport=[record(100, latency_ms=7.0)] * 3)
        found = break_down(new_comparison([*alone, *visits(torchport=[100] * 3)], plan=plan), 1)
        assert [(row.in_process_ms, row.served_ms) for row in found.rows[:5]] == [
            (0.75, 1.0),
            (None, 0.5),
            (0.125, None),
            (1.0, 4.0),
            (0.125, 0.25),
        ]
        rest, whole = found.rows[5:]
        assert (rest.in_process_ms, rest.served_ms) == (None, pytest.approx(1.25, abs=0.02))
        assert (whole.in_process_ms, whole.served_ms) == (2.0, pytest.approx(7.0, abs=0.02))
        # The client: a tenth of a core for 100 requests a second.
        assert found.cpu_ms == {"java": 0.5, "python": 3.5, "client": pytest.approx(1.0)}
        assert found.batch == 1
        assert break_down(new_comparison([], plan=plan), 1) is None

    def test_failed_requests_count_as_slowest_and_make_it_invalid(self):
        comparison = new_comparison(visits(torchport=[100, 100, record(100, failed=10)], mosec=[100] * 3))
        cell = comparison.cell("torchport", 8)
        assert cell.p99_ms is None
        assert (cell.failed, cell.requests) == (10, 310)
        (reason,) = comparison.invalid
        assert "torchport at 8 in flight: 3.2% of the requests failed" in reason
        assert not comparison.ok

    def test_a_busy_client_makes_it_invalid(self):
        comparison = new_comparison(visits(torchport=[100] * 3, mosec=[100, record(100, cpu=0.91), 100]))
        (reason,) = comparison.invalid
        assert reason.startswith("Mosec at 8 in flight: the client used 91% of its core")

    def test_a_client_that_stood_still_makes_it_invalid(self):
        comparison = new_comparison(visits(torchport=[100] * 3, mosec=[100, record(100, stall_s=2.0), 100]))
        (reason,) = comparison.invalid
        assert reason.startswith("Mosec at 8 in flight: the client stood still for 2.0 s")

    def test_a_system_that_did_not_start_makes_it_invalid_and_is_not_left_out(self):
        comparison = new_comparison(visits(torchport=[100] * 3), failures={"mosec": "Mosec ended while starting: no"})
        assert comparison.cell("mosec", 8) is None
        assert comparison.invalid == ["Mosec ended while starting: no"]
        document = comparison.to_json()
        assert document["systems"]["mosec"]["failure"] == "Mosec ended while starting: no"
        assert document["ok"] is False

    def test_without_a_torchport_there_is_no_ratio(self):
        comparison = new_comparison(visits(mosec=[100] * 3), failures={"torchport": "no"})
        assert comparison.cell("mosec", 8).torchport_ratio is None


class TestReport:
    def test_it_is_one_page_without_a_network_and_json_with_every_round(self, tmp_path):
        comparison = new_comparison(visits(torchport=[300, 100, 500], mosec=[100, 200, record(100, failed=9)]))
        files = write_comparison(comparison, tmp_path / "deep" / "report")
        page = files.page.read_text(encoding="utf-8")
        assert not re.search(r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:)?//""", page)
        assert not re.search(r"<link|<script|@import", page)
        assert "&lt;script&gt;full" in page
        for text in ("Mosec", "NOT ALL VALID", "Some CPU", "torchport compare digits.mar", "mosec 0.9.8"):
            assert text in page
        assert page.count("<svg") == 2
        assert "decoded in a stage of its own" in page
        assert "where torchport's time goes" in page
        document = json.loads(files.results.read_bytes())
        assert len(document["rounds"]) == 6
        found = LoadRecord.from_json(
            {
                key: value
                for key, value in document["rounds"][0].items()
                if key not in ("system", "users", "round", "cpu_ms", "stages_ms")
            }
        )
        assert document["limits_per_s"]["archive_all"] == 500
        assert Whole.from_json(document["limit_rounds"][0]["archive"]["whole"]) == new_whole(2.0)
        assert found.throughput_rps == 300
        assert "rounds" not in comparison.to_json(whole=False)

    def test_it_is_written_when_nothing_was_measured(self, tmp_path):
        comparison = new_comparison([], failures={"torchport": "no", "mosec": "no"})
        assert "NOT ALL VALID" in write_comparison(comparison, tmp_path).page.read_text(encoding="utf-8")

    def test_two_artifacts_have_two_limits(self, tmp_path):
        plan = replace(new_plan(peers=("mosec",), users=(1, 8), rounds=3), reference=Path("fp32.mar"))
        comparison = new_comparison(visits(torchport=[300] * 3, mosec=[100] * 3), plan=plan)
        page = write_comparison(comparison, tmp_path).page.read_text(encoding="utf-8")
        assert "torchport's artifact" in page
        assert "the peers: digits.mar" in page

    def test_a_folder_that_cannot_be_written_is_an_error(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(LoadTestError, match="another folder with --out"):
            write_comparison(new_comparison([]), tmp_path / "file")


class TestArchive:
    def test_it_is_unpacked_and_described(self, archive, tmp_path):
        unpacked = unpack(archive, tmp_path)
        assert unpacked.name == "brightness"
        assert unpacked.threads == 1
        assert unpacked.describe()["format"] == "torchscript"
        assert (tmp_path / "signature.json").is_file()
        check_reference(unpacked, unpacked)

    def test_another_model_is_no_reference(self, archive, tmp_path):
        unpacked = unpack(archive, tmp_path)
        other = replace(unpacked, signature=replace(unpacked.signature, labels=("x", "y", "z")))
        with pytest.raises(PlanError, match="of another model"):
            check_reference(unpacked, other)

    def test_what_is_none_is_refused(self, archive, tmp_path):
        (tmp_path / "text.mar").write_text("no archive")
        content = bytearray(archive.read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "damaged.mar").write_bytes(content)
        for name in ("none", "text", "damaged"):
            with pytest.raises(PayloadError, match=f"{name}.mar"):
                unpack(tmp_path / f"{name}.mar", tmp_path / f"folder-{name}")


class TestLimit:
    def test_it_answers_every_body_and_times_both_orders(self, extracted, archive, signature):
        bodies, _ = read_bodies(signature, archive)
        limit = measure_limit(extracted, bodies, threads=1, duration_s=0.2, seed=0)
        assert limit.arrival_per_s > 0
        assert limit.grouped_per_s > 0
        assert limit.whole.lanes == len(usable_cores())
        golden = [
            sample["label"] for sample in json.loads((extracted / "golden" / "expected.json").read_text())["samples"]
        ]
        assert [each.labels[0] for each in limit.expected] == golden

    def test_a_folder_without_a_model_is_an_error(self, tmp_path):
        with pytest.raises(RunError, match=r"cannot be run in process: FileNotFoundError.*inspect --verify"):
            measure_limit(
                tmp_path, [Payload(body=b"{}", content_type="application/json")], threads=1, duration_s=0.1, seed=0
            )
