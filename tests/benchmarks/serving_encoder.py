"""A text encoder behind torchport and its peers: the model, its archives, and the comparison, in one command.

    python tests/benchmarks/serving_encoder.py FOLDER [--serve WHAT] [options of `torchport compare`]

    python tests/benchmarks/serving_encoder.py /tmp/encoder --users 64 --peers mosec,torchserve
    python tests/benchmarks/serving_encoder.py /tmp/encoder --serve best --users 1,64

The model is the text classifier of `models/`: 4 layers, d 256, 8 heads, feed-forward networks of 1024, 8,192 tokens,
random weights made to disagree about what they read. Requests are arrays of 8 to 64 token ids, one model thread. The
peers run fp32 TorchScript; torchport the same, or with `--serve best` the fastest artifact that passes its gates here.
"""

import json
from pathlib import Path

import numpy as np
import torch
from random_classifier import tell_apart
from serving_archives import Subject, compare

from models.text_encoder import TextClassifier, build_text_classifier

SHORTEST, LONGEST = 8, 64
CLASSES = 4
CONFIG = {
    "vocab_size": 8192,
    "num_classes": CLASSES,
    "hidden_dim": 256,
    "num_layers": 4,
    "num_heads": 8,
    "intermediate_dim": 1024,
    "max_length": LONGEST,
}
SIGNATURE = {
    "format_version": 1,
    "task": "tensor",
    "inputs": [
        {
            "name": "input_ids",
            "dtype": "int64",
            "shape": ["batch", "length"],
            "minimum": 0,
            "maximum": CONFIG["vocab_size"] - 1,
            "padding": 0,
        }
    ],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", CLASSES]}],
    "axes": {"length": {"minimum": 1, "maximum": LONGEST}},
}
SEED = 4
FITTED, SAMPLES = 256, 256
# Of the embeddings: as large as what the layers add to them.
EMBEDDING_STD = 1.0


def main() -> None:
    subject = Subject(
        name="encoder",
        factory="models.text_encoder:build_text_classifier",
        write=write,
        evaluation="evaluation.npz",
        calibration="calibration.npz",
        requests=("--lengths", f"{SHORTEST}-{LONGEST}", "--threads", "1"),
    )
    compare(subject, __doc__.splitlines()[0])


def write(folder: Path) -> None:
    """Weights, signature, and random requests."""
    model = build()
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "signature.yaml").write_text(json.dumps(SIGNATURE), encoding="utf-8")  # JSON is YAML
    for seed, name in enumerate(("evaluation", "calibration"), start=SEED + 1):
        np.savez(folder / f"{name}.npz", input_ids=requests(SAMPLES, seed=seed))


def build() -> TextClassifier:
    """Random weights whose logits tell requests apart."""
    torch.manual_seed(SEED)
    model = build_text_classifier(**CONFIG).eval()
    with torch.no_grad():
        model.token_embedding.weight.normal_(std=EMBEDDING_STD)
        model.token_embedding.weight[0].zero_()
        ids = torch.from_numpy(requests(FITTED, seed=SEED))
        features: list[torch.Tensor] = []
        hook = model.pooled_dropout.register_forward_hook(lambda module, inputs, output: features.append(output))
        model(ids)
        hook.remove()
        tell_apart(model.classifier, features[0])
    return model


def requests(count: int, *, seed: int) -> np.ndarray:
    """[count, LONGEST] int64, of SHORTEST to LONGEST tokens, the rest padding."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, CONFIG["vocab_size"], (count, LONGEST))
    lengths = generator.integers(SHORTEST, LONGEST + 1, (count, 1))
    return np.where(np.arange(LONGEST) < lengths, ids, 0)


if __name__ == "__main__":
    main()
