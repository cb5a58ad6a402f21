"""Evaluation and calibration data: from files of the user's, from the checkpoint's own source, or random."""

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import EvaluationError
from export.evaluation import load_calibration, load_evaluation, random_requests
from export.table import Columns
from handlers.decoder import build_decoder
from handlers.request import Part
from handlers.signature import Signature
from models import tickets
from models.digits import EVALUATION_SOURCE, evaluation_samples
from models.signature import text_classification_signature
from models.ticket_phrases import QUEUES

TENSORS = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["batch", 2]},
            {"name": "n", "dtype": "int64", "shape": ["batch"], "minimum": 0, "maximum": 4},
        ],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 3]}],
    }
)
OPTIONS = {"seed": 3, "held_out_fraction": 0.1, "validation_fraction": 0.1}


@pytest.fixture
def folder(evaluation_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(evaluation_folder, tmp_path / "images")


@pytest.fixture
def digits(signature: Signature) -> Signature:
    return replace(signature, labels=tuple("0123456789"))


@pytest.fixture
def texts() -> Signature:
    return Signature.from_document(
        text_classification_signature(QUEUES, tokenizer="tokenizer.json", vocab_size=300, max_length=16, pad_id=0)
    )


def decoded(signature: Signature, parts: list[Part]) -> Any:
    (sample,) = build_decoder(signature, max_samples=1).decode(parts).samples
    return sample


def from_folder(folder: Path, signature: Signature) -> Any:
    return load_evaluation(signature, data=folder, source={"source": "the folder wins:over this"})


def from_source(signature: Signature, source: str = EVALUATION_SOURCE, options: object = None) -> Any:
    return load_evaluation(signature, data=None, source={"source": source, "options": options or OPTIONS})


def test_nothing_known_is_nothing(signature: Signature) -> None:
    assert load_evaluation(signature, data=None, source=None) == []


class TestFolder:
    def test_sub_folders_name_the_labels_and_bodies_are_the_files(self, folder: Path, signature: Signature) -> None:
        requests = from_folder(folder, signature)
        assert [signature.labels[request.label] for request in requests] == ["bright"] * 4 + ["dark"] * 4 + ["mid"] * 4
        assert requests[5].body == (folder / "dark/1.png").read_bytes()
        (part,) = requests[5].parts()
        assert (part.value, part.content_type) == (requests[5].body, "image/png")

    def test_png_and_jpeg_count_and_other_files_do_not(
        self, folder: Path, signature: Signature, encode: Callable[..., bytes]
    ) -> None:
        shutil.rmtree(folder / "mid")
        shutil.rmtree(folder / "dark")
        jpeg = encode(np.zeros((8, 8), dtype=np.uint8), format="JPEG")
        (folder / "bright" / "a.JPG").write_bytes(jpeg)
        (folder / "bright" / "b.jpeg").write_bytes(jpeg)
        (folder / "bright" / "Thumbs.db").write_bytes(b"x")
        (folder / "README.txt").write_bytes(b"x")
        types = [request.content_type for request in from_folder(folder, signature)]
        assert types == ["image/png"] * 4 + ["image/jpeg"] * 2

    def test_a_missing_folder_is_named(self, tmp_path: Path, signature: Signature) -> None:
        with pytest.raises(EvaluationError, match=r"there is no folder .*nope; images come in one sub-folder"):
            from_folder(tmp_path / "nope", signature)

    def test_an_unknown_label_is_named_with_the_known_ones(self, folder: Path, signature: Signature) -> None:
        (folder / "Dark").mkdir()
        with pytest.raises(EvaluationError, match=r"images/Dark is not named after a label; the labels are dark, mid"):
            from_folder(folder, signature)

    @pytest.mark.parametrize("label", [None, "dark"])
    def test_no_files_are_refused(self, tmp_path: Path, signature: Signature, label: str | None) -> None:
        if label:
            (tmp_path / label).mkdir()
        with pytest.raises(EvaluationError, match="holds no PNG or JPEG files in sub-folders named after labels"):
            from_folder(tmp_path, signature)

    def test_a_file_that_cannot_be_read_is_named(self, folder: Path, signature: Signature) -> None:
        (folder / "mid" / "x.png").symlink_to("nowhere")
        with pytest.raises(EvaluationError, match=r"mid/x\.png cannot be read: No such file"):
            from_folder(folder, signature)


class TestSource:
    def test_the_digits_come_as_png_with_their_labels(self, digits: Signature) -> None:
        requests = from_source(digits)
        samples = list(evaluation_samples(**OPTIONS))  # type: ignore[arg-type]
        assert [request.label for request in requests] == [index for _, index in samples]
        sample = decoded(digits, requests[7].parts())["image"]
        assert np.array_equal(np.rint((sample[0] * 0.25 + 0.5) * 255).astype(np.uint8), samples[7][0])

    def test_texts_come_as_json(self, texts: Signature) -> None:
        options = {"seed": 0, "count": 200}
        requests = from_source(texts, "models.tickets:evaluation_samples", options)
        samples = list(tickets.evaluation_samples(**options))
        assert [request.label for request in requests] == [index for _, index in samples]
        assert json.loads(requests[3].body) == {"inputs": samples[3][0]}
        assert requests[3].content_type == "application/json"

    def test_a_class_without_a_label_is_refused(self, signature: Signature) -> None:
        with pytest.raises(EvaluationError, match=r"gives the class \d; there are 3 labels"):
            from_source(signature)

    @pytest.mark.parametrize(
        "options",
        [{"seed": 0, "split": "nope"}, {"speed": 1}, {"seed": 0, "held_out_fraction": 7}, {1: 2}, [1], {"seed": "x"}],
    )
    def test_a_source_that_raises_is_refused_in_one_sentence(self, digits: Signature, options: object) -> None:
        with pytest.raises(EvaluationError, match=r"models\.digits:evaluation_samples fails to give") as caught:
            from_source(digits, options=options)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("source", ["os:system", "models.convnet:build_conv_classifier;", "x", "None"])
    def test_a_checkpoint_cannot_choose_what_is_called(self, digits: Signature, source: str) -> None:
        with pytest.raises(EvaluationError, match=r"asks to call .* give --eval DATA"):
            from_source(digits, source=source)

    @pytest.mark.parametrize(
        ("samples", "message"),
        [
            ([], "gives no evaluation data"),
            ([(np.zeros((8, 8), np.uint8), -1)], "gives the class -1"),
            ([(np.zeros((8, 8), np.float32), 0)], "must be uint8 arrays, not float32"),
            ([(np.zeros((2, 8, 8, 7), np.uint8), 0)], "fails to give the evaluation data"),
            ([3], "fails to give the evaluation data"),
        ],
    )
    def test_samples_that_are_none_are_refused(
        self, digits: Signature, monkeypatch: pytest.MonkeyPatch, samples: list[Any], message: str
    ) -> None:
        monkeypatch.setattr("models.digits.evaluation_samples", lambda **options: iter(samples))
        with pytest.raises(EvaluationError, match=message):
            from_source(digits)


class TestTable:
    def load(self, path: Path, signature: Signature, columns: str | None = None) -> Any:
        parsed = None if columns is None else Columns.parse(columns)
        return load_evaluation(signature, data=path, source=None, columns=parsed)

    @pytest.mark.parametrize(
        ("name", "content", "columns"),
        [
            (
                "a.csv",
                'label,text\nbilling,"Hello, ""you"""\n\nsales,two\n',
                None,
            ),
            ("a.csv", 'billing,"Hello, ""you"""\nsales,two\n', "1,0"),
            ("a.tsv", 'Hello, "you"\tbilling\ntwo\tsales\n', None),
            ("a.tsv", 'body\tqueue\tid\nHello, "you"\tbilling\t7\ntwo\tsales\t8\n', "body,queue"),
            ("a.tsv", 'a\tb\tqueue\nHello,\t"you"\tbilling\ntwo\t\tsales\n', "a+b,queue"),
            (
                "a.jsonl",
                '{"text": "Hello, \\"you\\"", "label": "billing"}\n\n{"text": "two", "label": "sales", "x": 1}\n',
                None,
            ),
            ("a.ndjson", '{"body": "Hello, \\"you\\"", "queue": 0}\n{"body": "two", "queue": "1"}\n', "body,queue"),
        ],
    )
    def test_every_form_gives_the_same_requests(
        self, tmp_path: Path, texts: Signature, name: str, content: str, columns: str | None
    ) -> None:
        texts = replace(texts, labels=("billing", "sales", *texts.labels[2:]))
        (tmp_path / name).write_text(content)
        requests = self.load(tmp_path / name, texts, columns)
        assert [json.loads(request.body)["inputs"].strip() for request in requests] == ['Hello, "you"', "two"]
        assert [request.label for request in requests] == [0, 1]
        assert requests[0].where.startswith(f"{tmp_path / name}, line ")

    def test_a_compressed_file_is_read(self, tmp_path: Path, texts: Signature) -> None:
        with gzip.open(tmp_path / "a.tsv.gz", "wt") as file:
            file.write(f"text\tlabel\nhi\t{texts.labels[2]}\n")
        (request,) = self.load(tmp_path / "a.tsv.gz", texts)
        assert request.label == 2

    @pytest.mark.parametrize(
        ("name", "content", "columns", "message"),
        [
            ("a.txt", "x", None, r"a\.txt is no table that torchport reads; the name must end in \.csv, \.tsv"),
            ("a.csv", "", None, r"a\.csv holds no row"),
            ("a.csv", "text,label\n", None, r"a\.csv holds no row"),
            ("a.csv", "sentence,mood,id\nx,y,z\n", None, r"the columns 'sentence', 'mood', 'id', and none called"),
            ("a.csv", "sentence,mood\nx,sales\n", "sentence,modd", r"has no column 'modd'; its columns are 'sentence'"),
            ("a.csv", "text,label\nx\n", None, r"line 2, has 1 columns, and column 2 is wanted"),
            ("a.csv", "text,label\nx,spam\n", None, r"line 2, has the label 'spam', which the model does not know"),
            ("a.csv", "text,label\nx,99\n", None, r"has the label '99'"),
            ("a.csv", 'text,label\n"x,sales\n', None, r"is not a well-formed table"),
            ("a.jsonl", "{}\n", None, r"line 1, has no 'text'; its keys are"),
            ("a.jsonl", "[1]\n", None, r"line 1, is not a JSON object"),
            ("a.jsonl", '{"text": 1, "label": 0}\n', None, r"line 1, has a text that is not a string"),
            ("a.jsonl", "{text}\n", None, r"line 1, is not valid JSON"),
            ("a.csv", "x,sales\n", "0", r"the columns name no label"),
        ],
    )
    def test_what_cannot_be_used_is_named(
        self, tmp_path: Path, texts: Signature, name: str, content: str, columns: str | None, message: str
    ) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(EvaluationError, match=message) as caught:
            self.load(tmp_path / name, texts, columns)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("columns", ["", ",", "a,b,c", "a,0", "a,a", "a+,b", "a+a,b"])
    def test_columns_of_another_form_are_refused(self, columns: str) -> None:
        with pytest.raises(EvaluationError, match="are not usable; write TEXT,LABEL"):
            Columns.parse(columns)

    def test_a_missing_and_a_broken_file_are_named(self, tmp_path: Path, texts: Signature) -> None:
        with pytest.raises(EvaluationError, match=r"there is no file .*nope\.csv; .* is a \.csv, \.tsv"):
            self.load(tmp_path / "nope.csv", texts)
        (tmp_path / "a.csv").write_bytes(b"text,label\n\xff,sales\n")
        with pytest.raises(EvaluationError, match="is not UTF-8 text"):
            self.load(tmp_path / "a.csv", texts)
        (tmp_path / "a.csv.gz").write_bytes(b"text,label\n")
        with pytest.raises(EvaluationError, match="cannot be read"):
            self.load(tmp_path / "a.csv.gz", texts)

    def test_columns_are_for_texts_only(self, folder: Path, signature: Signature) -> None:
        with pytest.raises(EvaluationError, match="--columns names the columns of a table of texts"):
            self.load(folder, signature, "a,b")


class TestTensors:
    def save(self, path: Path, **arrays: Any) -> Path:
        good = {"x": np.arange(6, dtype=np.float32).reshape(3, 2), "n": np.array([0, 1, 2])}
        np.savez(path / "data.npz", **{name: array for name, array in {**good, **arrays}.items() if array is not None})
        return path / "data.npz"

    def load(self, path: Path) -> Any:
        return load_evaluation(TENSORS, data=path, source=None)

    def test_rows_become_json_bodies_that_keep_every_bit(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
        requests = self.load(self.save(tmp_path, x=values, labels=np.array([1, 0, 2]), y=np.ones((3, 3))))
        sample = decoded(TENSORS, requests[1].parts())
        assert np.array_equal(sample["x"], values[1])
        assert sample["n"] == 1
        assert [request.label for request in requests] == [1, 0, 2]
        assert requests[0].outputs["y"].dtype == np.float32
        assert requests[2].where.endswith("data.npz, row 2")

    def test_labels_and_outputs_may_be_missing(self, tmp_path: Path) -> None:
        requests = self.load(self.save(tmp_path))
        assert [(request.label, dict(request.outputs)) for request in requests] == [(None, {})] * 3

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"n": None}, r"has no array 'n', which is an input; it has 'x'"),
            ({"z": np.ones(3)}, r"has an array 'z', which is no input or output; the names are x, n, y and labels"),
            ({"x": np.ones((3, 4), np.float32)}, r"'x' has the shape \[3, 4\]; the signature says \['batch', 2\]"),
            ({"x": np.ones((2, 2), np.float32)}, r"arrays of different lengths: x 2, n 3"),
            ({"n": np.ones(3)}, r"'n' is float64; the signature says int64"),
            ({"n": np.array([0, 1, 1 << 63], np.uint64)}, r"'n' has numbers that int64 cannot hold"),
            ({"labels": np.ones(3)}, r"labels must be whole numbers"),
            ({"labels": np.array([0, 1, 3])}, r"labels run from 0 to 3; there are 3 classes"),
            ({"labels": np.array([0])}, r"arrays of different lengths"),
            ({"x": np.ones((0, 2), np.float32), "n": np.ones(0, np.int64)}, r"holds no sample"),
            ({"x": np.array([{}, {}, {}])}, r"is damaged or not an \.npz file"),
        ],
    )
    def test_what_does_not_fit_is_named(self, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
        with pytest.raises(EvaluationError, match=message):
            self.load(self.save(tmp_path, **arrays))

    @pytest.mark.parametrize("content", [b"", b"PK\3\4", b"nothing"])
    def test_a_damaged_file_is_named(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "data.npz").write_bytes(content)
        with pytest.raises(EvaluationError, match=r"data\.npz is damaged or not an \.npz file"):
            self.load(tmp_path / "data.npz")

    def damage(self, path: Path, kind: str) -> Path:
        """A file of the format with one fault that NumPy does not call by a name of its own."""
        file = path / "data.npz"
        if kind in ("data", "encrypted", "method"):
            np.savez_compressed(file, x=np.arange(600, dtype=np.float32).reshape(300, 2), n=np.arange(300))
            content = bytearray(file.read_bytes())
            central = content.index(b"PK\1\2")
            if kind == "data":
                content[60:90] = b"\xff" * 30
            elif kind == "encrypted":
                content[6] |= 1
                content[central + 8] |= 1
            else:
                content[8] = content[central + 10] = 77
            file.write_bytes(content)
            return file
        shape, end = ("(1000000000000, 8)", "}") if kind == "huge" else ("(3, 2", "")
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}{end}".ljust(117) + "\n"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x.npy", b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode())
        return file

    @pytest.mark.parametrize("kind", ["data", "encrypted", "method", "huge", "header"])
    def test_whatever_a_damaged_file_raises_is_one_sentence(self, tmp_path: Path, kind: str) -> None:
        with pytest.raises(EvaluationError, match=r"data\.npz is damaged or not an \.npz file; write it with"):
            self.load(self.damage(tmp_path, kind))

    def test_a_file_that_unpacks_to_too_much_is_not_unpacked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("export.tensor_file._MAX_BYTES", 1 << 20)
        path = tmp_path / "data.npz"
        np.savez_compressed(path, x=np.zeros((1 << 18, 2), np.float32), n=np.zeros(1 << 18, np.int64))
        monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was unpacked"))
        with pytest.raises(EvaluationError, match=r"data\.npz unpacks to 0\.0 GiB, and at most .*; give fewer samples"):
            self.load(path)


