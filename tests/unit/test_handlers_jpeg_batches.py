"""JPEG files decoded together elsewhere: each thread gets its own, and Pillow has the last word."""

import contextlib
import io
import logging
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from handlers.artifact import Artifact
from handlers.errors import LoadError, MalformedError
from handlers.image import EncodedImage, ImageDecoder
from handlers.jpeg_batches import JpegBatches, build_jpeg_batches
from handlers.model import ServedModel
from handlers.preprocessing import ImagePreprocessing

DEADLINE_S = 60


def encoded(seed=0, size=(24, 16), *, mode="RGB", orientation=None, form="JPEG"):
    """A smooth picture as a file."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = io.BytesIO()
    image.convert(mode).save(file, form, exif=exif)
    return file.getvalue()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class FakeNvjpeg:
    """Decodes lists with Pillow, and notes how long they were; may be held up, and fails on some files."""

    def __init__(self):
        self.sizes = []
        self.may_run = threading.Event()
        self.may_run.set()
        self.entered = threading.Event()
        self.bad = set()
        self.most = 99

    def __call__(self, files):
        self.entered.set()
        assert self.may_run.wait(DEADLINE_S)
        self.sizes.append(len(files))
        if self.bad & set(files):
            raise RuntimeError("nvjpegDecode failed: 2\nmore")
        if len(files) > self.most:
            raise RuntimeError("CUDA out of memory")
        return [pixels(data) for data in files]


@pytest.fixture
def nvjpeg():
    return FakeNvjpeg()


@pytest.fixture
def batches(nvjpeg):
    return JpegBatches(nvjpeg)


def decode_all(batches, files):
    """What each of so many threads gets; the first begins before the others."""
    found = {}
    threads = [
        threading.Thread(target=lambda i=i, data=data: found.update({i: batches.decode(data, 384)}))
        for i, data in enumerate(files)
    ]
    threads[0].start()
    assert batches._decode.entered.wait(DEADLINE_S)
    for thread in threads[1:]:
        thread.start()
    return threads, found


def wait_for(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def decode_the_first_and_the_others(batches, files):
    """What each of so many threads gets, where all but the first are waiting before that one is decoded."""
    batches._decode.may_run.clear()
    threads, found = decode_all(batches, files)
    wait_for(lambda: len(batches._waiting) == len(files) - 1)
    batches._decode.may_run.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    return found


@pytest.fixture
def logged(monkeypatch, caplog):
    """What was logged so far."""
    monkeypatch.setattr(logging.getLogger("torchport"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "torchport"]


class TestBatches:
    def test_a_lone_file_is_decoded_at_once(self, batches, nvjpeg):
        np.testing.assert_array_equal(batches.decode(encoded(), 384), pixels(encoded()))
        assert nvjpeg.sizes == [1]

    def test_what_arrives_meanwhile_is_one_list_and_each_thread_gets_its_own(self, batches, nvjpeg):
        files = [encoded(seed) for seed in range(40)]
        found = decode_the_first_and_the_others(batches, files)
        assert nvjpeg.sizes == [1, 32, 7]
        for i, data in enumerate(files):
            np.testing.assert_array_equal(found[i], pixels(data))

    def test_a_file_that_fails_is_left_to_another_decoder_and_told_once(self, batches, nvjpeg, logged):
        bad = encoded(99)
        nvjpeg.bad.add(bad)
        for _ in range(2):
            assert batches.decode(bad, 384) is None
        np.testing.assert_array_equal(batches.decode(encoded(1), 384), pixels(encoded(1)))
        assert nvjpeg.sizes == [1, 1, 1]
        assert logged() == [
            "a JPEG file could not be decoded on the GPU, and is on the CPU: nvjpegDecode failed: 2 more"
        ]

    def test_files_beside_those_that_fail_are_decoded_all_the_same(self, batches, nvjpeg, logged):
        files = [encoded(seed) for seed in range(6)]
        nvjpeg.bad |= {files[2], files[4]}
        found = decode_the_first_and_the_others(batches, files)
        assert nvjpeg.sizes == [1, 5, 1, 1, 1, 1, 1]
        assert [i for i in range(6) if found[i] is None] == [2, 4]
        for i in (0, 1, 3, 5):
            np.testing.assert_array_equal(found[i], pixels(files[i]))
        assert len(logged()) == 1

    def test_a_list_that_is_too_much_is_no_fault_of_its_files(self, batches, nvjpeg, logged):
        nvjpeg.most = 1
        files = [encoded(seed) for seed in range(4)]
        found = decode_the_first_and_the_others(batches, files)
        for i, data in enumerate(files):
            np.testing.assert_array_equal(found[i], pixels(data))
        assert logged() == []

    def test_too_few_pictures_are_a_failure(self):
        assert JpegBatches(lambda files: []).decode(encoded(), 384) is None

    def test_a_file_that_was_cut_off_is_not_tried(self, batches, nvjpeg):
        assert batches.decode(encoded()[:-30], 384) is None
        assert nvjpeg.sizes == []

    def test_a_list_has_a_bound_of_pixels(self, batches, nvjpeg, monkeypatch):
        monkeypatch.setattr("handlers.jpeg_batches._MOST_PIXELS", 1000)
        found = decode_the_first_and_the_others(batches, [encoded(seed) for seed in range(5)])
        assert nvjpeg.sizes == [1, 2, 2]  # of 384 pixels each
        assert len(found) == 5
        assert batches.decode(encoded(), 1001) is None


class TestInTheDecoder:
    PREPROCESSING = ImagePreprocessing(
        mode="RGB", height=16, width=24, mean=(0.5,) * 3, std=(0.25,) * 3, max_pixels=10_000
    )

    def both(self, batches, data):
        """What the decoder gives with the other one, and without."""
        return [
            ImageDecoder(self.PREPROCESSING, max_samples=4, jpeg=jpeg).decode(EncodedImage(data=data))[0]
            for jpeg in (batches, None)
        ]

    @pytest.mark.parametrize("orientation", [None, *range(1, 9)])
    def test_pictures_are_turned_and_resized_as_ever(self, batches, nvjpeg, orientation):
        for size in [(24, 16), (16, 24), (61, 40)]:
            found, right = self.both(batches, encoded(3, size, orientation=orientation))
            np.testing.assert_array_equal(found, right)
        assert nvjpeg.sizes == [1, 1, 1]

    @pytest.mark.parametrize(("mode", "form"), [("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG")])
    def test_other_files_are_pillows(self, batches, nvjpeg, mode, form):
        found, right = self.both(batches, encoded(2, mode=mode, form=form))
        np.testing.assert_array_equal(found, right)
        assert nvjpeg.sizes == []

    def test_colours_that_were_not_transformed_are_pillows(self, batches, nvjpeg):
        file = io.BytesIO()
        Image.open(io.BytesIO(encoded(4))).save(file, "JPEG", keep_rgb=True)
        # As Adobe's programs mark it.
        data = file.getvalue()
        data = data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00" + data[2:]
        assert Image.open(io.BytesIO(data)).info["adobe_transform"] == 0
        found, right = self.both(batches, data)
        np.testing.assert_array_equal(found, right)
        assert nvjpeg.sizes == []

    def test_a_file_with_two_headers_is_pillows(self, batches, nvjpeg):
        data = encoded(4)
        start = data.index(b"\xff\xc0")
        header = data[start : start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")]
        huge = header[:5] + b"\xff\xff\xff\xff" + header[9:]
        decoder = ImageDecoder(self.PREPROCESSING, max_samples=4, jpeg=batches)
        with pytest.raises(MalformedError, match="damaged or incomplete"):
            decoder.decode(EncodedImage(data=data[:start] + huge + data[start:]))
        assert nvjpeg.sizes == []

    def test_pillow_decodes_what_the_other_cannot(self, batches, nvjpeg):
        data = encoded(5)
        nvjpeg.bad.add(data)
        found, right = self.both(batches, data)
        np.testing.assert_array_equal(found, right)

    def test_pillow_judges_what_is_broken(self, batches):
        decoder = ImageDecoder(self.PREPROCESSING, max_samples=4, jpeg=batches)
        with pytest.raises(MalformedError, match="damaged or incomplete"):
            decoder.decode(EncodedImage(data=encoded(6)[:-60]))

    def test_a_picture_of_another_size_than_its_header_says_is_not_taken(self, nvjpeg):
        found, right = self.both(JpegBatches(lambda files: [np.zeros((9, 9, 3), np.uint8)]), encoded(7))
        np.testing.assert_array_equal(found, right)


class TestTorchvision:
    ON_GPU = Artifact(format="eager", precision="fp32", file="weights.pt", device="cuda")

    @pytest.fixture
    def torchvision(self, monkeypatch):
        """Stands in for it, and decodes on the CPU; tells how it was called, and on which stream."""
        calls, current = [], ["the model's"]

        @contextlib.contextmanager
        def on(stream):
            current.append(stream)
            yield
            current.pop()

        def decode_jpeg(tensors, mode, device):
            calls.append((len(tensors), mode, device, current[-1]))
            return [torch.from_numpy(pixels(bytes(tensor.numpy())).copy()).permute(2, 0, 1) for tensor in tensors]

        io_module = ModuleType("torchvision.io")
        io_module.decode_jpeg, io_module.ImageReadMode = decode_jpeg, SimpleNamespace(RGB="RGB")
        monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.io", io_module)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
        monkeypatch.setattr(torch.cuda, "stream", on)
        return calls

    def test_it_gets_the_bytes_the_gpu_and_a_stream_of_its_own(self, torchvision, monkeypatch):
        monkeypatch.setattr("handlers.torch_device.torch_device", torch.device)
        jpeg = build_jpeg_batches(self.ON_GPU, 3)
        np.testing.assert_array_equal(jpeg.decode(encoded(8), 384), pixels(encoded(8)))
        assert torchvision == [(1, "RGB", torch.device("cuda", 3), "a stream of cuda:3")]

    @pytest.mark.parametrize("error", [ImportError("No module named 'torchvision'"), RuntimeError("operator nms")])
    def test_without_it_the_remedy_is_told(self, monkeypatch, error):
        class Missing:
            def find_spec(self, name, path, target=None):
                if name.startswith("torchvision"):
                    raise error

        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
        with pytest.raises(LoadError, match=r"jpeg_on_gpu needs torchvision \(.*\); install the one that belongs to t"):
            build_jpeg_batches(self.ON_GPU, 0)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_is_refused(self, torchvision):
        with pytest.raises(LoadError, match="jpeg_on_gpu: the artifact runs on a CUDA GPU, and torch finds none here"):
            build_jpeg_batches(self.ON_GPU, 0)

    @pytest.mark.parametrize("artifact", [None, Artifact(format="eager", precision="fp32", file="weights.pt")])
    def test_models_on_the_cpu_have_no_gpu_to_decode_on(self, torchvision, artifact):
        with pytest.raises(LoadError, match="is for models that run on a GPU, and this one does not; set it to 0"):
            build_jpeg_batches(artifact, None)

    def test_the_setting_reaches_it(self, extracted):
        with pytest.raises(LoadError, match="jpeg_on_gpu is for models"):
            ServedModel.load(extracted, threads=1, jpeg_on_gpu=True)
