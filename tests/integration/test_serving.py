"""Predictions over HTTP: right, the same as in process, and untouched by their neighbours' faults."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import queue
import random
import shlex
import shutil
import struct
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from export.archive import open_archive
from export.evaluation import LabelledRequest
from handlers.model import ServedModel

from .conftest import FORMATS, RunningServer, serving

REQUESTS = 1000
IN_FLIGHT = 32
MALFORMED_SHARE = 0.05


def in_process_labels(archive: Path, requests: list[LabelledRequest], folder: Path) -> list[str]:
    open_archive(archive).extract(folder)
    model = ServedModel.load(folder, threads=1)
    return [answer.body["label"] for answer in model.answer([request.parts() for request in requests])]


@pytest.mark.parametrize("format", FORMATS)
def test_held_out_accuracy_is_the_same_over_http(
    format: str, server: RunningServer, archives: dict[str, Path], held_out: list[LabelledRequest], tmp_path: Path
) -> None:
    with server.client() as client, ThreadPoolExecutor(8) as pool:
        responses = list(
            pool.map(
                lambda request: client.post(
                    f"/predictions/digits-{format}",
                    content=request.body,
                    headers={"Content-Type": request.content_type},
                ),
                held_out,
            )
        )
    assert {response.status_code for response in responses} == {200}
    labels = [response.json()["label"] for response in responses]
    assert labels == in_process_labels(archives[format], held_out, tmp_path)
    right = sum(label == str(request.label) for label, request in zip(labels, held_out, strict=True))
    assert right / len(held_out) >= 0.98


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes of data cannot fill."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JSON = "application/json"
# What is wrong, the body, its content type, and the status that says so.
MALFORMED = {
    "not an image": (b"hello", "image/png", 415),
    "wrong content type": (b"hello", "text/plain", 415),
    "empty": (b"", "image/png", 400),
    "truncated PNG": (png(64, 64)[:60], "image/png", 400),
    "huge dimensions": (png_claiming(60_000, 60_000), "image/png", 413),
    "large dimensions": (png_claiming(5_000, 5_000), "image/png", 413),
    "NaN": (b'{"inputs": ' + json.dumps([[float("nan")] * 8] * 8).encode() + b"}", JSON, 422),
    "wrong key": (b'{"image": [[0]]}', JSON, 400),
    "not UTF-8": (b'{"inputs": "\xff\xfe"}', JSON, 400),
    "not JSON": (b'{"inputs": [', JSON, 400),
    "ragged": (b'{"inputs": [[1, 2], [3]]}', JSON, 400),
    "wrong shape": (b'{"inputs": [[1, 2], [3, 4]]}', JSON, 422),
    "out of range": (json.dumps({"inputs": [[256] * 8] * 8}).encode(), JSON, 422),
    "text for numbers": (json.dumps({"inputs": [["1"] * 8] * 8}).encode(), JSON, 400),
    "null": (b'{"inputs": null}', JSON, 400),
    "nested too deeply": (b"[" * 100_000, JSON, 400),
    "bad base64": (b'{"inputs": {"b64": "%%%"}}', JSON, 400),
    "no samples": (b'{"instances": []}', JSON, 422),
    "too many samples": (json.dumps({"instances": [[[0] * 8] * 8] * 300}).encode(), JSON, 413),
    "17 MiB": (b"\x89PNG\r\n\x1a\n" + bytes(17 << 20), "image/png", 413),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_request_is_told_what_is_wrong(fault: str, format: str, server: RunningServer) -> None:
    body, content_type, status = MALFORMED[fault]
    with server.client() as client:
        response = client.post(f"/predictions/digits-{format}", content=body, headers={"Content-Type": content_type})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["code"].isidentifier()
    assert error["message"].endswith(".")


@pytest.mark.parametrize("format", FORMATS)
def test_malformed_requests_hurt_only_themselves(
    format: str, server: RunningServer, archives: dict[str, Path], held_out: list[LabelledRequest], tmp_path: Path
) -> None:
    expected = in_process_labels(archives[format], held_out, tmp_path)
    before = [worker["pid"] for worker in server.workers(f"digits-{format}")]
    dice = random.Random(0)
    faults = list(MALFORMED.values())
    plan = [
        faults[i % len(faults)] if dice.random() < MALFORMED_SHARE else held_out[i % len(held_out)]
        for i in range(REQUESTS)
    ]
    # A client for each request in flight: several threads that share one lose answers to a race inside httpcore, when
    # the server closes connections, as TorchServe does after every answer of 400 and above.
    clients: queue.SimpleQueue[httpx.Client] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(IN_FLIGHT) as pool:
        for _ in range(IN_FLIGHT):
            clients.put(stack.enter_context(server.client()))

        def send(item: LabelledRequest | tuple[bytes, str, int]) -> httpx.Response:
            body, content_type = (item.body, item.content_type) if isinstance(item, LabelledRequest) else item[:2]
            client = clients.get()
            try:
                return client.post(
                    f"/predictions/digits-{format}", content=body, headers={"Content-Type": content_type}
                )
            finally:
                clients.put(client)

        responses = list(pool.map(send, plan))
    for i, (item, response) in enumerate(zip(plan, responses, strict=True)):
        if isinstance(item, LabelledRequest):
            assert response.status_code == 200, response.text
            assert response.json()["label"] == expected[i % len(held_out)]
        else:
            assert response.status_code == item[2]
            assert response.json()["error"]["message"]
    assert sum(not isinstance(item, LabelledRequest) for item in plan) > 30
    assert [worker["pid"] for worker in server.workers(f"digits-{format}")] == before


def test_every_accepted_form_gives_the_same_answer(server: RunningServer, held_out: list[LabelledRequest]) -> None:
    request = held_out[0]
    pixels = np.asarray(Image.open(io.BytesIO(request.body))).tolist()
    encoded = {"b64": base64.b64encode(request.body).decode()}
    with server.client() as client:

        def post(**arguments: object) -> dict[str, object]:
            response = client.post("/predictions/digits-onnx", **arguments)  # type: ignore[arg-type]
            assert response.status_code == 200, response.text
            document: dict[str, object] = response.json()
            return document

        raw = post(content=request.body, headers={"Content-Type": "image/png"})
        assert (raw["model"], raw["version"]) == ("digits-onnx", "1.0")
        bare = {key: value for key, value in raw.items() if key not in ("model", "version")}
        assert post(content=request.body) == raw
        assert post(json={"inputs": pixels}) == raw
        assert post(json={"inputs": encoded}) == raw
        assert post(json={"inputs": [pixels, pixels]})["predictions"] == [bare, bare]
        assert post(json={"instances": [pixels, encoded]})["predictions"] == [bare, bare]
        assert post(files={"a": ("a.png", request.body, "image/png")}) == raw
        kserve = client.post("/v1/models/digits-onnx:predict", json={"instances": [pixels]})
        assert kserve.json()["predictions"] == [bare]


def test_a_request_without_a_token_is_refused(server: RunningServer, held_out: list[LabelledRequest]) -> None:
    response = httpx.post(f"{server.state.inference_url}/predictions/digits-onnx", content=held_out[0].body)
    assert response.status_code == 400


def test_what_a_client_sends_does_not_get_into_the_log(server: RunningServer) -> None:
    with server.client() as client:
        # A form that is none: of itself TorchServe would log what the client sent.
        response = client.post(
            "/predictions/digits-onnx",
            content=b"a=%zz\n2026-01-01T00:00:00,000 ERROR forged\nb=1",
            headers={"Content-Type": "application/x-www-form-urlencoded"},
        )
    assert response.status_code == 400
    assert "forged" not in server.log.read_text()


def test_models_cannot_be_loaded_over_http(server: RunningServer) -> None:
    response = httpx.post(
        f"{server.state.management_url}/models",
        params={"url": "https://example.invalid/model.mar"},
        headers={"Authorization": f"Bearer {server.state.management_token()}"},
    )
    assert response.status_code == 405


def test_prometheus_metrics_count_requests(server: RunningServer, held_out: list[LabelledRequest]) -> None:
    with server.client() as client:
        client.post("/predictions/digits-onnx", content=held_out[0].body).raise_for_status()
    metrics = httpx.get(f"{server.state.metrics_url}/metrics").text
    assert 'ts_inference_requests_total{model_name="digits-onnx"' in metrics


@pytest.mark.skipif(shutil.which("curl") is None, reason="the line under test is for curl, which is not installed")
def test_the_printed_curl_line_works_when_pasted(server: RunningServer) -> None:
    lines = [line for line in server.printed if line.strip().startswith("curl ")]
    assert len(lines) == 2
    for line in lines:
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
        name = shlex.split(line)[2].rpartition("/")[2]
        assert json.loads(done.stdout)["model"] == name
        assert f"{json.loads(done.stdout)['label']!r}" in server.printed[server.printed.index(line) - 1]


def test_workers_can_be_chosen_when_serving(archives: dict[str, Path], tmp_path: Path) -> None:
    with serving([archives["onnx"]], tmp_path, "--workers", "2") as running:
        assert [worker["status"] for worker in running.workers("digits-onnx")] == ["READY", "READY"]
