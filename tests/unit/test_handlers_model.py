import json
import logging
import os
import shutil
import threading
from functools import partial

import numpy as np
import pytest

from handlers.cost import CostModel, measure_cost
from handlers.errors import BackendError, GoldenError, LoadError, MalformedError, UnsupportedTypeError
from handlers.gpu_memory import MemoryWatch
from handlers.model import MAX_SAMPLES_PER_REQUEST, ServedModel
from handlers.request import Part

from .continuous_worker import TRIPLE
from .fake_gpu import GIB, FakeGpu, out_of_memory

BAD = [Part(value=b"not an image", content_type="image/png")]
LABELS = ("dark", "mid", "bright")


def json_request(*levels, key="inputs"):
    """Several samples in one request, each a grey level."""
    document = {key: [np.full((8, 8), level).tolist() for level in levels]}
    return [Part(value=json.dumps(document).encode(), content_type="application/json")]


@pytest.fixture
def model(served_signature, brightness_backend):
    return ServedModel(served_signature, brightness_backend, max_batch=4, identity={"model": "m", "version": "2"})


def test_an_answer_carries_label_top_k_and_identity(model, png_request):
    (answer,) = model.answer([png_request("bright")])
    assert answer.error is None
    assert answer.body["label"] == "bright"
    assert len(answer.body["top_k"]) == 3
    assert (answer.body["model"], answer.body["version"]) == ("m", "2")
    assert answer.outputs[0]["logits"].shape == (3,)


def test_answers_keep_the_order_of_the_requests(model, png_request):
    order = ["bright", "dark", "mid", "mid", "dark", "bright", "dark"]
    answers = model.answer([png_request(label) for label in order])
    assert [answer.body["label"] for answer in answers] == order


def test_requests_are_decoded_at_once_where_that_is_wanted(
    served_signature, brightness_backend, png_request, monkeypatch
):
    model = ServedModel(served_signature, brightness_backend, decoding=2)
    read, together = model.read, threading.Barrier(2)

    def read_beside_another(parts):
        together.wait(60)
        return read(parts)

    monkeypatch.setattr(model, "read", read_beside_another)
    order = ["bright", "dark", "mid", "mid"]
    assert [answer.body["label"] for answer in model.answer([png_request(label) for label in order])] == order


@pytest.mark.parametrize(("cores", "decoders"), [({0}, None), ({0, 1, 2}, 3), (set(range(64)), 8)])
def test_images_are_decoded_on_every_core_within_bounds(extracted, monkeypatch, cores, decoders):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: cores)
    pool = ServedModel.load(extracted, threads=1, decoding=0).decoders
    assert (pool and pool._max_workers) == decoders
    assert ServedModel.load(extracted, threads=1).decoders is None


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="the system has no such scheduling classes")
def test_threads_that_decode_interrupt_nobody(extracted):
    decoders = ServedModel.load(extracted, threads=1, decoding=2).decoders
    assert decoders.submit(os.sched_getscheduler, 0).result() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize(("seconds", "enough"), [(0.0019, True), (0.0021, False)])
def test_one_thread_does_where_a_sample_of_a_full_batch_costs_little(model, seconds, enough):
    model._cost = CostModel(call=seconds)  # of four samples
    assert model.wants_one_thread() is enough


def test_sizes_count_in_what_a_sample_costs(brightness_backend):
    model = ServedModel(TRIPLE, brightness_backend, max_batch=1)  # of 1 to 64 positions
    model._cost = CostModel(call=0.0, position=0.0005 / 32)
    assert model.wants_one_thread() is False
    model._cost = CostModel(call=0.0, position=0.0005 / 33)
    assert model.wants_one_thread() is True


def test_a_runtime_that_keeps_other_threads_waiting_gets_one(model):
    model.backend.holds_lock = True  # at a cost that nobody measured
    assert model.wants_one_thread() is True
    model.backend.holds_lock = False
    assert model.wants_one_thread() is False


