"""Models of texts and tensors, from request bodies to answers, without an artifact."""

import io
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from handlers.errors import BackendError, GoldenError, InferenceError
from handlers.model import ServedModel
from handlers.request import Part
from handlers.signature import Signature

PAIR = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [
            {
                "name": "ids",
                "dtype": "int64",
                "shape": ["batch", "length"],
                "minimum": 1,
                "maximum": 9,
                "padding": 0,
            },
            {"name": "scale", "dtype": "float32", "shape": ["batch"], "minimum": 2, "maximum": 3},
        ],
        "outputs": [
            {"name": "scaled", "dtype": "float32", "shape": ["batch", "length"]},
            {"name": "total", "dtype": "int64", "shape": ["batch"]},
        ],
        "axes": {"length": {"minimum": 2, "maximum": 5}},
    }
)
TEXT = Signature.from_document(
    {
        "format_version": 1,
        "task": "text-classification",
        "inputs": [
            {"name": "input_ids", "dtype": "int64", "shape": ["batch", "length"], "maximum": 3},
            {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "length"]},
        ],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
        "labels": ["no", "yes"],
        "preprocessing": {"text": {"tokenizer": "tokenizer.json", "max_length": 6, "pad_id": 0}},
    }
)


class Scale:
    """Scales and sums; counts the shapes of its batches."""

    device = "cpu"

    def __init__(self):
        self.shapes = []

    def run(self, batch):
        ids, scale = batch["ids"], batch["scale"]
        assert (ids.dtype, scale.dtype) == (np.int64, np.float32)
        self.shapes.append(ids.shape)
        if (ids == 9).any():
            raise RuntimeError("cannot compute a 9")
        return {"scaled": (ids * scale[:, None]).astype(np.float32), "total": ids.sum(1)}


class CountGood:
    """Says yes if most of the tokens that count are good ones."""

    device = "cpu"

    def __init__(self):
        self.batches = []

    def run(self, batch):
        self.batches.append(batch)
        good = ((batch["input_ids"] == 2) * batch["attention_mask"]).sum(1)
        return {"logits": np.stack([batch["attention_mask"].sum(1) - good, good], axis=1).astype(np.float32)}


def ask(document):
    return [Part(value=json.dumps(document).encode(), content_type="application/json")]


def sample(*ids, scale=2):
    return {"ids": list(ids), "scale": scale}


