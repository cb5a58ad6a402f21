"""What is sent in a comparison, and what counts as a right answer."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from handlers.decoder import build_decoder
from handlers.request import Part
from handlers.signature import TENSOR, TEXT_CLASSIFICATION, Signature
from handlers.tensors import Axis, TensorSpec
from loadtest.answers import UNREADABLE_ANSWER, WRONG_ANSWER
from loadtest.compare_answers import Expected, expect, judge_answer
from loadtest.compare_requests import generate_tensors, is_file, parse_lengths, parse_pictures, read_bodies
from loadtest.errors import PayloadError, PlanError
from loadtest.pictures import generate_pictures

IDS = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length"), minimum=5, maximum=9, padding=0)
SCALE = TensorSpec(name="scale", dtype="float32", shape=("batch", "length", 2), padding=0)
FLAG = TensorSpec(name="flag", dtype="bool", shape=("batch", 3))
LOGITS = TensorSpec(name="logits", dtype="float32", shape=("batch", 2))
AXES = {"length": Axis(minimum=2, maximum=40)}
TENSORS = Signature(task=TENSOR, inputs=(IDS, SCALE, FLAG), outputs=(LOGITS,), axes=AXES)
ONE_TENSOR = Signature(task=TENSOR, inputs=(IDS,), outputs=(LOGITS,), axes=AXES)
TEXTS = Signature(task=TEXT_CLASSIFICATION, inputs=(IDS,), outputs=(LOGITS,), axes=AXES, labels=("a", "b"))


def samples(bodies):
    assert all(body.content_type == "application/json" for body in bodies)
    documents = [json.loads(body.body) for body in bodies]
    assert all(set(document) == {"instances"} and len(document["instances"]) == 1 for document in documents)
    return [document["instances"][0] for document in documents]


class TestTensors:
    def test_they_are_what_the_signature_takes(self, tmp_path):
        bodies, source = read_bodies(TENSORS, tmp_path / "none.mar")
        decoder = build_decoder(TENSORS, max_samples=1)
        lengths = set()
        for body in bodies:
            decoded = decoder.decode([Part(value=body.body, content_type=body.content_type)])
            lengths.add(decoded.samples[0]["input_ids"].shape[0])
        assert min(lengths) == 2
        assert max(lengths) == 40
        assert source == "256 random samples, seed 0, length 2 to 40"

    def test_lengths_bound_them_and_the_seed_decides_them(self):
        first, second = (generate_tensors(TENSORS, lengths=(8, 16), seed=1) for _ in range(2))
        assert first == second != generate_tensors(TENSORS, lengths=(8, 16), seed=2)
        assert {len(sample["input_ids"]) for sample in first} == set(range(8, 17))

    def test_there_are_fewer_of_large_ones(self):
        large = TensorSpec(name="pixels", dtype="float32", shape=("batch", 3, 224, 224), minimum=0, maximum=1)
        signature = Signature(task=TENSOR, inputs=(large,), outputs=(LOGITS,))
        assert 8 <= len(generate_tensors(signature)) < 32
        assert len(generate_tensors(TENSORS)) == 256

    @pytest.mark.parametrize("lengths", [(1, 8), (8, 41)])
    def test_lengths_that_the_model_does_not_take_are_refused(self, lengths):
        with pytest.raises(PlanError, match="takes 2 to 40"):
            generate_tensors(TENSORS, lengths=lengths)

    @pytest.mark.parametrize("text", ["8", "8-", "16-8", "0-8", "a-b"])
    def test_lengths_that_are_none_are_refused(self, text):
        with pytest.raises(PlanError, match="like 8-64"):
            parse_lengths(text)

    def test_the_forms_of_json_become_one(self, tmp_path):
        sample = {"input_ids": [5, 6]}
        for number, document in enumerate([{"inputs": sample}, {"inputs": [sample]}, {"instances": [sample]}]):
            (tmp_path / f"{number}.json").write_text(json.dumps(document))
        (tmp_path / "bare.json").write_text('{"inputs": [5, 6]}')
        files = sorted(tmp_path.glob("?.json"))
        bodies, source = read_bodies(ONE_TENSOR, tmp_path / "none.mar", inputs=files)
        assert samples(bodies) == [sample] * 3
        assert source == "3 files"
        assert samples(read_bodies(ONE_TENSOR, tmp_path, inputs=[tmp_path / "bare.json"])[0]) == [[5, 6]]

    @pytest.mark.parametrize("content", ['{"inputs": [{}, {}]}', "[1]", '{"x": 1}', "{", '{"instances": [[1], [2]]}'])
    def test_what_holds_no_one_sample_is_refused(self, tmp_path, content):
        path = tmp_path / "input.json"
        path.write_text(content)
        with pytest.raises(PayloadError, match=r"input\.json"):
            read_bodies(ONE_TENSOR, tmp_path, inputs=[path])


class TestTexts:
    def test_a_line_is_a_text(self, tmp_path):
        path = tmp_path / "texts.txt"
        path.write_text('the first\n\n  "the" second é \n', encoding="utf-8")
        bodies, source = read_bodies(TEXTS, tmp_path, texts=path)
        assert samples(bodies) == ["the first", '"the" second é']
        assert source == "2 texts of texts.txt"

    def test_files_of_text_and_json_are_texts(self, tmp_path):
        (tmp_path / "a.txt").write_text("a text")
        (tmp_path / "b.json").write_text('{"inputs": ["another"]}')
        bodies, _ = read_bodies(TEXTS, tmp_path, inputs=[tmp_path / "a.txt", tmp_path / "b.json"])
        assert samples(bodies) == ["a text", "another"]

    def test_what_cannot_be_read_is_refused(self, tmp_path):
        (tmp_path / "empty.txt").write_text("\n")
        (tmp_path / "latin.txt").write_bytes(b"\xe4\n")
        for name, reason in (("empty", "no text"), ("latin", "not UTF-8"), ("none", "existing file")):
            with pytest.raises(PayloadError, match=reason):
                read_bodies(TEXTS, tmp_path, texts=tmp_path / f"{name}.txt")

    def test_options_of_other_tasks_are_refused(self, tmp_path):
        with pytest.raises(PlanError, match="--texts is for models of text-classification"):
            read_bodies(TENSORS, tmp_path, texts=tmp_path / "t.txt")
        with pytest.raises(PlanError, match="--lengths is for models of tensor"):
            read_bodies(TEXTS, tmp_path, lengths=(1, 2))
        with pytest.raises(PlanError, match="only one of"):
            read_bodies(TEXTS, tmp_path, lengths=(1, 2), texts=tmp_path / "t.txt")


class TestImages:
    def test_they_are_sent_as_they_are_and_golden_samples_by_default(self, signature, archive, picture, tmp_path):
        (tmp_path / "a.png").write_bytes(picture("dark"))
        (body,), _ = read_bodies(signature, archive, inputs=[tmp_path / "a.png"])
        assert (body.body, body.content_type) == (picture("dark"), "image/png")
        assert is_file(body)
        bodies, source = read_bodies(signature, archive)
        assert len(bodies) >= 3
        assert source == f"{len(bodies)} golden samples of {archive.name}"

    def test_photographs_can_be_generated(self, signature, archive):
        bodies, source = read_bodies(signature, archive, pictures=(40, 30), seed=3)
        assert {body.content_type for body in bodies} == {"image/jpeg"}
        assert len({body.body for body in bodies}) == len(bodies) == 64
        with Image.open(io.BytesIO(bodies[0].body)) as image:
            assert (image.format, image.size) == ("JPEG", (40, 30))
        assert source.startswith("64 generated JPEG photographs, 40 x 30, quality 90, seed 3, ")
        assert read_bodies(signature, archive, pictures=(40, 30), seed=3)[0] == bodies
        assert read_bodies(signature, archive, pictures=(40, 30), seed=4)[0] != bodies

    def test_files_of_two_kinds_are_refused(self, signature, archive, picture, tmp_path):
        (tmp_path / "a.png").write_bytes(picture("dark"))
        (tmp_path / "b.json").write_text('{"instances": [{"b64": ""}]}')
        with pytest.raises(PlanError, match="give files of one kind"):
            read_bodies(signature, archive, inputs=[tmp_path / "a.png", tmp_path / "b.json"])

    def test_other_models_take_no_photographs(self, tmp_path):
        with pytest.raises(PlanError, match="--pictures is for models of image-classification"):
            read_bodies(TEXTS, tmp_path, pictures=(8, 8))

    @pytest.mark.parametrize("text", ["224", "0x4", "4x", "ax4", "5000x10", "-4x4"])
    def test_sizes_that_are_none_are_refused(self, text):
        with pytest.raises(PlanError, match="like 224x224"):
            parse_pictures(text)

    def test_sizes(self):
        assert parse_pictures("320x240") == (320, 240)

    def test_photographs_are_as_large_as_real_ones(self):
        sizes = sorted(map(len, generate_pictures(24, height=224, width=224)))
        assert 8_000 < sizes[0] < sizes[-1] < 30_000


def prediction(*probabilities):
    top = [{"label": label, "probability": p} for label, p in zip("abc", probabilities, strict=False)]
    return {**top[0], "top_k": top}


class TestAnswers:
    def judge(self, document, expected):
        fault = judge_answer(200, json.dumps(document).encode(), expected)
        return None if fault is None else fault.kind

    def test_the_label_decides_unless_two_are_close(self):
        clear, close = Expected.of(prediction(0.9, 0.1)), Expected.of(prediction(0.51, 0.48, 0.01))
        b = {"predictions": [{"label": "b"}]}
        assert self.judge({"predictions": [{"label": "a"}]}, clear) is None
        assert self.judge([{"label": "a"}], clear) is None  # BentoML's form
        assert self.judge({"label": "a"}, clear) is None  # what a file is answered with
        assert self.judge(b, clear) == WRONG_ANSWER
        assert self.judge(b, close) is None
        assert self.judge({"predictions": [{"label": "c"}]}, close) == WRONG_ANSWER

    @pytest.mark.parametrize(
        "document", [{}, [], {"predictions": []}, {"error": {}}, [{"label": "a"}, {"label": "a"}], "a", 1, None]
    )
    def test_what_holds_no_one_prediction_is_unreadable(self, document):
        assert self.judge(document, Expected(labels=("a",))) == UNREADABLE_ANSWER

    @pytest.mark.parametrize(
        ("values", "kind"),
        [
            ([[1.0, -2.0]], None),
            ([[1.4, -2.4]], None),
            ([[1.6, -2.0]], WRONG_ANSWER),
            ([[1.0, None]], WRONG_ANSWER),
            ([1.0, -2.0], WRONG_ANSWER),
            ([[1.0, "x"]], UNREADABLE_ANSWER),
        ],
    )
    def test_outputs_are_close_or_wrong(self, values, kind):
        expected = Expected.of({"outputs": {"y": [[1.0, -2.0]]}})
        assert self.judge({"predictions": [{"outputs": {"y": values}}]}, expected) == kind
        assert self.judge({"predictions": [{"outputs": {"z": values}}]}, expected) == WRONG_ANSWER

    def test_small_outputs_may_differ_by_what_is_little_for_usual_ones(self):
        small, large = expect([{"outputs": {"y": [0.1, 0.0]}}, {"outputs": {"y": [4.0, 0.0]}}])
        assert self.judge({"outputs": {"y": [0.5, 0.0]}}, small) is None  # a quarter of 2, their root mean square
        assert self.judge({"outputs": {"y": [0.7, 0.0]}}, small) == WRONG_ANSWER
        assert self.judge({"outputs": {"y": [4.9, 0.0]}}, large) is None
        assert self.judge({"outputs": {"y": [0.1, 0.0]}}, large) == WRONG_ANSWER

    def test_nan_is_wrong_and_an_error_is_an_error(self):
        expected = Expected.of({"outputs": {"y": [0.0]}})
        body = json.dumps({"predictions": [{"outputs": {"y": [float("nan")]}}]}).encode()
        assert judge_answer(200, body, expected).kind == WRONG_ANSWER
        fault = judge_answer(503, b'{"message": "the queue is full"}', expected)
        assert (fault.kind, fault.detail) == ("HTTP 503", "the queue is full")
        assert np.isfinite(expected.outputs["y"]).all()
