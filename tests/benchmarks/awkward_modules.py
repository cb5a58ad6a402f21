"""Modules that are awkward to export, one trait each: ``architectures.py --awkward`` takes them all.

``AWKWARD`` says of each whether its fp32 artifacts can be right. What cannot be right must be refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from third_party_factories import Architecture, signature_document, tensor_document
from torch import Tensor, nn


class KeywordOnly(nn.Module):
    """Inputs by keyword only, in another order than the signature's; a mapping comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, *, second: Tensor, first: Tensor) -> dict[str, Tensor]:
        return {"unused": second, "scores": self.layer(first) * second.unsqueeze(1)}


class TakesMapping(nn.Module):
    """One argument, which is a mapping: nothing that a signature can describe."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.layer(inputs["first"])


@dataclass
class Scores:
    scores: Tensor
    hidden: Tensor | None = None


class GivesDataclass(nn.Module):
    """A dataclass comes out, one field of which is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Scores:
        return Scores(scores=self.layer(x))


class GivesNone(nn.Module):
    """A tuple with None in it, after or before what the signature names."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.first = first

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        scores = self.layer(x)
        return (None, scores) if self.first else (scores, None)


class ManyDtypes(nn.Module):
    """int32, bool and float64 go in, float64, int64 and bool come out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layer = nn.Linear(4, 3)

    def forward(self, ids: Tensor, keep: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = self.embedding(ids) * keep.unsqueeze(-1)
        scores = self.layer(states.mean(1)).double() * weight
        return scores, scores.argmax(1), keep & (ids > 4)


class Scalars(nn.Module):
    """A number a sample goes in, a number a sample comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layer(torch.stack([a, b], 1)).squeeze(1)


class TwoAxes(nn.Module):
    """Pictures of any height and width; padding shows at their edges, so only equal ones share a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Strided(nn.Module):
    """An output axis that is half an input axis: a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(2, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class CountsCalls(nn.Module):
    """A buffer that grows with every call, and what comes out with it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) + self.calls


class RemembersUnseen(nn.Module):
    """A buffer that changes with every call, which nothing that comes out depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.layer(x)


class RemembersLast(nn.Module):
    """Keeps the last batch in an attribute and adds it to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        scores = self.layer(x)
        total = scores if self.last is None else scores + self.last.mean()
        self.last = scores.detach()
        return total


class AlwaysDrops(nn.Module):
    """Dropout that does not know of eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 32)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5, training=True)


class InPlace(nn.Module):
    """Changes its input, and gives what depends on both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        before = self.layer(x)
        x.mul_(2).clamp_(min=0)
        return before + self.layer(x)


class BranchesOnData(nn.Module):
    """Another layer for each sign of the whole batch's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.plus = nn.Linear(4, 3)
        self.minus = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return self.plus(x)
        return self.minus(x)


class BranchesOnSize(nn.Module):
    """Another layer for short inputs than for long ones."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Linear(4, 3)
        self.long = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) if x.shape[1] < 6 else self.long(x)


class Identity(nn.Module):
    """Gives its input, twice, and has no parameters."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class EmptyParameter(nn.Module):
    """A parameter without elements, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.idle = nn.Parameter(torch.zeros(3))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.cat([x, self.empty]))


class Volumes(nn.Module):
    """Convolutions in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.BatchNorm3d(4), nn.Conv3d(4, 6, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LargeOutput(nn.Module):
    """A megabyte a sample comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).unsqueeze(2) * self.layer(x.flip(1)).unsqueeze(1)


class Recurrent(nn.Module):
    """An LSTM, whose tuple has another tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 8, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.layer(x)  # type: ignore[no-any-return]


class BatchSecond(nn.Module):
    """An output whose first axis is not the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 8, num_layers=3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[1]  # type: ignore[no-any-return]


class Squeezes(nn.Module):
    """Loses the batch axis of a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze()


class Coupled(nn.Module):
    """A sample's answer depends on the batch that it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.layer(x)
        return scores - scores.mean(0)


class Logarithm(nn.Module):
    """NaN for some inputs that the signature allows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(self.layer(x))


class Halves(nn.Module):
    """Another dtype than the signature says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).half()


class Finds(nn.Module):
    """How many rows come out depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.layer(x)
        return scores[scores[:, 0] > 0]


class Attends(nn.Module):
    """PyTorch's own encoder layer with its own short cut, and a mask of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        states = self.encoder(self.embedding(ids), src_key_padding_mask=~keep)
        weights = keep.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


