import dataclasses
import io
import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn

from export.torch_release import TORCH
from handlers.calling import NamedModule
from handlers.errors import BackendError


@dataclasses.dataclass
class Result:
    total: torch.Tensor
    product: torch.Tensor
    absent: torch.Tensor | None = None


Pair = namedtuple("Pair", ["product", "total"])


class Arithmetic(nn.Module):
    """Tells its two inputs apart, so that swapped ones are noticed."""

    def __init__(self, give=lambda total, product: (total, product)):
        super().__init__()
        self.give = give

    def forward(self, left, right, unused=None):
        return self.give(left + 2 * right, left * right)


LEFT, RIGHT = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
TOTAL, PRODUCT = LEFT + 2 * RIGHT, LEFT * RIGHT


def named(module, inputs=("left", "right"), outputs=("total", "product"), **options):
    return NamedModule(module, inputs, outputs, **options).eval()


def same(actual, expected):
    assert isinstance(actual, tuple)
    assert len(actual) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_inputs_that_are_parameters_go_by_keyword_in_any_order():
    same(named(Arithmetic(), inputs=("right", "left"))(RIGHT, LEFT), (TOTAL, PRODUCT))


def test_inputs_with_other_names_go_by_position():
    same(named(Arithmetic(), inputs=("x", "right"))(LEFT, RIGHT), (TOTAL, PRODUCT))


def test_a_scripted_module_goes_by_position():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(2, 1))
    same(named(scripted, inputs=("input",), outputs=("y",))(LEFT), (scripted(LEFT),))


@pytest.mark.parametrize(
    "give",
    [
        lambda total, product: (total, product),
        lambda total, product: [total, product],
        lambda total, product: (total, product, None),
        lambda total, product: {"product": product, "other": None, "total": total},
        Result,
        lambda total, product: Pair(product, total),
    ],
    ids=["tuple", "list", "longer tuple", "mapping", "dataclass", "named tuple"],
)
def test_outputs_are_taken_by_position_or_name(give):
    same(named(Arithmetic(give))(LEFT, RIGHT), (TOTAL, PRODUCT))


def test_one_tensor_is_one_output():
    same(named(Arithmetic(lambda total, product: product), outputs=("y",))(LEFT, RIGHT), (PRODUCT,))


def test_a_named_tuple_with_other_names_is_a_tuple():
    same(named(Arithmetic(Pair), outputs=("a", "b"))(LEFT, RIGHT), (TOTAL, PRODUCT))


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda total, product: {"a": total, "b": product}, "'total' is not among those of the model: a, b; name one"),
        (lambda total, product: {}, "not among those of the model: none"),
        (lambda total, product: Result(total, None), "'product' is not among those of the model: total; name one"),
        (lambda total, product: total, r"gives 1 tensor, and the signature names 2 \(total, product\)"),
        (lambda total, product: (total,), "gives 1 tensor"),
        (lambda total, product: (total, "text"), "output 'product' is 'str', not a tensor"),
        (lambda total, product: "text", "gives 'str'; it must give a tensor"),
        (lambda total, product: None, "gives 'NoneType'"),
    ],
)
def test_other_outputs_are_refused_in_a_sentence(give, message):
    with pytest.raises(BackendError, match=message):
        named(Arithmetic(give))(LEFT, RIGHT)


def test_another_number_of_inputs_is_refused():
    with pytest.raises(BackendError, match="takes 2 tensors, not 1"):
        named(Arithmetic())(LEFT)


def test_floats_are_cast_to_the_precision_and_back_and_integers_are_left():
    seen = []

    class Spy(nn.Module):
        def forward(self, ids, values):
            seen.extend([ids.dtype, values.dtype])
            return values * 2, ids

    outputs = named(Spy(), ("ids", "values"), ("y", "ids"), dtype=torch.bfloat16)(torch.tensor([1]), torch.ones(1))
    assert seen == [torch.int64, torch.bfloat16]
    assert [output.dtype for output in outputs] == [torch.float32, torch.int64]


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, ids, weights):
        tokens = self.embedding(ids) * weights.unsqueeze(-1)
        return Result(total=tokens.sum(1), product=tokens)


needs_2_11 = pytest.mark.skipif(
    TORCH < (2, 11), reason="torch before 2.11 makes no module of what it exported; export/program.py sees to that"
)


class TestCompilers:
    """What is called by name and gives a dataclass goes through every exporter, with dynamic axes."""

    @pytest.fixture
    def module(self):
        return named(Tokens(), inputs=("weights", "ids"))

    def inputs(self, batch=2, length=5):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(batch, length, generator=generator), torch.randint(10, (batch, length), generator=generator)

    def axes(self):
        axes = {0: torch.export.Dim("batch", max=32), 1: torch.export.Dim("length", max=16)}
        return ((axes, axes),)

    def close(self, actual, expected):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), e, rtol=1e-5, atol=1e-6)

    def test_trace(self, module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(module, self.inputs())
        self.close(traced(*self.inputs(3, 7)), module(*self.inputs(3, 7)))

    @needs_2_11
    def test_export(self, module):
        program = torch.export.export(module, self.inputs(), dynamic_shapes=self.axes())
        self.close(program.module()(*self.inputs(3, 7)), module(*self.inputs(3, 7)))

    @needs_2_11
    def test_onnx(self, module):
        onnxruntime = pytest.importorskip("onnxruntime")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                self.inputs(),
                dynamo=True,
                verbose=False,
                input_names=["weights", "ids"],
                output_names=["total", "product"],
                dynamic_shapes=self.axes(),
            )
        buffer = io.BytesIO()
        program.save(buffer)
        session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
        weights, ids = self.inputs(3, 7)
        feed = {"weights": weights.numpy(), "ids": ids.numpy()}
        self.close(session.run(["total", "product"], feed), module(weights, ids))