class TestCalibration:
    def test_a_checkpoints_own_is_its_training_split(self, digits: Signature) -> None:
        source = {"source": EVALUATION_SOURCE, "options": OPTIONS}
        requests = load_calibration(digits, data=None, source=source)
        held_out = {request.body for request in load_evaluation(digits, data=None, source=source)}
        first = next(iter(evaluation_samples(**OPTIONS, split="train")))  # type: ignore[arg-type]
        assert len(requests) == 256
        assert requests[0].label == first[1]
        # A few digits are drawn alike, pixel by pixel.
        assert len([1 for request in requests if request.body in held_out]) < 5

    def test_images_are_taken_from_every_folder_in_turn_and_need_no_labels(
        self, folder: Path, signature: Signature
    ) -> None:
        (folder / "dark").rename(folder / "anything")
        requests = load_calibration(signature, data=folder, source=None)
        assert [Path(request.where).parent.name for request in requests[:4]] == [
            "anything",
            "bright",
            "mid",
            "anything",
        ]
        flat = load_calibration(signature, data=folder / "mid", source=None)
        assert [request.label for request in flat] == [1] * 4

    def test_tables_need_no_label_column(self, tmp_path: Path, texts: Signature) -> None:
        (tmp_path / "a.csv").write_text("text\none\ntwo\n")
        assert len(load_calibration(texts, data=tmp_path / "a.csv", source=None)) == 2
        (tmp_path / "b.csv").write_text("body,x\none,1\n")
        columns = Columns.parse("body")
        assert len(load_calibration(texts, data=tmp_path / "b.csv", source=None, columns=columns)) == 1

    def test_a_source_without_a_training_split_says_what_to_give(
        self, digits: Signature, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("models.digits.evaluation_samples", lambda seed: iter(()))
        with pytest.raises(EvaluationError, match=r"fails to give the calibration data: .*; give --calibration DATA"):
            load_calibration(digits, data=None, source={"source": EVALUATION_SOURCE, "options": {"seed": 0}})

    def test_nothing_known_is_nothing(self, digits: Signature) -> None:
        assert load_calibration(digits, data=None, source=None) == []


class TestRandom:
    def test_images_are_valid_and_the_same_for_the_same_seed(self, signature: Signature) -> None:
        first, second, other = (random_requests(signature, 3, seed=seed) for seed in (0, 0, 1))
        assert first == second != other
        assert len({image.body for image in first}) == 3
        assert decoded(signature, first[0].parts())["image"].shape == (1, 8, 8)

    def test_colour_models_get_colour_images(self, signature: Signature) -> None:
        image = replace(signature.image, mode="RGB", mean=(0.5,) * 3, std=(0.2,) * 3)  # type: ignore[type-var]
        inputs = (replace(signature.inputs[0], shape=("batch", 3, 8, 8)),)
        colour = replace(signature, image=image, inputs=inputs)
        (request,) = random_requests(colour, 1, seed=0)
        sample = decoded(colour, request.parts())["image"]
        assert sample.shape == (3, 8, 8)
        assert not np.array_equal(sample[0], sample[1])

    def test_texts_are_short_and_long(self, texts: Signature) -> None:
        words = [len(json.loads(request.body)["inputs"].split()) for request in random_requests(texts, 8)]
        assert words == [1, 2, 4, 8, 16, 32, 64, 1]

    def test_tensors_are_within_their_ranges(self) -> None:
        for request in random_requests(TENSORS, 5):
            assert 0 <= decoded(TENSORS, request.parts())["n"] <= 4
