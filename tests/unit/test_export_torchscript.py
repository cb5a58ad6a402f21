"""TorchScript files: a tuple out of whatever a module gives, and no records of the exporting machine."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from export.compiler import compiling
from export.errors import ConversionError
from export.torchscript import write_torchscript
from handlers.calling import NamedModule
from handlers.signature import Signature

SIGNATURE = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["batch", 2]},
            {"name": "ids", "dtype": "int64", "shape": ["batch"], "minimum": 0, "maximum": 9},
        ],
        "outputs": [
            {"name": "low", "dtype": "float32", "shape": ["batch", 2]},
            {"name": "high", "dtype": "float32", "shape": ["batch", 2]},
        ],
    }
)
X, IDS = torch.tensor([[1.0, -2.0], [0.5, 4.0]]), torch.tensor([3, 4])


class Ends(NamedTuple):
    """Its fields are the signature's outputs, in another order."""

    high: Tensor
    low: Tensor


class Others(NamedTuple):
    """Its fields are called otherwise, so that only their order counts."""

    first: Tensor
    second: Tensor


class GivesEnds(nn.Module):
    def forward(self, x: Tensor, ids: Tensor) -> Ends:
        return Ends(low=x - ids[:, None], high=x + ids[:, None])


class GivesOthers(nn.Module):
    def forward(self, x: Tensor, ids: Tensor) -> Others:
        return Others(x - ids[:, None], x + ids[:, None])


class GivesList(nn.Module):
    def forward(self, x: Tensor, ids: Tensor) -> list[Tensor]:
        return [x - ids[:, None], x + ids[:, None], x]


class GivesOne(nn.Module):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x * ids[:, None]


class GivesNumber(nn.Module):
    def forward(self, x: Tensor, ids: Tensor) -> int:
        return len(x)


class KeepsDtype(nn.Module):
    """Says what dtype it was called with, in whole numbers that bfloat16 holds."""

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(x, x.element_size()), torch.full_like(x, ids.element_size())


def write(module: nn.Module, path: Path, *, method: str, dtype: torch.dtype | None = None) -> None:
    named = NamedModule(module.eval(), ["x", "ids"], ["low", "high"], dtype=dtype).eval()
    with compiling():
        write_torchscript(named, SIGNATURE, [X, IDS], path, method=method)


def load(path: Path) -> torch.nn.Module:
    with compiling():
        return torch.jit.load(str(path))  # type: ignore[no-untyped-call, no-any-return]


@pytest.mark.parametrize("method", ["trace", "script"])
@pytest.mark.parametrize("module", [GivesEnds, GivesOthers, GivesList])
def test_it_takes_tensors_in_order_and_gives_a_tuple_in_order(
    tmp_path: Path, module: type[nn.Module], method: str
) -> None:
    write(module(), tmp_path / "m.pt", method=method)
    result = load(tmp_path / "m.pt")(X, IDS)
    assert isinstance(result, tuple)
    torch.testing.assert_close(list(result), [X - IDS[:, None], X + IDS[:, None]], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["trace", "script"])
def test_only_floats_are_cast_and_cast_back(tmp_path: Path, method: str) -> None:
    write(KeepsDtype(), tmp_path / "m.pt", method=method, dtype=torch.bfloat16)
    low, high = load(tmp_path / "m.pt")(X, IDS)
    assert (low.dtype, high.dtype) == (torch.float32, torch.float32)
    assert (low.unique().tolist(), high.unique().tolist()) == ([2], [8])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (GivesOne, r"the model gives 1 tensor, and the signature names 2 \(low, high\); correct the signature"),
        (GivesNumber, "the scripted model gives int; it must give a tensor, or"),
    ],
)
def test_scripted_modules_that_give_something_else_are_refused(
    tmp_path: Path, module: type[nn.Module], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        write(module(), tmp_path / "m.pt", method="script")


@pytest.mark.parametrize("method", ["trace", "script"])
def test_there_are_no_debug_records(tmp_path: Path, method: str) -> None:
    write(GivesEnds(), tmp_path / "m.pt", method=method)
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.testzip() is None
        assert not [name for name in archive.namelist() if "debug" in name]