class TestTensors:
    @pytest.fixture
    def backend(self):
        return Scale()

    @pytest.fixture
    def model(self, backend):
        return ServedModel(PAIR, backend, max_batch=4, identity={"model": "m", "version": "1"})

    def test_two_inputs_give_two_outputs(self, model):
        (answer,) = model.answer([ask({"inputs": sample(1, 2, 3)})])
        assert answer.body == {"outputs": {"scaled": [2.0, 4.0, 6.0], "total": 6}, "model": "m", "version": "1"}
        assert set(answer.outputs[0]) == {"scaled", "total"}

    def test_requests_of_different_lengths_share_a_batch_and_are_cut_back(self, model, backend):
        answers = model.answer([ask({"inputs": sample(*ids)}) for ids in ((1, 2), (1, 2, 3, 4), (5, 6, 7))])
        assert backend.shapes == [(3, 4)]
        assert [answer.body["outputs"]["scaled"] for answer in answers] == [[2, 4], [2, 4, 6, 8], [10, 12, 14]]

    @pytest.mark.parametrize("key", ["inputs", "instances"])
    def test_several_samples_are_answered_as_a_list(self, model, key):
        (answer,) = model.answer([ask({key: [sample(1, 2), sample(3, 4, scale=3)]})])
        assert [item["outputs"]["scaled"] for item in answer.body["predictions"]] == [[2, 4], [9, 12]]
        assert answer.body["model"] == "m"

    def test_a_bad_request_hurts_only_itself(self, model):
        bad = [sample(1), sample(1, 2, scale=4), sample(0, 1), {"ids": [1, 2]}, sample(1, 2.5), sample(True, 2)]
        answers = model.answer([ask({"inputs": item}) for item in (sample(1, 2), *bad, sample(3, 4))])
        assert [answer.error.code if answer.error else None for answer in answers] == [
            None,
            "wrong_size",
            "out_of_range",
            "out_of_range",
            "wrong_inputs",
            "not_integers",
            "not_numbers",
            None,
        ]
        assert answers[-1].body["outputs"]["total"] == 7

    def test_a_sample_that_the_backend_fails_on_is_lost_alone(self, model):
        answers = model.answer([ask({"inputs": sample(*ids)}) for ids in ((1, 2), (9, 9, 9), (3, 4))])
        assert [answer.error is None for answer in answers] == [True, False, True]
        assert answers[1].error.status == 500

    def test_compute_gives_rows_and_errors_in_order(self, model, backend):
        samples = [
            {"ids": np.array(ids), "scale": np.float32(2)} for ids in ([1, 2], [9, 9, 9], [3, 4, 5], [6, 7], [8, 8])
        ]
        rows = model.compute(samples)
        assert isinstance(rows[1], InferenceError)
        assert [rows[i]["total"] for i in (0, 2, 3, 4)] == [3, 12, 13, 16]
        assert (4, 3) in backend.shapes
        assert model.compute([]) == []

    def test_decode_gives_samples(self, model):
        (decoded,) = model.decode(ask({"inputs": sample(1, 2)}))
        assert (decoded["ids"].tolist(), decoded["scale"].shape) == ([1, 2], ())

    def test_warm_up_runs_the_extremes_of_the_axes(self, model, backend):
        model.warm_up()
        assert backend.shapes[::2] == [(1, 2), (2, 2), (4, 2), (1, 5), (4, 5)]
        assert backend.shapes[::2] == backend.shapes[1::2]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda out: out.pop("total"), "gives scaled; the signature says scaled, total"),
            (lambda out: out.update(more=1), "gives more, scaled, total"),
            (lambda out: out.update(total=out["total"].astype(np.int32)), "'total' is int32; the signature says int64"),
            (
                lambda out: out.update(scaled=out["scaled"][:, :1]),
                r"'scaled' has the shape \[1, 1\] for a batch of 1 \(length 2\); the signature says \[1, 2\]",
            ),
            (lambda out: out.update(total=out["total"][:, None]), r"'total' has the shape \[1, 1\]"),
            (lambda out: out.update(total=np.zeros(2, np.int64)), r"'total' has the shape \[2\] for a batch of 1"),
        ],
    )
    def test_outputs_unlike_the_signature_are_refused(self, change, message):
        class Wrong(Scale):
            def run(self, batch):
                outputs = super().run(batch)
                change(outputs)
                return outputs

        with pytest.raises(BackendError, match=message):
            ServedModel(PAIR, Wrong()).warm_up()

    def test_a_length_that_was_baked_in_is_refused(self):
        class Baked(Scale):
            def run(self, batch):
                if batch["ids"].shape[1] > 2:
                    raise RuntimeError("size mismatch")
                return super().run(batch)

        with pytest.raises(BackendError, match=r"fails on a batch of 1 \(length 5\): size mismatch"):
            ServedModel(PAIR, Baked()).warm_up()