class Unmasked(nn.Module):
    """Averages over padding: wrong as soon as samples share a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids).mean(1)


class Fourier(nn.Module):
    """Complex numbers within."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.fft.rfft(x).abs())


_T = tensor_document
_X = _T("x", 4, low=-1, high=1)
_LONG = {"length": {"minimum": 1, "maximum": 12}}


def _case(
    module: Callable[[], nn.Module], inputs: list[dict[str, Any]], *outputs: dict[str, Any], **more: Any
) -> Architecture:
    return Architecture(build=module, signature=signature_document(inputs, list(outputs), **more))


_SCORES = _T("scores", 3)


def build_none_first() -> nn.Module:
    return GivesNone(first=True)


AWKWARD: Mapping[str, Architecture] = {
    "keyword-only": _case(KeywordOnly, [_T("first", 4), _T("second")], _SCORES),
    "takes-mapping": _case(TakesMapping, [_T("first", 4)], _SCORES),
    "dataclass": _case(GivesDataclass, [_X], _SCORES),
    "none-last": _case(GivesNone, [_X], _SCORES),
    "none-first": _case(build_none_first, [_X], _SCORES),
    "dtypes": _case(
        ManyDtypes,
        [
            _T("ids", 5, dtype="int32", low=0, high=9),
            _T("keep", 5, dtype="bool"),
            _T("weight", 3, dtype="float64", low=-2, high=2),
        ],
        _T("scores", 3, dtype="float64"),
        _T("best", dtype="int64"),
        _T("seen", 5, dtype="bool"),
    ),
    "scalars": _case(Scalars, [_T("a"), _T("b")], _T("y")),
    "two-axes": _case(
        TwoAxes,
        [_T("x", 2, "height", "width", low=-1, high=1)],
        _T("y", 3, "height", "width"),
        axes={"height": {"minimum": 3, "maximum": 20}, "width": {"minimum": 4, "maximum": 17}},
    ),
    "two-axes-padded": _case(
        TwoAxes,
        [_T("x", 2, "height", "width", low=-1, high=1, padding=0)],
        _T("y", 3, "height", "width"),
        axes={"height": {"minimum": 3, "maximum": 20}, "width": {"minimum": 4, "maximum": 17}},
    ),
    "strided": _case(
        Strided, [_T("x", 2, "length")], _T("y", 4, "frames"), axes={"length": {"minimum": 5, "maximum": 30}}
    ),
    "counts-calls": _case(CountsCalls, [_X], _SCORES),
    "remembers-unseen": _case(RemembersUnseen, [_X], _SCORES),
    "remembers-last": _case(RemembersLast, [_X], _SCORES),
    "always-drops": _case(AlwaysDrops, [_X], _T("scores", 32)),
    "in-place": _case(InPlace, [_X], _SCORES),
    "branches-on-data": _case(BranchesOnData, [_X], _SCORES),
    "branches-on-size": _case(BranchesOnSize, [_T("x", "length", 4)], _T("scores", "length", 3), axes=_LONG),
    "identity": _case(Identity, [_X], _T("first", 4), _T("second", 4)),
    "empty-parameter": _case(EmptyParameter, [_X], _SCORES),
    "volumes": _case(Volumes, [_T("x", 1, 9, 9, 9, low=-1, high=1)], _T("y", 6, 3, 3, 3)),
    "large-output": _case(LargeOutput, [_T("x", 8, low=-1, high=1)], _T("y", 512, 512)),
    "recurrent": _case(Recurrent, [_T("x", "length", 4)], _T("states", "length", 8), axes=_LONG),
    "batch-second": _case(BatchSecond, [_T("x", 6, 4)], _T("state", 3, 8)),
    "squeezes": _case(Squeezes, [_X], _SCORES),
    "coupled": _case(Coupled, [_X], _SCORES),
    "logarithm": _case(Logarithm, [_X], _SCORES),
    "halves": _case(Halves, [_X], _SCORES),
    "finds": _case(Finds, [_X], _SCORES),
    "attends": _case(
        Attends,
        [
            _T("ids", "length", dtype="int64", low=1, high=19, padding=0),
            _T("keep", "length", dtype="bool", low=1, high=1, padding=0),
        ],
        _T("y", 16),
        axes=_LONG,
    ),
    "unmasked": _case(
        Unmasked, [_T("ids", "length", dtype="int64", low=1, high=19, padding=0)], _T("y", 16), axes=_LONG
    ),
    "fourier": _case(Fourier, [_T("x", 16, low=-1, high=1)], _SCORES),
}
