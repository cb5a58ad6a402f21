"""Checks of shapes, devices and values: what they let through, and what their messages say."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from models.checks import (
    require_arguments,
    require_dropout,
    require_finite,
    require_integer,
    require_same_device,
    require_shape,
)
from models.errors import DeviceMismatchError, ModelConfigError, NonFiniteError, ShapeError


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 3, 8, 9), ("batch", 3, None, None)),
        ((1, 3, 1, 1), ("batch", 3, None, None)),
        ((5, 5), ("tokens", "tokens")),
        ((0, 4), ("batch", 4)),
        ((), ()),
    ],
)
def test_a_fitting_shape_passes(shape: tuple[int, ...], expected: tuple[int | str | None, ...]) -> None:
    require_shape(torch.zeros(shape), expected, name="image")


@pytest.mark.parametrize(
    ("shape", "expected", "message"),
    [
        (
            (2, 1, 8, 8),
            ("batch", 3, None, None),
            "image has shape [2, 1, 8, 8] where [batch, 3, any, any] is expected; make axis 1 3 long instead of 1.",
        ),
        (
            (3, 8, 8),
            ("batch", 3, None, None),
            "image has shape [3, 8, 8] where [batch, 3, any, any] is expected; "
            "add the batch axis with image.unsqueeze(0).",
        ),
        (
            (2, 3, 8),
            (None, 3),
            "image has shape [2, 3, 8] where [any, 3] is expected; give it 2 axes instead of 3.",
        ),
        ((4, 5), ("tokens", "tokens"), "[tokens, tokens] is expected; make axis 1 4 long instead of 5."),
        ((), ("batch",), "image has shape [] where [batch] is expected; add the batch axis"),
        ((3,), (), "image has shape [3] where [] is expected; give it 0 axes instead of 1."),
    ],
)
def test_an_unfitting_shape_is_explained(
    shape: tuple[int, ...], expected: tuple[int | str | None, ...], message: str
) -> None:
    with pytest.raises(ShapeError) as raised:
        require_shape(torch.zeros(shape), expected, name="image")

    assert message in str(raised.value)


def test_tensors_beside_the_weights_pass() -> None:
    require_same_device(nn.Linear(2, 2), features=torch.zeros(1, 2), mask=None)
    require_same_device(nn.Linear(2, 2, device="meta"), features=torch.zeros(1, 2, device="meta"))
    require_same_device(nn.ReLU(), features=torch.zeros(1, device="meta"))


def test_a_tensor_on_another_device_is_named() -> None:
    model = nn.Linear(2, 2, device="meta")

    with pytest.raises(DeviceMismatchError) as raised:
        require_same_device(model, mask=torch.zeros(1, device="meta"), features=torch.zeros(1, 2))

    assert str(raised.value) == 'features is on cpu and Linear on meta; move it with features.to("meta").'


@pytest.mark.parametrize("left_behind", ["parameter", "buffer"])
def test_a_model_on_two_devices_is_told_apart(left_behind: str) -> None:
    model = nn.BatchNorm1d(2)
    if left_behind == "parameter":
        model.bias = nn.Parameter(torch.zeros(2, device="meta"))
    else:
        model.running_var = torch.zeros(2, device="meta")

    with pytest.raises(DeviceMismatchError, match=r'partly on cpu and partly on meta; .* model\.to\("cpu"\)\.$'):
        require_same_device(model)


@pytest.mark.parametrize("tensor", [torch.tensor([1.0, -1e38]), torch.tensor(3), torch.zeros(0), torch.tensor([True])])
def test_finite_values_come_back(tensor: Tensor) -> None:
    assert require_finite("loss", tensor) is tensor


def test_nan_and_infinity_are_counted_and_placed() -> None:
    logits = torch.zeros(8, 4)
    logits[2, 1] = math.inf
    logits[2, 3] = math.nan
    logits[7, 0] = -math.inf

    with pytest.raises(NonFiniteError) as raised:
        require_finite("logits", logits)

    assert str(raised.value) == (
        "logits holds 1 NaN and 2 infinite among 32 values, the first at [2, 1]; check what it was computed from."
    )


def test_a_number_that_is_not_finite_has_no_place() -> None:
    with pytest.raises(NonFiniteError, match="loss holds 1 NaN and 0 infinite among 1 values; check"):
        require_finite("loss", torch.tensor(math.nan, requires_grad=True))


@dataclass(frozen=True, kw_only=True)
class _Config:
    width: int
    depth: int
    dropout: float = 0.0


def test_arguments_with_their_names_pass() -> None:
    require_arguments("Model", _Config, {"width": 1, "depth": 2})
    require_arguments("Model", _Config, {"width": 1, "depth": 2, "dropout": 0.1})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": 1, "dept": 2}, "A Model takes no argument 'dept'; did you mean depth?"),
        ({"width": 1, "xyz": 2}, "A Model takes no argument 'xyz'; it takes width, depth, dropout."),
        ({}, "A Model needs width and depth; add it to the model's config."),
    ],
)
def test_unknown_and_missing_arguments_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ModelConfigError) as raised:
        require_arguments("Model", _Config, config)

    assert str(raised.value) == message


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None])
def test_a_count_is_a_large_enough_integer(value: object) -> None:
    require_integer("width", 1, minimum=1)

    with pytest.raises(ModelConfigError, match=r"width is .*; it must be an integer of at least 1\."):
        require_integer("width", value, minimum=1)


@pytest.mark.parametrize("value", [1, -0.1, math.nan, "0", True, None])
def test_dropout_is_a_probability_below_one(value: object) -> None:
    require_dropout(0)
    require_dropout(0.99)

    with pytest.raises(ModelConfigError, match=r"dropout is .*; it must be at least 0 and below 1\."):
        require_dropout(value)
