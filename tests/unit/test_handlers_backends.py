import ctypes
import dataclasses
import json
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from export.combinations import Combination
from export.convert import convert
from export.torch_release import TORCH
from handlers.artifact import ModuleSource
from handlers.backend import build_backend
from handlers.compiled_container import CompiledContainer
from handlers.errors import BackendError
from handlers.isa import cpu_isa
from handlers.signature import TENSOR, Signature
from handlers.tensors import TensorSpec

from .backend_subject import (
    FILES,
    FORMATS,
    NAMES,
    PACKAGE,
    SIGNATURE,
    SOURCE,
    arrays,
    artifact,
    expected,
    load,
    quietly,
)

pytestmark = pytest.mark.usefixtures("_process_as_it_was")


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


class TestEveryFormat:
    @pytest.mark.parametrize(("size", "length"), [(1, 1), (1, 16), (2, 5), (3, 7), (33, 2)])
    def test_any_batch_and_length_gives_what_the_module_gives(self, built, format, size, length):
        backend = load(built(format), format)
        batch = arrays(size, length)
        outputs = backend.run(batch)
        assert backend.device == "cpu"
        assert list(outputs) == NAMES[1]
        for name, right in expected(batch).items():
            assert outputs[name].dtype == np.float32
            np.testing.assert_allclose(outputs[name], right, rtol=1e-4, atol=1e-5)

    def test_memory_may_be_given_back_and_the_lock_is_not_held(self, built, format):
        backend = load(built(format), format)
        assert backend.holds_lock is False
        batch = arrays()
        first = backend.run(batch)
        backend.free_memory()
        np.testing.assert_array_equal(backend.run(batch)["pooled"], first["pooled"])

    def test_the_gpu_and_the_largest_batch_are_handed_on(self, format, tmp_path, monkeypatch):
        given = []
        names = {"torchscript": "TorchScript", "onnx": "Onnx", "pt2": "Pt2", "eager": "Eager"}
        backend = f"handlers.{format}.{names[format]}Backend"
        monkeypatch.setattr(backend, lambda path, *rest, **options: given.append((path.name, options)))
        signature = SIGNATURE.with_artifact(artifact(format, device="cuda"))
        build_backend(signature, tmp_path, threads=1, gpu=3, gpu_memory_bytes=1 << 30, max_batch=8)
        build_backend(signature, tmp_path, threads=1)
        assert [(name, options["gpu"]) for name, options in given] == [(FILES[format], 3), (FILES[format], None)]
        graphs = [options.get("max_batch") for _, options in given]
        assert graphs == ([None, None] if format == "torchscript" else [8, 0])

    def test_the_order_of_the_arrays_does_not_matter(self, built, format):
        backend = load(built(format), format)
        batch = arrays()
        swapped = dict(reversed(batch.items()))
        np.testing.assert_array_equal(backend.run(swapped)["pooled"], backend.run(batch)["pooled"])

    def test_views_into_larger_arrays_are_taken(self, built, format):
        backend = load(built(format), format)
        views = {name: array[::2, ::-1] for name, array in arrays(8, 6).items()}
        copies = {name: view.copy() for name, view in views.items()}
        np.testing.assert_allclose(backend.run(views)["pooled"], backend.run(copies)["pooled"], rtol=1e-5, atol=1e-6)

    def test_arrays_whose_rows_do_not_follow_each_other_are_taken(self, built, format):
        backend = load(built(format), format)
        batch = arrays(4, 6)
        turned = {name: np.asfortranarray(array) for name, array in batch.items()}
        np.testing.assert_array_equal(backend.run(turned)["pooled"], backend.run(batch)["pooled"])

    @pytest.mark.parametrize(
        "damage", [lambda data: b"", lambda data: b"junk" * 99, lambda data: data[: len(data) // 2]]
    )
    def test_a_corrupt_file_is_a_backend_error(self, built, format, tmp_path, damage):
        folder = shutil.copytree(built(format), tmp_path / "copy")
        path = folder / FILES[format]
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(BackendError, match=f"{path.name} ") as caught:
            load(folder, format)
        assert "\n" not in str(caught.value)

    def test_a_missing_file_is_a_backend_error(self, built, format, tmp_path):
        folder = shutil.copytree(built(format), tmp_path / "copy")
        (folder / FILES[format]).unlink()
        with pytest.raises(BackendError, match=f"{FILES[format]} "):
            load(folder, format)

    def test_another_number_of_outputs_is_refused(self, built, format):
        more = TensorSpec(name="more", dtype="float32", shape=("batch",))
        signature = dataclasses.replace(SIGNATURE, outputs=(*SIGNATURE.outputs, more))
        with pytest.raises(BackendError, match=r"more|names 3"):
            load(built(format), format, signature=signature).run(arrays())

    def test_packages_of_other_versions_are_refused_before_loading(self, format, tmp_path):
        requires = {"torch": str(torch.__version__), "isa": cpu_isa(), "numpy": "0.1"}
        with pytest.raises(BackendError, match=r"needs numpy 0\.1, and .* is installed"):
            load(tmp_path, format, requires=requires)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_cuda_is_refused_without_a_gpu(self, built, format):
        with pytest.raises(BackendError, match=r"GPU|CUDAExecutionProvider"):
            load(built(format), format, device="cuda")

    @pytest.mark.parametrize("threads", [1, 2])
    def test_the_threads_are_those_given(self, built, format, threads):
        backend = load(built(format), format, threads=threads)
        if format == "onnx":
            options = backend._session.get_session_options()
            assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
        else:
            assert torch.get_num_threads() == threads


class TestTorchScript:
    def test_one_tensor_need_not_be_a_tuple(self, tmp_path):
        with quietly():
            torch.jit.trace(nn.ReLU(), torch.ones(2, 1)).save(str(tmp_path / "model.pt"))
        spec = TensorSpec(name="x", dtype="float32", shape=("batch", 1))
        signature = Signature(task=TENSOR, inputs=(spec,), outputs=(dataclasses.replace(spec, name="y"),))
        outputs = load(tmp_path, "torchscript", signature=signature).run({"x": np.float32([[-1], [2]])})
        assert outputs["y"].tolist() == [[0], [2]]

    def test_a_module_that_works_in_place_leaves_the_batch_alone(self, tmp_path):
        with quietly():
            torch.jit.trace(nn.ReLU(inplace=True), torch.ones(2, 1)).save(str(tmp_path / "model.pt"))
        spec = TensorSpec(name="x", dtype="float32", shape=("batch", 1))
        signature = Signature(task=TENSOR, inputs=(spec,), outputs=(dataclasses.replace(spec, name="y"),))
        batch = {"x": np.float32([[-1], [2]])}
        load(tmp_path, "torchscript", signature=signature).run(batch)
        assert batch["x"].tolist() == [[-1], [2]]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_halves_come_back_as_float32(self, tmp_path, dtype):
        class Half(nn.Module):
            def forward(self, x):
                return x.to(dtype)

        with quietly():
            torch.jit.trace(Half(), torch.ones(2, 1)).save(str(tmp_path / "model.pt"))
        spec = TensorSpec(name="x", dtype="float32", shape=("batch", 1))
        signature = Signature(task=TENSOR, inputs=(spec,), outputs=(dataclasses.replace(spec, name="y"),))
        assert load(tmp_path, "torchscript", signature=signature).run({"x": np.ones((1, 1), np.float32)})[
            "y"
        ].dtype == np.dtype("float32")


class TestOnnx:
    def test_without_onnx_runtime_the_remedy_is_told(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(BackendError, match="pip install onnxruntime`"):
            load(tmp_path, "onnx")
        with pytest.raises(BackendError, match="pip install onnxruntime-gpu`"):
            load(tmp_path, "onnx", device="cuda")

    def test_a_graph_that_takes_something_else_is_refused(self, built):
        signature = dataclasses.replace(SIGNATURE, inputs=SIGNATURE.inputs[:1])
        with pytest.raises(BackendError, match=r"model\.onnx takes 'weights', unlike the signature"):
            load(built("onnx"), "onnx", signature=signature)

    def test_an_input_that_the_graph_has_no_use_for_is_not_fed(self, built):
        unused = TensorSpec(name="unused", dtype="float32", shape=("batch",))
        signature = dataclasses.replace(SIGNATURE, inputs=(*SIGNATURE.inputs, unused))
        batch = {**arrays(), "unused": np.zeros(2, np.float32)}
        outputs = load(built("onnx"), "onnx", signature=signature).run(batch)
        np.testing.assert_allclose(outputs["pooled"], expected(batch)["pooled"], rtol=1e-4, atol=1e-5)

    def test_int8_products_do_not_overflow_on_processors_without_vnni(self, tmp_path):
        # Two products of the largest bytes, 2 x 255 x 127, are beyond 16 bits.
        layer = nn.Linear(64, 3, bias=False)
        nn.init.ones_(layer.weight)
        signature = Signature(
            task=TENSOR,
            inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 64), minimum=0, maximum=1),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
        )
        int8 = Combination(format="onnx", precision="int8")
        artifact = convert(layer.eval(), signature, tmp_path, combination=int8)
        backend = build_backend(signature.with_artifact(artifact), tmp_path, threads=1)
        np.testing.assert_allclose(backend.run({"x": np.ones((2, 64), np.float32)})["y"], 64, rtol=0.01)

    def test_another_provider_than_the_one_asked_for_is_refused(self, built, monkeypatch):
        import onnxruntime

        monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda session: ["OtherProvider"])
        with pytest.raises(BackendError, match="chose OtherProvider instead of CPUExecutionProvider"):
            load(built("onnx"), "onnx")