def test_a_gpu_leaves_the_cpu_to_other_threads(model):
    model._cost = CostModel(call=0.0001)
    assert model.wants_one_thread() is True
    model.backend.device = "cuda"
    assert model.wants_one_thread() is False


def test_the_oldest_of_the_batches_that_compute_tells_since_when(model, brightness_backend):
    assert model.busy_since is None
    model._runner._began.update({1: 5.0, 2: 3.0})
    assert model.busy_since == 3.0
    model._runner._began.clear()
    model.compute([{"image": np.zeros((3, 4, 4), np.float32)}])
    assert model.busy_since is None


def test_a_second_thread_warms_up_as_far_as_it_can(model, brightness_backend, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("torchport"), "propagate", True)
    model.warm_up_beside()
    assert brightness_backend.batch_sizes == [1, 1, 2, 2, 4, 4]
    monkeypatch.setattr(brightness_backend, "run", lambda batch: (_ for _ in ()).throw(out_of_memory()))
    model.warm_up_beside()
    assert (
        "a second thread that computes could not be warmed up: the model fails on a batch of 1: CUDA out of memory"
        in (caplog.text)
    )


def test_a_model_of_unknown_cost_gets_several_threads(model):
    assert model.wants_one_thread() is False


def test_a_bad_request_hurts_only_itself(model, png_request):
    answers = model.answer([png_request("dark"), BAD, png_request("bright"), [], png_request("mid")])
    assert [answer.body.get("label") for answer in answers] == ["dark", None, "bright", None, "mid"]
    assert answers[1].body == {"error": {"code": "unsupported_image", "message": answers[1].error.message}}
    assert answers[3].error.code == "empty_request"


def test_only_bad_requests_never_reach_the_backend(model, brightness_backend):
    model.answer([BAD, BAD])
    assert brightness_backend.batch_sizes == []


def test_no_requests_have_no_answers(model):
    assert model.answer([]) == []


def test_more_than_the_largest_batch_runs_in_pieces(model, brightness_backend, png_request):
    model.answer([png_request("dark")] * 10)
    assert (sum(brightness_backend.batch_sizes), len(brightness_backend.batch_sizes)) == (10, 3)
    assert max(brightness_backend.batch_sizes) == 4


def test_several_samples_in_one_request_are_a_list_in_order(model, png_request):
    many, one = model.answer([json_request(0, 255, 128), png_request("mid")])
    assert [item["label"] for item in many.body["predictions"]] == ["dark", "bright", "mid"]
    assert (many.body["model"], len(many.outputs)) == ("m", 3)
    assert one.body["label"] == "mid"


def test_kserve_answers_a_list_for_one_instance(model):
    (answer,) = model.answer([json_request(0, key="instances")])
    assert [item["label"] for item in answer.body["predictions"]] == ["dark"]


def test_multipart_fields_are_answered_in_order(model, png_request):
    (answer,) = model.answer([png_request("bright") + png_request("dark")])
    assert [item["label"] for item in answer.body["predictions"]] == ["bright", "dark"]


def test_too_many_samples_are_refused(model):
    (answer,) = model.answer([json_request(*[0] * (MAX_SAMPLES_PER_REQUEST + 1))])
    assert (answer.error.status, answer.error.code) == (413, "too_many_samples")


def fails_on_bright(sample):
    if sample.mean() > 1:
        raise RuntimeError("cannot compute this one")
    return np.array([1.0, 0, 0])


def test_a_sample_that_the_backend_fails_on_is_lost_alone(served_signature, fake_backend, png_request):
    model = ServedModel(served_signature, fake_backend(fails_on_bright), max_batch=8)
    answers = model.answer([png_request(label) for label in ("dark", "dark", "bright", "dark", "dark")])
    assert [answer.error is None for answer in answers] == [True, True, False, True, True]
    assert (answers[2].error.status, answers[2].error.code) == (500, "inference_failed")
    assert "cannot compute" in str(answers[2].error.__cause__)
    assert "cannot compute" not in json.dumps(answers[2].body)


