import contextlib
import ctypes
import dataclasses
import io
import json
import shutil
import sys
import threading
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from export.combinations import Combination
from export.convert import convert
from handlers.artifact import Artifact, ModuleSource
from handlers.backend import build_backend
from handlers.calling import NamedModule
from handlers.compiled_container import CompiledContainer
from handlers.errors import BackendError
from handlers.isa import cpu_isa
from handlers.onnx import OnnxBackend, cuda_options
from handlers.pt2 import Pt2Backend
from handlers.signature import TENSOR, Signature
from handlers.staging import Staging
from handlers.tensors import Axis, TensorSpec
from handlers.torch_device import check_device, torch_device

from .fake_gpu import FakeRecorder, LateTransfers

# The source of an eager archive, which the other formats are made of as well.
SOURCE = '''
"""Two inputs, two outputs, a dynamic length."""
import torch


class Tokens(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, width)
        self.head = torch.nn.Linear(width, 3)

    def forward(self, weights, ids):
        tokens = self.embedding(ids) * weights.unsqueeze(-1)
        return {"tokens": tokens, "pooled": self.head(tokens.sum(1))}


def build(width):
    return Tokens(width)
'''
SIGNATURE = Signature(
    task=TENSOR,
    inputs=(
        TensorSpec(name="ids", dtype="int64", shape=("batch", "length"), minimum=0, maximum=9, padding=0),
        TensorSpec(name="weights", dtype="float32", shape=("batch", "length"), minimum=0, maximum=1, padding=0),
    ),
    outputs=(
        TensorSpec(name="pooled", dtype="float32", shape=("batch", 3)),
        TensorSpec(name="tokens", dtype="float32", shape=("batch", "length", 4)),
    ),
    axes={"length": Axis(minimum=1, maximum=16)},
)
NAMES = [spec.name for spec in SIGNATURE.inputs], [spec.name for spec in SIGNATURE.outputs]
FILES = {"torchscript": "model.pt", "onnx": "model.onnx", "pt2": "model.pt2", "eager": "weights.pt"}
FORMATS = tuple(FILES)
# The one from which eager artifacts are built has a name that nothing else here has.
PACKAGE = "tokens_of_an_archive"


@contextlib.contextmanager
def quietly():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def module():
    scope = {}
    exec(SOURCE, scope)
    torch.manual_seed(0)
    return scope["build"](4).eval()


def arrays(batch=2, length=5):
    random = np.random.default_rng(batch * 100 + length)
    ids = random.integers(0, 10, (batch, length))
    return {"ids": ids, "weights": random.random((batch, length), dtype=np.float32)}


def tensors(batch=2, length=5):
    return tuple(torch.from_numpy(array) for array in arrays(batch, length).values())


def dynamic_axes():
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=16)}
    return ((axes, axes),)


def write_torchscript(named, path):
    torch.jit.trace(named, tensors()).save(str(path))


def write_onnx(named, path):
    inputs, outputs = NAMES
    program = torch.onnx.export(
        named,
        tensors(),
        dynamo=True,
        verbose=False,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=dynamic_axes(),
    )
    buffer = io.BytesIO()
    program.save(buffer)
    path.write_bytes(buffer.getvalue())