class TestTexts:
    @pytest.fixture
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("archive")
        tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    @pytest.fixture
    def backend(self):
        return CountGood()

    @pytest.fixture
    def model(self, folder, backend):
        return ServedModel(TEXT, backend, max_batch=8, folder=folder)

    def test_texts_of_different_lengths_share_a_padded_batch(self, model, backend):
        answers = model.answer([ask({"inputs": text}) for text in ("good", "bad bad good", "", "good good bad")])
        assert [answer.body["label"] for answer in answers] == ["yes", "no", "no", "yes"]
        (batch,) = backend.batches
        assert sorted(batch["input_ids"].tolist()) == [[1, 0, 0], [2, 0, 0], [2, 2, 3], [3, 3, 2]]
        assert (batch["attention_mask"] == (batch["input_ids"] != 0)).all()

    def test_a_plain_text_body_is_answered(self, model):
        (answer,) = model.answer([[Part(value="good", content_type="text/plain")]])
        assert (answer.body["label"], answer.outputs[0]["logits"].shape) == ("yes", (2,))

    def test_a_bad_text_hurts_only_itself(self, model):
        answers = model.answer([ask({"inputs": "good"}), ask({"inputs": 1}), ask({"inputs": ["bad", "good"]})])
        assert [answer.body.get("label") for answer in answers] == ["yes", None, None]
        assert [item["label"] for item in answers[2].body["predictions"]] == ["no", "yes"]

    def test_warm_up_uses_tokens_and_masks_that_requests_may_have(self, model, backend):
        model.warm_up()
        shapes = [batch["input_ids"].shape for batch in backend.batches]
        assert set(shapes) == {(1, 1), (2, 1), (4, 1), (8, 1), (1, 6), (8, 6)}
        assert all((batch["attention_mask"] == 1).all() for batch in backend.batches)

    def test_golden_answers_are_repeated(self, model, folder, tmp_path):
        (tmp_path / "golden").mkdir()
        (tmp_path / "golden/0.json").write_text(json.dumps({"inputs": "good good"}))
        np.save(tmp_path / "golden/0.logits.npy", np.float32([0, 2]))
        golden = {
            "rtol": 0,
            "atol": {"logits": 0},
            "samples": [
                {
                    "file": "golden/0.json",
                    "content_type": "application/json",
                    "outputs": {"logits": "golden/0.logits.npy"},
                    "label": "yes",
                }
            ],
        }
        (tmp_path / "golden/expected.json").write_text(json.dumps(golden))
        assert model.replay(tmp_path) == 0
        np.save(tmp_path / "golden/0.logits.npy", np.float32([0, 3]))
        with pytest.raises(GoldenError, match="logits differs from the checkpoint's by up to 1"):
            model.replay(tmp_path)

    def test_a_cut_text_is_told_in_its_own_answer(self, model):
        answers = model.answer([ask({"inputs": "good " * 7}), ask({"inputs": ["bad", "bad " * 7]})])
        assert answers[0].body["truncated"] is True
        assert [item.get("truncated") for item in answers[1].body["predictions"]] == [None, True]

    def test_a_batch_of_all_forms_has_the_answers_of_each_alone(self, model):
        head = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["bad bad", "good"]}
        requests = [
            ask({"inputs": "good bad good"}),
            ask({"inputs": ["good", "bad " * 9], "parameters": {"top_k": 1}}),
            ask({"instances": ["", "good"]}),
            ask({"inputs": [head], "id": "7"}),
            ask({"inputs": 5}),
            [Part(value=b"good", content_type="text/plain")],
            [Part(value="good", content_type="text/plain", name="a"), Part(value=b"bad", content_type="", name="b")],
        ]
        alone = [model.answer([parts])[0].body for parts in requests]
        assert [answer.body for answer in model.answer(requests)] == alone
        assert [answer.body for answer in model.answer(requests[::-1])] == alone[::-1]
        assert alone[3]["outputs"][0]["data"] == ["no", "yes"]
        assert len(alone[1]["predictions"][0]["top_k"]) == 1


def test_a_batch_of_all_forms_of_tensors_has_the_answers_of_each_alone():
    """Models with one input take raw bytes as well."""

    class Double:
        device = "cpu"

        def run(self, batch):
            return {"y": batch["x"] * 2}

    signature = Signature.from_document(
        {
            "format_version": 1,
            "task": "tensor",
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "length"], "padding": 0}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", "length"]}],
            "axes": {"length": {"maximum": 9}},
        }
    )
    model = ServedModel(signature, Double(), max_batch=4)
    file = io.BytesIO()
    np.save(file, np.float32([[7, 8], [9, 10]]))
    requests = [
        ask({"inputs": [1, 2, 3]}),
        ask({"inputs": {"x": [4]}}),
        ask({"instances": [[5], {"x": [6, 7, 8, 9]}]}),
        ask({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}]}),
        [Part(value=np.float32([1, 2, 3, 4, 5]).tobytes(), content_type="application/octet-stream")],
        [Part(value=file.getvalue(), content_type="application/octet-stream")],
        [Part(value=b"\0", content_type="application/octet-stream")],
    ]
    alone = [model.answer([parts])[0].body for parts in requests]
    assert [answer.body for answer in model.answer(requests)] == alone
    assert [answer.body for answer in model.answer(requests[::-1])] == alone[::-1]
    assert alone[3]["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [2, 4, 6, 8]}]
    assert alone[4]["outputs"]["y"] == [2, 4, 6, 8, 10]
    assert [item["outputs"]["y"] for item in alone[5]["predictions"]] == [[14, 16], [18, 20]]
    assert alone[6]["error"]["code"] == "wrong_size"
