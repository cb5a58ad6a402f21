"""Metrics of a worker: histograms that add up, and lines that TorchServe reads and knows."""

import itertools
import re
import threading
from pathlib import Path

import pytest
import yaml

import deploy
from handlers import metrics
from handlers.metrics import (
    ANSWERS,
    BATCH_SAMPLES,
    PADDING_SHARE,
    SAMPLES,
    STAGE_SECONDS,
    STAGES,
    Emitter,
    Meter,
)
from handlers.model import ServedModel
from handlers.service import Service

DEADLINE_S = 200
# Of org.pytorch.serve.metrics.Metric, TorchServe 0.12.0.
LINE = re.compile(
    r"\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),([^,]+)(,(.*))?"
)
OF_MODEL = (("ModelName", "digits"), ("ModelVersion", "1.0"))


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which others take the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        assert not twice, f"{twice[0]} comes twice in {node.start_mark}"
        return super().construct_mapping(node, deep)


def declared(loader=yaml.SafeLoader):
    """Dimensions of the workers' metrics by name."""
    text = (Path(deploy.__file__).parent / "metrics.yaml").read_text(encoding="utf-8")
    counters = yaml.load(text, loader)["model_metrics"]["counter"]
    return {counter["name"]: (counter["unit"], counter["dimensions"]) for counter in counters}


def emitted(meter, labels=OF_MODEL):
    """The fields of every line of an emitter: name, unit, value, labels, type."""
    texts = []
    Emitter(meter, labels, write=texts.append).emit()
    found = []
    for line in "".join(texts).splitlines():
        assert line.startswith("[METRICS]")
        match = LINE.fullmatch(line.removeprefix("[METRICS]"))
        assert match, line
        dimensions = [dimension.split(":") for dimension in match[4].split(",")]
        assert all(len(pair) == 2 for pair in dimensions), line
        assert match[8].isdecimal()
        found.append((match[1], match[2], float(match[3]), dict(dimensions), match[6]))
    return found


class TestMeter:
    def test_counters_add_up(self):
        meter = Meter()
        meter.count(SAMPLES, 3)
        meter.count(SAMPLES)
        meter.count(ANSWERS, 1, (("code", "200"),))
        meter.count(ANSWERS, 1, (("code", "503"),))
        assert meter.take() == {
            (SAMPLES, ()): 4,
            (ANSWERS, (("code", "200"),)): 1,
            (ANSWERS, (("code", "503"),)): 1,
        }

    def test_taking_empties(self):
        meter = Meter()
        meter.count(SAMPLES, 3)
        meter.observe(BATCH_SAMPLES, 3)
        assert meter.take()
        assert meter.take() == {}
        meter.count(SAMPLES, 5)
        assert meter.take() == {(SAMPLES, ()): 5}

    @pytest.mark.parametrize("name", [STAGE_SECONDS, BATCH_SAMPLES, PADDING_SHARE])
    def test_buckets_are_cumulative_and_sums_are_right(self, name):
        bounds = metrics._BUCKETS[name]
        # On every bound, between each two, and beyond the last.
        values = [*bounds, *(sum(pair) / 2 for pair in itertools.pairwise(bounds)), bounds[-1] * 3]
        meter, labels = Meter(), (("stage", "x"),)
        for value in values:
            meter.observe(name, value, labels)
        taken = meter.take()
        assert taken.pop((f"{name}_sum", labels)) == pytest.approx(sum(values))
        assert taken.pop((f"{name}_count", labels)) == len(values)
        assert taken.pop((f"{name}_bucket", (*labels, ("le", "+Inf")))) == len(values)
        assert taken == {
            (f"{name}_bucket", (*labels, ("le", f"{bound:g}"))): sum(value <= bound for value in values)
            for bound in bounds
        }

    def test_nothing_is_lost_between_threads(self):
        meter = Meter()
        taken = []

        def add():
            for _ in range(2000):
                meter.observe(BATCH_SAMPLES, 4)

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            taken.append(meter.take())
        taken.append(meter.take())
        assert sum(part.get((f"{BATCH_SAMPLES}_count", ()), 0) for part in taken) == 8000
        assert sum(part.get((f"{BATCH_SAMPLES}_bucket", (("le", "4"),)), 0) for part in taken) == 8000
        assert sum(part.get((f"{BATCH_SAMPLES}_bucket", (("le", "2"),)), 0) for part in taken) == 0