def write_pt2(named, path):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler")
    program = torch.export.export(named, tensors(), dynamic_shapes=dynamic_axes())
    # Without the option the package refuses a batch of one.
    options = {"aot_inductor.check_lowerbound": False}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def write_eager(named, path):
    torch.save(named.module.state_dict(), path)
    (path.parent / "source").mkdir()
    (path.parent / "source" / f"{PACKAGE}.py").write_text(SOURCE)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder with an artifact of the tiny module, by format; each is made when it is first asked for."""
    folders = {}

    def build(format):
        if format not in folders:
            folder = tmp_path_factory.mktemp(format)
            with quietly():
                globals()[f"write_{format}"](NamedModule(module(), *NAMES), folder / FILES[format])
            folders[format] = folder
        return folders[format]

    return build


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Threads, imports and the path of this process, which a worker would keep to itself."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "0")
    yield
    torch.set_num_threads(threads)
    sys.modules.pop(PACKAGE, None)


def artifact(format, **changes):
    fields = {"format": format, "precision": "fp32", "file": FILES[format]}
    if format == "pt2":
        fields["requires"] = {"torch": str(torch.__version__), "isa": cpu_isa()}
    if format == "eager":
        fields["module"] = ModuleSource(factory=f"{PACKAGE}:build", config={"width": 4})
    return Artifact(**{**fields, **changes})


def load(folder, format, *, signature=SIGNATURE, threads=1, **changes):
    return build_backend(signature.with_artifact(artifact(format, **changes)), folder, threads=threads)


def expected(batch):
    with torch.inference_mode():
        outputs = module()(torch.from_numpy(batch["weights"]), torch.from_numpy(batch["ids"]))
    return {name: outputs[name].numpy() for name in NAMES[1]}


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

    def test_the_gpu_is_handed_on(self, format, tmp_path, monkeypatch):
        given = []
        names = {"torchscript": "TorchScript", "onnx": "Onnx", "pt2": "Pt2", "eager": "Eager"}
        backend = f"handlers.{format}.{names[format]}Backend"
        monkeypatch.setattr(backend, lambda path, *rest, **options: given.append((path.name, options["gpu"])))
        signature = SIGNATURE.with_artifact(artifact(format, device="cuda"))
        build_backend(signature, tmp_path, threads=1, gpu=3, gpu_memory_bytes=1 << 30)
        build_backend(signature, tmp_path, threads=1)
        assert given == [(FILES[format], 3), (FILES[format], None)]

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

    def test_options_of_a_gpu_name_it_and_spare_its_memory(self):
        options = {
            "device_id": "3",
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",
        }
        assert cuda_options(3) == options
        assert cuda_options(3, memory_bytes=1 << 30) == {**options, "gpu_mem_limit": "1073741824"}

    @pytest.fixture
    def on_gpu(self, built, monkeypatch):
        """Loads for GPU 3, of which ONNX Runtime says whatever it is told to; in truth it is the CPU."""
        import onnxruntime

        def load_there(found="3", **options):
            session, given = onnxruntime.InferenceSession, {}

            def start(path, options, *, providers, provider_options):
                given.update(providers=providers, options=provider_options)
                return session(path, options, providers=["CPUExecutionProvider"])

            monkeypatch.setattr("handlers.onnx._prepare_cuda", lambda onnxruntime, provider: None)
            monkeypatch.setattr(onnxruntime, "InferenceSession", start)
            monkeypatch.setattr(session, "get_providers", lambda self: ["CUDAExecutionProvider"])
            monkeypatch.setattr(
                session, "get_provider_options", lambda self: {"CUDAExecutionProvider": {"device_id": found}}
            )
            path = built("onnx") / FILES["onnx"]
            return OnnxBackend(path, SIGNATURE, device="cuda", threads=1, gpu=3, **options), given

        return load_there

    def test_a_session_for_a_gpu_gets_its_options(self, on_gpu):
        backend, given = on_gpu(gpu_memory_bytes=5)
        assert given == {"providers": ["CUDAExecutionProvider"], "options": [cuda_options(3, memory_bytes=5)]}
        assert backend.device == "cuda"

    def test_another_gpu_than_the_one_asked_for_is_refused(self, on_gpu):
        with pytest.raises(BackendError, match="ONNX Runtime chose GPU 0 instead of 3"):
            on_gpu(found="0")

    @pytest.mark.parametrize("staged", [True, False], ids=["torch for GPUs", "torch for the CPU"])
    def test_bound_inputs_and_outputs_give_the_same(self, built, staged):
        backend = load(built("onnx"), "onnx")
        transfers = LateTransfers()
        backend._staging = Staging(SIGNATURE, [transfers]) if staged else None
        for size in [(1, 1), (3, 7), (2, 16), (1, 2)]:
            batch = {name: np.asfortranarray(array) for name, array in arrays(*size).items()}
            for array, name in zip(backend._run_bound(batch), NAMES[1], strict=True):
                np.testing.assert_array_equal(array, backend.run(batch)[name])
        # It computes on another stream: everything has to be there before.
        assert not staged or transfers.events[-4:] == ["copy in", "copy in", "arrive", "exit"]
        assert backend.lanes == 1

    def test_bound_inputs_that_the_graph_has_no_use_for_are_left_out(self, built):
        unused = TensorSpec(name="unused", dtype="float32", shape=("batch",))
        signature = dataclasses.replace(SIGNATURE, inputs=(unused, *SIGNATURE.inputs))
        backend = load(built("onnx"), "onnx", signature=signature)
        backend._staging = Staging(signature, [LateTransfers(), LateTransfers()])
        assert backend.lanes == 2
        batch = {**arrays(), "unused": np.zeros(2, np.float32)}
        np.testing.assert_allclose(backend._run_bound(batch)[0], expected(batch)["pooled"], rtol=1e-4, atol=1e-5)

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

    @pytest.mark.parametrize("gpu", [0, 3])
    def test_code_for_a_gpu_is_loaded_there_and_only_launched_by_python(self, tmp_path, monkeypatch, gpu):
        given = []

        class Loader:
            def __init__(self, *arguments):
                given.append(arguments)

            def get_metadata(self):
                return {"AOTI_DEVICE_KEY": "cuda"}

            def run(self, tensors):
                return [tensors[1].sum(1), tensors[1]]

        monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Loader)
        monkeypatch.setattr("handlers.pt2.torch_device", torch.device)
        monkeypatch.setattr(
            "handlers.pt2.build_exchange", lambda signature, device: Staging(signature, [LateTransfers()])
        )
        path = tmp_path / "model.pt2"
        backend = Pt2Backend(path, SIGNATURE, device="cuda", threads=1, gpu=gpu)
        assert given == [(str(path), "model", False, 2, gpu)]
        assert (backend.device, backend.holds_lock) == ("cuda", False)
        # Its outputs lie on the CPU here.
        with pytest.raises(BackendError, match=f"lie on cpu instead of cuda:{gpu}"):
            backend.run(arrays())

    def test_code_for_another_device_is_refused(self, built, monkeypatch):
        monkeypatch.setattr("handlers.pt2.torch_device", torch.device)
        with pytest.raises(BackendError, match=r"model\.pt2 was compiled for cpu, and the signature says cuda"):
            load(built("pt2"), "pt2", device="cuda")


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


class TestEagerOnGpu:
    """The CPU stands in for it: what is copied, captured and replayed is the same."""

    @pytest.fixture
    def recorder(self, monkeypatch):
        recorder = FakeRecorder()
        monkeypatch.setattr("handlers.eager.torch_device", lambda name, gpu: torch.device("cpu"))
        monkeypatch.setattr("handlers.staging.CudaTransfers", lambda device: LateTransfers())
        monkeypatch.setattr("handlers.eager.CudaRecorder", lambda device, *, tune: recorder)
        return recorder

    def load(self, folder, *, max_batch, signature=SIGNATURE, **changes):
        signature = signature.with_artifact(artifact("eager", device="cuda", **changes))
        return build_backend(signature, folder, threads=1, max_batch=max_batch)

    @pytest.mark.parametrize(("max_batch", "replays"), [(0, 0), (4, 1)])
    def test_graphs_are_replayed_where_the_largest_batch_is_known(self, built, recorder, max_batch, replays):
        backend = self.load(built("eager"), max_batch=max_batch)
        outputs = backend.run(arrays(3, 5))
        assert (recorder.captures, recorder.replays) == (max_batch and 3, replays)
        assert list(outputs) == NAMES[1]
        for name, right in expected(arrays(3, 5)).items():
            np.testing.assert_allclose(outputs[name], right, rtol=1e-4, atol=1e-5)

    def test_two_batches_may_be_under_way(self, built, recorder):
        backend = self.load(built("eager"), max_batch=4)
        assert backend.lanes == 2
        # Two with the same graph, one with another, one without.
        batches = [arrays(*shape) for shape in [(3, 5), (4, 3), (1, 9), (5, 5)]]
        wrong = []

        def ask(batch, right):
            for _ in range(10):
                if not np.allclose(backend.run(batch)["pooled"], right, rtol=1e-4, atol=1e-5):
                    wrong.append(right.shape)

        threads = [threading.Thread(target=ask, args=(batch, expected(batch)["pooled"])) for batch in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert wrong == []
        assert recorder.replays == 30

    def test_larger_batches_run_plainly(self, built, recorder):
        outputs = self.load(built("eager"), max_batch=4).run(arrays(5, 5))
        assert recorder.replays == 0
        np.testing.assert_allclose(outputs["pooled"], expected(arrays(5, 5))["pooled"], rtol=1e-4, atol=1e-5)

    def test_the_weights_are_converted(self, built, recorder):
        backend = self.load(built("eager"), max_batch=4, precision="bf16")
        assert {weight.dtype for weight in backend._module.parameters()} == {torch.bfloat16}
        outputs = backend.run(arrays())
        assert outputs["pooled"].dtype == np.float32
        np.testing.assert_allclose(outputs["pooled"], expected(arrays())["pooled"], atol=0.05)

    @pytest.mark.parametrize("max_batch", [0, 2])
    def test_convolutions_have_their_channels_last(self, tmp_path, recorder, max_batch):
        layer = nn.Conv2d(3, 4, 3)
        torch.save(layer.state_dict(), tmp_path / "weights.pt")
        signature = Signature(
            task=TENSOR,
            inputs=(TensorSpec(name="input", dtype="float32", shape=("batch", 3, 6, 7)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 4, 4, 5)),),
        )
        config = {"in_channels": 3, "out_channels": 4, "kernel_size": 3}
        source = ModuleSource(factory="torch.nn:Conv2d", config=config)
        backend = self.load(tmp_path, max_batch=max_batch, signature=signature, module=source)
        assert backend._module.module.weight.is_contiguous(memory_format=torch.channels_last)
        batch = {"input": np.random.default_rng(0).random((2, 3, 6, 7), dtype=np.float32)}
        seen = []
        backend._module.module.register_forward_pre_hook(
            lambda module, _, given: seen.append(given["input"].is_contiguous(memory_format=torch.channels_last)),
            with_kwargs=True,
        )
        with torch.inference_mode():
            right = layer(torch.from_numpy(batch["input"])).numpy()
        np.testing.assert_allclose(backend.run(batch)["y"], right, rtol=1e-4, atol=1e-5)
        assert seen == [True]
        assert recorder.replays == bool(max_batch)


class TestTorchDevice:
    @pytest.fixture(autouse=True)
    def _two_gpus(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    @pytest.fixture(autouse=True)
    def products(self):
        """What is said of fp32, as it was before; torch may warn of how it is said."""
        products = (torch.backends.cuda.matmul, torch.backends.cudnn)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            before = [own.allow_tf32 for own in products]
            yield products
            for own, value in zip(products, before, strict=True):
                own.allow_tf32 = value

    def test_fp32_is_computed_as_such_on_a_gpu(self, products):
        for own in products:
            own.allow_tf32 = True
        torch_device("cpu")
        assert all(own.allow_tf32 for own in products)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch_device("cuda")
        assert not any(own.allow_tf32 for own in products)

    def test_without_a_gpu_the_variable_that_hides_them_is_named(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        with pytest.raises(BackendError, match=r"torch finds none here \(CUDA_VISIBLE_DEVICES is 7\); export it with"):
            torch_device("cuda")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        with pytest.raises(BackendError, match="torch finds none here; export it with"):
            torch_device("cuda")

    @pytest.mark.parametrize(("gpu", "index"), [(0, 0), (1, 1), (None, 1)])
    def test_a_gpu_has_its_number(self, gpu, index):
        assert torch_device("cuda", gpu) == torch.device("cuda", index)

    @pytest.mark.parametrize("gpu", [2, -1])
    def test_a_gpu_that_is_not_there_is_refused(self, gpu):
        with pytest.raises(BackendError, match=f"to run on GPU {gpu}, and torch finds 2 here"):
            torch_device("cuda", gpu)

    def test_the_cpu_has_none(self):
        assert torch_device("cpu", 1) == torch.device("cpu")

    @pytest.mark.parametrize("there", ["cuda:1", "cpu"])
    def test_weights_on_another_device_are_refused(self, there):
        weights = [SimpleNamespace(device=torch.device("cuda:0")), SimpleNamespace(device=torch.device(there))]
        check_device(weights[:1], torch.device("cuda", 0))
        with pytest.raises(BackendError, match=f"weights lie on {there} instead of cuda:0; export it for cuda again"):
            check_device(weights, torch.device("cuda", 0))


def test_without_an_artifact_the_remedy_is_told(tmp_path):
    with pytest.raises(BackendError, match="export the model first"):
        build_backend(SIGNATURE, tmp_path, threads=1)


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    unknown = SIGNATURE.with_artifact(dataclasses.replace(artifact("onnx"), format="tflite"))
    with pytest.raises(BackendError, match="no backend for the format 'tflite'; known are: torchscript, onnx, pt2, e"):
        build_backend(unknown, tmp_path, threads=1)
