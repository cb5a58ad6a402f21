"""The Open Inference Protocol through a real TorchServe, in both schedulings: bytes both ways, errors, compression."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from .conftest import serving, torchport

PATH = "/v2/models/double/infer"
LENGTH = "Inference-Header-Content-Length"
MODULE = """\
import torch
from torch import nn


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        twice = x * self.factor
        return twice, twice.sum(-1)
"""
SIGNATURE = """\
format_version: 1
task: tensor
inputs:
  - {name: x, dtype: float32, shape: [batch, length], minimum: -1000, maximum: 1000, padding: 0}
outputs:
  - {name: twice, dtype: float32, shape: [batch, length]}
  - {name: total, dtype: float32, shape: [batch]}
axes:
  length: {minimum: 1, maximum: 512}
"""
SAVE = "import torch, double; torch.save(double.Double().state_dict(), 'double.pt')"


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of a small module."""
    folder = tmp_path_factory.mktemp("double")
    (folder / "double.py").write_text(MODULE)
    (folder / "double.yaml").write_text(SIGNATURE)
    subprocess.run([sys.executable, "-c", SAVE], cwd=folder, check=True)
    options = ("--model", "double:Double", "--signature", "double.yaml")
    return folder / torchport("export", "double.pt", *options, cwd=folder)["archive"]


@pytest.fixture(scope="module", params=["continuous", "batches"])
def client(
    request: pytest.FixtureRequest, double: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp(request.param)
    with serving([double], folder, "--workers", "1", "--scheduling", request.param) as server:
        yield server.client()


def tensor(values: Any, **more: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": list(np.shape(values)), **more}


def test_bytes_in_and_bytes_out(client: httpx.Client) -> None:
    values = np.array([[1, 2, 3], [4, 5, 6]], dtype="<f4")
    document = {
        "id": "a",
        "inputs": [tensor(values, parameters={"binary_data_size": values.nbytes})],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(document).encode()
    response = client.post(PATH, content=head + values.tobytes(), headers={LENGTH: str(len(head))})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/octet-stream")
    length = int(response.headers[LENGTH])
    answer, rest = json.loads(response.content[:length]), response.content[length:]
    assert answer["id"] == "a"
    assert [output["parameters"]["binary_data_size"] for output in answer["outputs"]] == [24, 8]
    assert np.frombuffer(rest, "<f4").tolist() == [2, 4, 6, 8, 10, 12, 12, 30]


def test_json_in_and_json_out(client: httpx.Client) -> None:
    response = client.post(PATH, json={"inputs": [tensor([[1]], data=[1])], "outputs": [{"name": "total"}]})
    assert (response.headers["content-type"], LENGTH in response.headers) == ("application/json", False)
    assert response.json()["outputs"] == [{"name": "total", "datatype": "FP32", "shape": [1], "data": [2.0]}]


def test_its_errors_are_strings(client: httpx.Client) -> None:
    response = client.post(PATH, json={"inputs": [tensor([[1]], data=[1001])]})
    assert response.status_code == 422
    assert response.json() == {
        "error": "out_of_range: Values of 'x' must lie between -1000 and 1000.",
        "code": "out_of_range",
    }


def test_those_of_other_forms_are_objects(client: httpx.Client) -> None:
    response = client.post("/predictions/double", json={"inputs": [1001]})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "out_of_range")


def test_bodies_may_be_compressed(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    good = client.post("/predictions/double", content=gzip.compress(b'{"inputs": [1, 2]}'), headers=headers)
    assert (good.status_code, good.json()["outputs"]["total"]) == (200, 6)
    bomb = client.post("/predictions/double", content=gzip.compress(bytes(1 << 26)), headers=headers)
    assert (bomb.status_code, bomb.json()["error"]["code"]) == (413, "request_too_large")
    broken = client.post("/predictions/double", content=b"{}", headers=headers)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "broken_encoding")