class TestEmitter:
    def test_lines_say_what_was_added(self):
        meter = Meter()
        meter.count(SAMPLES, 3)
        meter.count(ANSWERS, 1, (("code", "200"),))
        of_model = dict(OF_MODEL)
        assert emitted(meter) == [
            (SAMPLES, "Count", 3, of_model, "COUNTER"),
            (ANSWERS, "Count", 1, {**of_model, "code": "200"}, "COUNTER"),
        ]
        assert emitted(meter) == []

    @pytest.mark.parametrize("amount", [1e-9, 0.1 + 0.2, 12345.678901234, 123456789])
    def test_amounts_are_read_back(self, amount):
        meter = Meter()
        meter.count(SAMPLES, amount)
        ((_, _, value, _, _),) = emitted(meter)
        assert value == pytest.approx(amount, rel=1e-8)

    def test_nothing_is_written_when_nothing_was_added(self):
        texts = []
        Emitter(Meter(), OF_MODEL, write=texts.append).emit()
        assert texts == []

    def test_a_thread_writes_once_in_a_while(self):
        meter, written = Meter(), threading.Semaphore(0)
        emitter = Emitter(meter, OF_MODEL, write=lambda text: written.release(), period_s=0.01)
        emitter.start()
        for _ in range(3):
            meter.count(SAMPLES)
            assert written.acquire(timeout=DEADLINE_S)

    def test_standard_output_gets_whole_lines_at_once(self, capsys):
        meter = Meter()
        meter.observe(BATCH_SAMPLES, 1)
        Emitter(meter, OF_MODEL).emit()
        lines = capsys.readouterr().out.splitlines(keepends=True)
        assert len(lines) == 3 + len(metrics._BUCKETS[BATCH_SAMPLES])
        assert all(line.startswith("[METRICS]") and line.endswith("\n") for line in lines)


class TestDeclarations:
    def test_no_key_comes_twice(self):
        assert declared(StrictLoader) == declared()

    def test_all_that_can_be_emitted_is_declared_with_exactly_these_dimensions(self):
        meter = Meter()
        for stage in STAGES:
            meter.observe(STAGE_SECONDS, 0.1, (("stage", stage),))
        meter.observe(BATCH_SAMPLES, 3)
        meter.observe(PADDING_SHARE, 0.3)
        meter.count(SAMPLES, 3)
        meter.count(ANSWERS, 1, (("code", "200"),))
        # TorchServe takes the dimensions by their place.
        found = {name: (unit, list(dimensions)) for name, unit, _, dimensions, _ in emitted(meter)}
        assert found == declared()

    def test_what_a_worker_counts_is_declared(self, served_signature, fake_backend, picture):
        def fail(sample):
            raise RuntimeError

        service = Service()
        service._model = model = ServedModel(served_signature, fake_backend(fail))
        for body in (picture("dark"), b"junk"):
            service.handle([{"body": body}], Headerless())
        found = {name: list(dimensions) for name, _, _, dimensions, _ in emitted(model.meter)}
        assert found == {name: dimensions for name, (_, dimensions) in declared().items()}

    def test_a_worker_counts_samples_answers_and_every_stage(self, served_signature, brightness_backend, picture):
        service = Service()
        service._model = model = ServedModel(served_signature, brightness_backend, max_batch=2)
        service.handle([{"body": picture("dark")}] * 3 + [{"body": b"junk"}], Headerless())
        taken = model.meter.take()
        assert taken[SAMPLES, ()] == 3
        assert taken[ANSWERS, (("code", "200"),)] == 3
        assert taken[ANSWERS, (("code", "415"),)] == 1
        assert taken[f"{BATCH_SAMPLES}_count", ()] == 2
        assert taken[f"{BATCH_SAMPLES}_sum", ()] == 3
        assert taken[f"{PADDING_SHARE}_bucket", (("le", "0"),)] == 2
        stages = {labels[0][1] for name, labels in taken if name == f"{STAGE_SECONDS}_count"}
        assert stages == set(STAGES)


class Headerless:
    """The context of requests that declare nothing."""

    def get_all_request_header(self, idx):
        return {}

    def get_request_id(self, idx):
        return "id"

    def set_response_content_type(self, idx, value):
        pass

    def set_response_status(self, code, phrase, idx):
        pass