def test_a_request_fails_whole_when_one_of_its_samples_fails(served_signature, fake_backend, png_request):
    model = ServedModel(served_signature, fake_backend(fails_on_bright))
    answers = model.answer([json_request(0, 255), png_request("dark")])
    assert [answer.error is None for answer in answers] == [False, True]


def test_an_output_that_is_not_finite_fails_alone(served_signature, fake_backend, png_request):
    backend = fake_backend(lambda sample: np.array([np.nan if sample.mean() > 1 else 1.0, 0, 0]))
    answers = ServedModel(served_signature, backend).answer([png_request("bright"), png_request("dark")])
    assert answers[0].error.code == "model_output_not_finite"
    assert answers[1].body["label"] == "dark"


class DropsRows:
    """A model that merges samples when it gets several."""

    device = "cpu"

    def run(self, batch):
        return {"logits": np.float32([[1, 0, 0]])}


def test_rows_that_do_not_match_the_batch_never_reach_other_requests(served_signature, png_request):
    answers = ServedModel(served_signature, DropsRows()).answer([png_request("dark")] * 4)
    assert [answer.body["label"] for answer in answers] == ["dark"] * 4


def test_decode_gives_the_input_tensor_or_raises(model, png_request):
    (sample,) = model.decode(png_request("dark"))
    assert sample["image"].shape == (1, 8, 8)
    with pytest.raises(MalformedError):
        model.decode([])


class Slot:
    """A compute slot that notes when it is taken and left."""

    def __init__(self, events):
        self._events = events

    def __enter__(self):
        self._events.append("taken")

    def __exit__(self, *error):
        self._events.append("left")


def test_the_slot_is_held_while_the_model_computes_and_no_longer(served_signature, fake_backend, png_request):
    events = []

    def compute(sample):
        events.append("computes")
        return np.array([1.0, 0, 0])

    model = ServedModel(served_signature, fake_backend(compute), max_batch=1, slot=Slot(events))
    model.answer([BAD])
    assert events == []
    model.answer([png_request("dark"), BAD, png_request("dark")])
    assert events == ["taken", "computes", "computes", "left"]
    model.run(model.decode(png_request("dark")))
    assert events[4:] == ["taken", "computes", "left"]


def test_the_slot_is_left_when_the_model_fails(served_signature, fake_backend, png_request):
    events = []
    ServedModel(served_signature, fake_backend(fails_on_bright), slot=Slot(events)).answer([png_request("bright")])
    assert events == ["taken", "left"]


def test_one_request_after_another_is_what_a_batch_of_them_is(model, png_request):
    """The way of the continuous worker: read, plan, run, build_answer."""
    requests = [json_request(0, 255, 128), png_request("mid"), BAD, png_request("dark")]
    decoded = [model.read(parts) for parts in requests]
    assert isinstance(decoded.pop(2), MalformedError | UnsupportedTypeError)
    samples = [sample for item in decoded for sample in item.samples]
    rows = {}
    for indices in model.plan(samples):
        rows.update(zip(indices, model.run([samples[i] for i in indices]), strict=True))
    places = [range(3), range(3, 4), range(4, 5)]
    answers = [model.build_answer(item, [rows[i] for i in place]) for item, place in zip(decoded, places, strict=True)]
    expected = model.answer(requests)
    assert [answer.body for answer in answers] == [expected[i].body for i in (0, 1, 3)]