class TestPt2:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"torch": "1.0.0"}, r"needs torch 1\.0\.0"),
            ({"isa": "x86_64 avx9"}, "processor lacks"),
            ({"isa": "z80"}, "processor lacks z80"),
        ],
    )
    def test_another_torch_or_processor_is_refused_before_loading(self, tmp_path, changes, message):
        # There is no file: had it been opened, the message would be about that.
        requires = {"torch": str(torch.__version__), "isa": cpu_isa(), **changes}
        with pytest.raises(BackendError, match=message):
            load(tmp_path, "pt2", requires=requires)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"ids": np.full((2, 5), 10)},
            {"ids": np.full((2, 5), -11)},
            {"ids": np.zeros((2, 5), np.int32)},
            {"weights": np.zeros((2, 5), np.float64)},
            {"weights": np.zeros((1, 5), np.float32)},
            {"ids": np.zeros((2, 17), np.int64), "weights": np.zeros((2, 17), np.float32)},
        ],
        ids=["index too high", "too low", "dtype", "other dtype", "shape", "too long"],
    )
    def test_what_the_code_cannot_take_raises_and_the_process_lives(self, built, wrong, capfd):
        if TORCH < (2, 13) and "weights" in wrong and len(wrong["weights"]) == 1:
            pytest.skip("before 2.13 a package takes a batch of one for one of any size, as operators do")
        backend = load(built("pt2"), "pt2")
        with pytest.raises(RuntimeError):
            backend.run({**arrays(), **wrong})
        capfd.readouterr()  # torch prints a stack
        assert backend.run(arrays())["pooled"].shape == (2, 3)

    def test_the_library_is_called_without_pythons_lock(self, built):
        assert load(built("pt2"), "pt2").holds_lock is False
        call = CompiledContainer.of_package(built("pt2") / FILES["pt2"])._run
        keeping_it = ctypes.PyDLL._func_flags_ & ~ctypes.CDLL._func_flags_
        assert keeping_it
        assert not type(call)._flags_ & keeping_it

    def test_where_the_library_cannot_be_called_directly_torchs_loader_computes_the_same(self, built, monkeypatch):
        monkeypatch.setattr("handlers.pt2.CompiledContainer.of_package", lambda path: None)
        loaders = load(built("pt2"), "pt2")
        assert loaders.holds_lock is True
        monkeypatch.undo()
        direct = load(built("pt2"), "pt2")
        assert direct.holds_lock is False
        for size in [(1, 1), (2, 5), (7, 16), (64, 3)]:
            for name, array in loaders.run(arrays(*size)).items():
                np.testing.assert_array_equal(direct.run(arrays(*size))[name], array)

    def test_operators_that_only_torchs_loader_can_call_are_left_to_it(self, built, tmp_path):
        path = tmp_path / FILES["pt2"]
        shutil.copy(built("pt2") / FILES["pt2"], path)
        with zipfile.ZipFile(path, "a") as package:
            (library,) = (name for name in package.namelist() if name.endswith(".so"))
            called = {"nodes": [{"name": "buf2", "node": {"target": "quantized::max_pool2d"}}]}
            package.writestr(library.removesuffix(".so") + ".json", json.dumps(called))
        assert CompiledContainer.of_package(path) is None

    @pytest.mark.parametrize("change", ["weights beside", "no library", "no shared library"])
    def test_packages_of_another_form_are_left_to_torchs_loader(self, built, tmp_path, change):
        path = tmp_path / FILES["pt2"]
        with zipfile.ZipFile(built("pt2") / FILES["pt2"]) as source, zipfile.ZipFile(path, "w") as target:
            for name in source.namelist():
                if not name.endswith(".so"):
                    target.writestr(name, source.read(name))
                elif change == "weights beside":
                    target.writestr(name, source.read(name))
                    target.writestr(name.removesuffix(".so") + ".bin", b"weights")
                elif change == "no shared library":
                    target.writestr(name, b"text")
        assert CompiledContainer.of_package(path) is None


