"""Evaluation data: from a folder of the user's, from the checkpoint's own source, or random."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import EvaluationError
from export.evaluation import load_evaluation, random_images
from handlers.image import ImageDecoder
from handlers.request import EncodedImage
from handlers.signature import Signature
from models.digits import EVALUATION_SOURCE, evaluation_samples

OPTIONS = {"seed": 3, "held_out_fraction": 0.1, "validation_fraction": 0.1}


@pytest.fixture
def folder(evaluation_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(evaluation_folder, tmp_path / "images")


@pytest.fixture
def digits(signature: Signature) -> Signature:
    return replace(signature, labels=tuple("0123456789"))


def from_folder(folder: Path, signature: Signature) -> Any:
    return load_evaluation(signature, folder=folder, source={"source": "the folder wins:over this"})


def from_source(signature: Signature, source: str = EVALUATION_SOURCE, options: object = None) -> Any:
    return load_evaluation(signature, folder=None, source={"source": source, "options": options or OPTIONS})


def test_nothing_known_is_nothing(signature: Signature) -> None:
    assert load_evaluation(signature, folder=None, source=None) == []


class TestFolder:
    def test_sub_folders_name_the_labels_and_bodies_are_the_files(self, folder: Path, signature: Signature) -> None:
        requests = from_folder(folder, signature)
        assert [request.label for request in requests] == ["bright"] * 4 + ["dark"] * 4 + ["mid"] * 4
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
        with pytest.raises(EvaluationError, match=r"there is no folder .*nope; --eval takes one sub-folder"):
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

    @pytest.mark.parametrize("content", [b"", b"no image", None])
    def test_a_broken_image_is_named(self, folder: Path, signature: Signature, content: bytes | None) -> None:
        path = folder / "mid" / "2.png"
        path.write_bytes(path.read_bytes()[:40] if content is None else content)
        with pytest.raises(EvaluationError, match=r"mid/2\.png is no image that the model takes: "):
            from_folder(folder, signature)

    def test_an_image_that_a_worker_would_refuse_is_named(
        self, folder: Path, signature: Signature, encode: Callable[..., bytes]
    ) -> None:
        (folder / "mid" / "big.png").write_bytes(encode(np.zeros((100, 100), dtype=np.uint8)))
        small = replace(signature, image=replace(signature.image, max_pixels=64))
        with pytest.raises(EvaluationError, match=r"mid/big\.png is no image .*100 x 100 pixels"):
            from_folder(folder, small)


class TestSource:
    def test_the_digits_come_as_png_with_their_labels(self, digits: Signature) -> None:
        requests = from_source(digits)
        samples = list(evaluation_samples(**OPTIONS))  # type: ignore[arg-type]
        assert [request.label for request in requests] == [str(index) for _, index in samples]
        decoder = ImageDecoder(digits.image, max_samples=1)
        decoded, _ = decoder.decode(EncodedImage(data=requests[7].body))
        pixels = np.rint((decoded[0, 0] * 0.25 + 0.5) * 255).astype(np.uint8)
        assert np.array_equal(pixels, samples[7][0])

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
        with pytest.raises(EvaluationError, match=r"asks to call .* give --eval with a folder"):
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


class TestRandom:
    def test_they_are_valid_and_the_same_for_the_same_seed(self, signature: Signature) -> None:
        first, second, other = (list(random_images(signature, 3, seed=seed)) for seed in (0, 0, 1))
        assert first == second != other
        assert len({image.body for image in first}) == 3
        decoded, _ = ImageDecoder(signature.image, max_samples=1).decode(EncodedImage(data=first[0].body))
        assert decoded.shape == (1, 1, 8, 8)

    def test_colour_models_get_colour_images(self, signature: Signature) -> None:
        image = replace(signature.image, mode="RGB", mean=(0.5,) * 3, std=(0.2,) * 3)
        (request,) = random_images(replace(signature, image=image), 1, seed=0)
        decoded, _ = ImageDecoder(image, max_samples=1).decode(EncodedImage(data=request.body))
        assert decoded.shape == (1, 3, 8, 8)
        assert not np.array_equal(decoded[0, 0], decoded[0, 1])