def test_the_time_of_a_batch_is_expected_by_what_was_measured(served_signature, fake_backend, monkeypatch):
    clock = [100.0]

    def compute(sample):
        clock[0] += 0.25
        return np.array([1.0, 0, 0])

    model = ServedModel(served_signature, fake_backend(compute), max_batch=8)
    sample = {"image": np.zeros((1, 8, 8), np.float32)}
    monkeypatch.setattr("handlers.model.measure_cost", partial(measure_cost, clock=lambda: clock[0]))
    cost = model.measure_cost(limit_s=60)
    assert cost.seconds(4, 1) == pytest.approx(1.0, rel=1e-4)
    assert model.expected_seconds([sample] * 3) == pytest.approx(0.75, rel=1e-4)


class Gpu:
    """A backend on a GPU whose memory holds so many positions, and as many as that of a batch's outputs."""

    device = "cuda"
    holds_lock = False

    def __init__(self, positions, error=None):
        self.positions = positions
        self.error = error or out_of_memory()
        self.shapes = []
        self.freed = 0

    def run(self, batch):
        self.shapes.append(batch["x"].shape)
        if batch["x"].size > self.positions:
            raise self.error
        return {"y": batch["x"] * 3}

    def free_memory(self):
        self.freed += 1


def rows_of(*lengths):
    return [{"x": np.full(length, i, np.float32)} for i, length in enumerate(lengths)]


class TestGpuWithoutMemory:
    @pytest.fixture(autouse=True)
    def log(self, caplog, monkeypatch):
        """Lines of the log; another test may have kept them from caplog."""
        monkeypatch.setattr(logging.getLogger("torchport"), "propagate", True)
        caplog.set_level(logging.WARNING, "torchport")
        return caplog

    @pytest.mark.parametrize(
        "error", [out_of_memory(), RuntimeError("Failed to allocate memory for requested buffer of size 12")]
    )
    def test_a_batch_that_does_not_fit_is_halved_and_its_size_not_planned_again(self, log, error):
        backend = Gpu(positions=3 * 8, error=error)
        model = ServedModel(TRIPLE, backend, max_batch=8)
        samples = rows_of(*[8] * 8)
        for row, sample in zip(model.compute(samples), samples, strict=True):
            np.testing.assert_array_equal(row["y"], sample["x"] * 3)
        assert [shape[0] for shape in backend.shapes] == [8, 4, 2, 2, 4, 2, 2]
        assert backend.freed == 3
        backend.shapes.clear()
        model.compute(samples)
        assert [shape[0] for shape in backend.shapes] == [2, 2, 2, 2]
        assert (
            log.records[-1]
            .getMessage()
            .startswith(
                "the GPU's memory did not hold a batch of 4 samples with 8 positions each; such batches have at most 2 "
            )
        )

    def test_shorter_samples_still_run_together(self):
        backend = Gpu(positions=8 * 8)
        model = ServedModel(TRIPLE, backend, max_batch=8)
        model.compute(rows_of(*[16] * 8))
        backend.shapes.clear()
        model.compute(rows_of(*[8] * 8))
        assert backend.shapes == [(8, 8)]

    def test_a_sample_that_is_too_large_alone_has_an_error_of_its_own(self):
        backend = Gpu(positions=10)
        rows = ServedModel(TRIPLE, backend, max_batch=4).compute(rows_of(4, 12, 5))
        assert [isinstance(row, dict) for row in rows] == [True, False, True]
        assert (rows[1].status, rows[1].code) == (500, "out_of_memory")
        assert "send a smaller one" in rows[1].message
        assert rows[1].__cause__ is backend.error

    def test_what_failed_of_memory_is_let_go_before_the_next_one_runs(self):
        freed = []

        class Tensor:
            def __del__(self):
                freed.append(True)

        class Keeps(Gpu):
            def run(self, batch):
                tensor = Tensor()
                assert len(freed) == len(self.shapes)
                return super().run(batch) if tensor else None

        backend = Keeps(positions=0)
        rows = ServedModel(TRIPLE, backend, max_batch=1).compute(rows_of(2, 3))
        assert [row.code for row in rows] == ["out_of_memory"] * 2
        assert len(freed) == 2

    def test_other_failures_are_halved_and_not_remembered(self, log):
        backend = Gpu(positions=16, error=RuntimeError("kernel broke"))
        model = ServedModel(TRIPLE, backend, max_batch=4)
        for _ in range(2):
            model.compute(rows_of(*[8] * 4))
            assert [shape[0] for shape in backend.shapes] == [4, 2, 2]
            backend.shapes.clear()
        assert (backend.freed, log.records) == (0, [])
        (row,) = model.compute(rows_of(17))
        assert row.code == "inference_failed"

    def test_the_cpu_keeps_its_own_error(self):
        backend = Gpu(positions=10)
        backend.device = "cpu"
        (row,) = ServedModel(TRIPLE, backend).compute(rows_of(12))
        assert (row.code, backend.freed) == ("inference_failed", 0)


