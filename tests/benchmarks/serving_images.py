"""Images behind torchport and its peers: the model, its archives, and the comparison, in one command.

    python tests/benchmarks/serving_images.py FOLDER [--serve WHAT] [options of `torchport compare`]

    python tests/benchmarks/serving_images.py /tmp/images --peers mosec,litserve --users 1,64 --rounds 5
    python tests/benchmarks/serving_images.py /tmp/images --serve best --peers none --users 64

The model is the convolutional classifier of `models/` with six stages (83 million multiply-adds, 3 to 6 ms an image of
3 x 224 x 224 on one core: the class of a MobileNetV3), random weights made to disagree about the pictures, ten classes.
The archives are made once, by `torchport export`, from generated photographs which the fp32 model itself labels:
fp32 TorchScript is what everybody runs; with `--serve best` torchport serves the fastest that passes its gates here,
and the peers still run the other.

Requests are 64 generated JPEG photographs of 224 x 224, quality 90, 10 to 22 kB: the raw body, image/jpeg.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from random_classifier import tell_apart
from serving_archives import Subject, compare

from loadtest.pictures import generate_pictures
from models.convnet import ConvClassifier, build_conv_classifier

SIZE = 224
CLASSES = 10
CONFIG = {"in_channels": 3, "num_classes": CLASSES, "widths": [8, 16, 32, 64, 128, 256]}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEED = 20
FITTED, EVALUATED = 96, 256


def main() -> None:
    subject = Subject(
        name="images",
        factory="models.convnet:build_conv_classifier",
        write=write,
        evaluation="pictures",
        calibration="pictures",
        requests=("--pictures", f"{SIZE}x{SIZE}"),
    )
    compare(subject, __doc__.splitlines()[0])


def write(folder: Path) -> None:
    """Weights, signature, and pictures in a folder a label."""
    model = fit(generate_pictures(FITTED, height=SIZE, width=SIZE, seed=SEED))
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "signature.yaml").write_text(json.dumps(signature()), encoding="utf-8")  # JSON is YAML
    files = generate_pictures(EVALUATED, height=SIZE, width=SIZE, seed=SEED + 1)
    with torch.inference_mode():
        labels = torch.cat([model(tensors([data])).argmax(1) for data in files])
    print(f"pictures by class: {torch.bincount(labels, minlength=CLASSES).tolist()}", flush=True)
    for number, (data, label) in enumerate(zip(files, labels.tolist(), strict=True)):
        place = folder / "pictures" / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:03}.jpg").write_bytes(data)


def fit(files: list[bytes]) -> ConvClassifier:
    """Random weights, with statistics of these pictures, and logits that tell them apart."""
    torch.manual_seed(SEED)
    model = build_conv_classifier(**CONFIG)
    images = tensors(files)
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, torch.nn.BatchNorm2d):
                block.momentum = None  # the plain mean
        model.train()(images)
        model.eval()
        features = model.features(images).mean(dim=[2, 3])
        tell_apart(model.classifier, features)
    return model


def tensors(files: list[bytes]) -> torch.Tensor:
    """[N, 3, 224, 224] float32, normalised as the signature says."""
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def signature() -> dict[str, object]:
    image = {"mode": "RGB", "height": SIZE, "width": SIZE, "mean": list(MEAN), "std": list(STD)}
    return {
        "format_version": 1,
        "task": "image-classification",
        "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 3, SIZE, SIZE]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", CLASSES]}],
        "labels": [f"class{number}" for number in range(CLASSES)],
        "preprocessing": {"image": image},
    }


if __name__ == "__main__":
    main()
