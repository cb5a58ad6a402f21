"""Several batches under way, and what else a worker does with its GPU."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from export.candidate import Candidate
from export.combinations import Combination, allowed
from handlers.backend import build_backend
from handlers.batching import stack
from handlers.jpeg_batches import build_jpeg_batches
from handlers.model import ServedModel
from handlers.tensors import Array
from handlers.torch_device import torch_device

from .subjects import DEVICE, ENCODER, IMAGES, LONGEST, REHEARSED, SUBJECTS, random_samples

GetCandidate = Callable[[str, Combination], Candidate]

MAX_BATCH = 8
ROUNDS = 40
needs_gpu = pytest.mark.skipif(REHEARSED, reason="a rehearsal has no GPU")
FORMATS = sorted({combination.format for combination in allowed(DEVICE)} - ({"pt2"} if REHEARSED else set()))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", [ENCODER, IMAGES])
def test_batches_of_several_threads_do_not_disturb_each_other(candidate: GetCandidate, name: str, format: str) -> None:
    made = candidate(name, Combination(format=format, precision="fp32", device=DEVICE))
    served = ServedModel.load(made.folder, threads=1, max_batch=MAX_BATCH)
    assert served.backend.lanes == (1 if REHEARSED else 2)
    generator = np.random.default_rng(5)
    batches = []
    for i in range(24):
        lengths = generator.integers(1, LONGEST + 1, generator.integers(1, MAX_BATCH + 1))
        batches.append(stack(random_samples(SUBJECTS[name], list(lengths), seed=i), served.signature))
    alone = [served.backend.run(batch)["logits"] for batch in batches]

    def run(i: int) -> Array:
        return served.backend.run(batches[i % len(batches)])["logits"]

    with ThreadPoolExecutor(served.backend.lanes) as pool:
        for i, logits in enumerate(pool.map(run, range(ROUNDS * served.backend.lanes))):
            np.testing.assert_allclose(logits, alone[i % len(batches)], rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize(("visible", "count"), [("", 0), ("0", 1)])
def test_the_variable_counts_until_cuda_is_asked(visible: str, count: int) -> None:
    code = (
        "import os, torch, handlers.service, handlers.eager\n"
        f"os.environ['CUDA_VISIBLE_DEVICES'] = {visible!r}\n"
        f"assert torch.cuda.device_count() == {count}\n"
        f"assert torch.ones(3, device='cuda:0' if {count} else 'cpu').sum().item() == 3\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_fp32_is_computed_as_such() -> None:
    device = torch_device(DEVICE)
    torch.manual_seed(7)
    pictures, weights = torch.randn(4, 64, 32, 32, dtype=torch.float64), torch.randn(64, 64, 3, 3, dtype=torch.float64)
    rows = torch.randn(256, 1024, dtype=torch.float64)
    for right, found in [
        (functional.conv2d(pictures, weights), functional.conv2d(*(x.float().to(device) for x in (pictures, weights)))),
        (rows @ rows.T, (rows.float().to(device) @ rows.float().to(device).T)),
    ]:
        # With TF32 it would be some thousandths.
        assert (found.cpu().double() - right).abs().max() < 1e-5 * right.abs().max()


@needs_gpu
def test_jpeg_files_are_decoded_alike_and_disturb_nobody(candidate: GetCandidate, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    made = candidate(IMAGES, Combination(format="eager", precision="fp32", device=DEVICE))
    # Plain calls, whose memory comes from the pool, and goes back to it while kernels run.
    backend = build_backend(made.signature, made.folder, threads=1)
    batch = stack(random_samples(SUBJECTS[IMAGES], [1] * 64, seed=1), made.signature)
    alone = backend.run(batch)["logits"]
    random, files = np.random.default_rng(6), []
    for size in [(224, 224), (97, 61)] * 8:
        picture = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size)
        file = tmp_path / f"{len(files)}.jpg"
        picture.save(file, quality=90)
        files.append(file)
    jpeg = build_jpeg_batches(made.artifact, None)

    def decode(file: Path) -> None:
        right = np.asarray(Image.open(file)).astype(int)
        for _ in range(20):
            found = jpeg.decode(file.read_bytes(), right[..., 0].size)
            assert found is not None
            # Rounding, and how colours between two samples are guessed, are the decoder's own.
            assert np.abs(found.astype(int) - right).mean() < 3

    with ThreadPoolExecutor(8) as pool:
        decoding = [pool.submit(decode, file) for file in files]
        while not all(job.done() for job in decoding):
            np.testing.assert_allclose(backend.run(batch)["logits"], alone, rtol=1e-4, atol=1e-5)
        for job in decoding:
            job.result()