class TestMemoryOfTheGpu:
    def model(self, positions=1000, *, free=10 * GIB):
        """A model of which each position takes 0.1 GiB."""
        gpu = FakeGpu(free=free)
        watch = MemoryWatch(gpu)
        backend = Gpu(positions)
        run = backend.run

        def take(batch):
            gpu.take(max(0, round(batch["x"].size * 0.1 * GIB) - gpu.reserved_bytes))
            return run(batch)

        backend.run = take
        return ServedModel(TRIPLE, backend, max_batch=2, memory=watch)  # of 1 to 64 positions

    def test_a_model_with_room_is_warmed_up(self):
        self.model(free=20 * GIB).warm_up()

    def test_one_that_leaves_none_is_refused_with_a_figure(self):
        with pytest.raises(LoadError, match=r"needs 13\.4 GiB for batches of 2, and GPU 1 has 13\.0 GiB free; set a l"):
            self.model(free=13 * GIB).warm_up()

    def test_one_that_runs_out_of_it_is_refused_with_a_figure(self):
        with pytest.raises(LoadError, match=r"needs 14\.8 GiB for batches of 2, and GPU 1 has 13\.0 GiB free; set a l"):
            self.model(127, free=13 * GIB).warm_up()

    def test_other_failures_are_told_as_ever(self):
        model = self.model(127)
        model.backend.error = ValueError("broken")
        with pytest.raises(BackendError, match=r"fails on a batch of 2 \(length 64\): broken"):
            model.warm_up()


class TestWarmUp:
    def test_every_power_of_two_and_the_largest_batch_run_twice(self, served_signature, brightness_backend):
        ServedModel(served_signature, brightness_backend, max_batch=6).warm_up()
        assert brightness_backend.batch_sizes == [1, 1, 2, 2, 4, 4, 6, 6]

    def test_a_model_that_fails_is_refused(self, served_signature, fake_backend):
        def fail(sample):
            raise ValueError("broken")

        with pytest.raises(BackendError, match="fails on a batch of 1: broken"):
            ServedModel(served_signature, fake_backend(fail)).warm_up()

    def test_another_shape_than_the_signature_says_is_refused(self, served_signature, fake_backend):
        with pytest.raises(BackendError, match=r"has the shape \[1, 2\].*the signature says \[1, 3\]"):
            ServedModel(served_signature, fake_backend(lambda sample: np.zeros(2))).warm_up()

    def test_a_batch_size_that_was_baked_in_is_refused(self, served_signature):
        with pytest.raises(BackendError, match=r"has the shape \[1, 3\] for a batch of 2"):
            ServedModel(served_signature, DropsRows()).warm_up()