class TestEager:
    def copy(self, built, tmp_path):
        return shutil.copytree(built("eager"), tmp_path / "copy")

    def test_low_precision_is_close_and_gives_float32(self, built):
        outputs = load(built("eager"), "eager", precision="bf16").run(arrays())
        assert outputs["pooled"].dtype == np.float32
        np.testing.assert_allclose(outputs["pooled"], expected(arrays())["pooled"], atol=0.05)
        assert not np.array_equal(outputs["pooled"], expected(arrays())["pooled"])

    def test_int8_is_refused(self, built):
        with pytest.raises(BackendError, match="fp32, bf16, fp16, not int8"):
            load(built("eager"), "eager", precision="int8")

    def test_a_package_of_that_name_elsewhere_is_not_taken_and_stays(self, built, tmp_path, monkeypatch):
        (tmp_path / f"{PACKAGE}.py").write_text("build = None")
        monkeypatch.syspath_prepend(tmp_path)
        import importlib

        other = importlib.import_module(PACKAGE)
        path = list(sys.path)
        backend = load(built("eager"), "eager")
        assert backend.run(arrays())["pooled"].shape == (2, 3)
        assert sys.modules[PACKAGE] is other
        assert sys.path == path

    def test_a_worker_can_import_more_of_the_source_when_it_runs(self, built, tmp_path):
        folder = self.copy(built, tmp_path)
        lazy = SOURCE.replace("tokens = self", "import lazily_of_an_archive\n        tokens = self")
        (folder / "source" / f"{PACKAGE}.py").write_text(lazy)
        (folder / "source/lazily_of_an_archive.py").write_text("")
        load(folder, "eager").run(arrays())
        del sys.modules["lazily_of_an_archive"]

    def test_a_factory_of_an_installed_package_needs_no_source(self, tmp_path):
        torch.save(nn.Linear(2, 1).state_dict(), tmp_path / "weights.pt")
        spec = TensorSpec(name="input", dtype="float32", shape=("batch", 2))
        output = TensorSpec(name="y", dtype="float32", shape=("batch", 1))
        signature = Signature(task=TENSOR, inputs=(spec,), outputs=(output,))
        source = ModuleSource(factory="torch.nn:Linear", config={"in_features": 2, "out_features": 1})
        backend = load(tmp_path, "eager", signature=signature, module=source)
        assert backend.run({"input": np.ones((3, 2), np.float32)})["y"].shape == (3, 1)

    @pytest.mark.parametrize(
        ("factory", "config", "message"),
        [
            ("nosuchpackage:build", {}, r"nosuchpackage:build does not build the model \(ModuleNotFoundError: "),
            (f"{PACKAGE}:nothing", {}, r"does not build the model \(AttributeError: "),
            (f"{PACKAGE}:build", {"wide": 4}, r"does not build the model \(TypeError: .*install what it imports"),
            ("json:dumps", {"obj": 1}, "json:dumps gives a str, not a torch module"),
            (f"{PACKAGE}:build", {"width": 5}, r"the weights in weights\.pt do not fit the model"),
        ],
    )
    def test_a_model_that_is_not_built_is_a_sentence(self, built, factory, config, message):
        with pytest.raises(BackendError, match=message) as caught:
            load(built("eager"), "eager", module=ModuleSource(factory=factory, config=config))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [[1, 2], torch.ones(2), json])
    def test_what_is_no_state_dict_is_refused_and_never_run(self, built, tmp_path, content):
        folder = self.copy(built, tmp_path)
        with (folder / "weights.pt").open("wb") as file:
            torch.save(content if content is not json else dataclasses.make_dataclass, file)
        with pytest.raises(BackendError, match=r"weights\.pt "):
            load(folder, "eager")


def test_without_an_artifact_the_remedy_is_told(tmp_path):
    with pytest.raises(BackendError, match="export the model first"):
        build_backend(SIGNATURE, tmp_path, threads=1)


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    unknown = SIGNATURE.with_artifact(dataclasses.replace(artifact("onnx"), format="tflite"))
    with pytest.raises(BackendError, match="no backend for the format 'tflite'; known are: torchscript, onnx, pt2, e"):
        build_backend(unknown, tmp_path, threads=1)