class TestLoadAndReplay:
    @pytest.fixture
    def folder(self, extracted, tmp_path):
        return shutil.copytree(extracted, tmp_path / "archive")

    def test_an_archive_repeats_its_golden_answers(self, extracted):
        model = ServedModel.load(extracted, threads=1)
        model.warm_up()
        assert model.replay(extracted) < 1e-4

    def test_the_backend_gets_the_gpu_and_the_largest_batch(self, extracted, brightness_backend, monkeypatch):
        given = {}

        def build(signature, folder, **options):
            given.update(options)
            return brightness_backend

        monkeypatch.setattr("handlers.model.build_backend", build)
        ServedModel.load(extracted, threads=1, max_batch=5, gpu=3)
        assert given == {"threads": 1, "gpu": 3, "gpu_memory_bytes": None, "max_batch": 5}
        # CUDA graphs are captured up to the largest batch; 0 is none.
        ServedModel.load(extracted, threads=1, max_batch=5, gpu=3, cuda_graphs=False)
        assert given["max_batch"] == 0

    def test_weights_that_the_gpu_does_not_hold_are_told_with_a_figure(self, extracted, monkeypatch):
        def fail(*arguments, **options):
            raise BackendError("model.pt is not a TorchScript file that torch loads") from out_of_memory()

        monkeypatch.setattr("handlers.model.build_backend", fail)
        monkeypatch.setattr(
            "handlers.model.watch_memory", lambda artifact, gpu, *limit: MemoryWatch(FakeGpu(gpu), *limit)
        )
        with pytest.raises(LoadError, match=r"the model needs 2\.0 GiB for its weights, and GPU 3 has 10\.0 GiB free"):
            ServedModel.load(extracted, threads=1, gpu=3)
        with pytest.raises(LoadError, match=r"for its weights, and the worker may take 1\.0 GiB of GPU 3"):
            ServedModel.load(extracted, threads=1, gpu=3, gpu_memory_bytes=1 << 30)

    def change(self, folder, change):
        path = folder / "golden/expected.json"
        document = json.loads(path.read_text())
        change(document["samples"])
        path.write_text(json.dumps(document))

    def test_another_golden_output_is_refused(self, folder):
        path = folder / json.loads((folder / "golden/expected.json").read_text())["samples"][1]["outputs"]["logits"]
        np.save(path, np.load(path) + np.float32([0.1, 0, 0]))
        with pytest.raises(GoldenError, match=r"differs from the checkpoint's by up to 0\.1"):
            ServedModel.load(folder, threads=1).replay(folder)

    def test_another_golden_label_is_refused(self, folder):
        self.change(folder, lambda samples: samples[0].update(label="other"))
        with pytest.raises(GoldenError, match="'other'"):
            ServedModel.load(folder, threads=1).replay(folder)

    def test_a_golden_file_that_is_missing_is_refused(self, folder):
        (folder / "golden/000.png").unlink()
        with pytest.raises(GoldenError, match=r"golden/000\.png cannot be read"):
            ServedModel.load(folder, threads=1).replay(folder)

    def test_a_golden_file_that_is_no_image_is_refused(self, folder):
        (folder / "golden/000.png").write_bytes(b"no image")
        with pytest.raises(GoldenError, match=r"golden/000\.png is refused"):
            ServedModel.load(folder, threads=1).replay(folder)

    def test_a_golden_file_with_several_samples_is_refused(self, folder):
        (part,) = json_request(0, 255)
        (folder / "golden/000.png").write_bytes(part.value)
        self.change(folder, lambda samples: samples[0].update(content_type="application/json"))
        with pytest.raises(GoldenError, match="holds a list of samples"):
            ServedModel.load(folder, threads=1).replay(folder)

    @pytest.mark.parametrize("content", [None, b"{", b"{}", b"\xff"])
    def test_a_broken_signature_is_refused(self, folder, content):
        (folder / "signature.json").unlink()
        if content is not None:
            (folder / "signature.json").write_bytes(content)
        with pytest.raises(LoadError, match=r"signature\.json cannot be used"):
            ServedModel.load(folder, threads=1)

    def test_a_signature_without_an_artifact_is_refused(self, folder, signature):
        (folder / "signature.json").write_text(json.dumps(signature.to_document()))
        with pytest.raises(BackendError, match="names no artifact; export the model first"):
            ServedModel.load(folder, threads=1)
