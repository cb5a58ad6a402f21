"""The linear model beside the text encoder: what it counts, how it learns, and the ways out of eager mode."""

import copy
import io
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.torch_release import TORCH
from models.bag_of_tokens import BagOfTokens
from models.errors import ModelConfigError
from models.text_encoder import TextClassifier, build_text_classifier

CONFIG = {
    "vocab_size": 50,
    "num_classes": 3,
    "hidden_dim": 16,
    "num_layers": 1,
    "num_heads": 4,
    "intermediate_dim": 32,
    "max_length": 12,
    "dropout": 0.5,
    "token_dropout": 0.5,
    "bag_of_tokens": True,
    "pair_buckets": 97,
}
DYNAMIC = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=12)}


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def build(**changes: object) -> TextClassifier:
    model = randomised(build_text_classifier(**{**CONFIG, **changes}))
    assert isinstance(model, TextClassifier)
    return model.eval()


def texts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Texts of all lengths up to `length`, and their mask."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)
    mask[0] = True
    return torch.randint(1, 50, (batch, length), generator=generator) * mask, mask


@pytest.mark.parametrize("pair_buckets", [0, 7])
def test_every_token_and_pair_adds_its_weight(pair_buckets: int) -> None:
    bag = randomised(BagOfTokens(50, 3, pair_buckets=pair_buckets))
    assert isinstance(bag, BagOfTokens)
    ids, mask = texts(6, 9)

    logits = bag(ids, mask)

    for row, (tokens, present) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        words = [token for token, is_text in zip(tokens, present, strict=True) if is_text]
        features = [bag.token_weights.weight[word] for word in words]
        if bag.pair_weights is not None:
            pairs = itertools.pairwise(words)
            features += [bag.pair_weights.weight[(a * 31337 + b * 7919) % pair_buckets] for a, b in pairs]
        expected = 5 * torch.stack(features).sum(dim=0) / len(features) ** 0.5 + bag.bias
        torch.testing.assert_close(logits[row], expected)


def test_a_text_without_tokens_has_the_bias() -> None:
    bag = randomised(BagOfTokens(50, 3, pair_buckets=7))
    ids = torch.zeros(2, 4, dtype=torch.int64)

    torch.testing.assert_close(bag(ids, ids > 0), torch.as_tensor(bag.bias).expand(2, -1))


def test_it_starts_from_zero() -> None:
    model = build_text_classifier(**CONFIG)

    assert model.bag_of_tokens is not None
    assert not any(parameter.any() for parameter in model.bag_of_tokens.parameters())


def test_the_answer_is_the_average_of_both_parts() -> None:
    model = build()
    ids, mask = texts(4, 9)
    encoder = copy.deepcopy(model)
    encoder.bag_of_tokens = None

    assert model.bag_of_tokens is not None
    torch.testing.assert_close(model(ids, mask), (encoder(ids, mask) + model.bag_of_tokens(ids, mask)) / 2)


def test_padding_and_neighbours_do_not_change_a_text() -> None:
    model = build()
    ids, mask = texts(5, 12)

    together = model(ids, mask)

    for row in range(5):
        length = int(mask[row].sum())
        torch.testing.assert_close(model(ids[row : row + 1, :length])[0], together[row], rtol=1e-4, atol=1e-5)


def test_both_parts_learn_on_their_own() -> None:
    model = build(dropout=0.0, token_dropout=0.0).train()
    ids, mask = texts(4, 9)
    labels = torch.tensor([0, 1, 2, 0])

    logits = model(ids, mask)
    F.cross_entropy(logits[:, 0], labels).backward()

    assert logits.shape == (4, 2, 3)
    assert model.classifier.weight.grad is not None
    assert model.bag_of_tokens is not None
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.bag_of_tokens.parameters())


def test_token_dropout_is_the_encoders_only() -> None:
    model = build(token_dropout=0.9, dropout=0.0).train()
    ids, mask = texts(4, 9)

    first, second = model(ids, mask), model(ids, mask)

    assert torch.equal(first[:, 1], second[:, 1])
    assert not torch.equal(first[:, 0], second[:, 0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name")
@pytest.mark.parametrize("convert", ["trace", "script", "export", "onnx"])
def test_every_way_out_of_eager_mode_answers_alike(convert: str) -> None:
    model = build()
    example = texts(2, 5)
    if convert in ("trace", "script"):
        run = torch.jit.trace(model, example) if convert == "trace" else torch.jit.script(model)
    elif convert == "export":
        run = torch.export.export(model, example, dynamic_shapes=(DYNAMIC, DYNAMIC)).module()
    else:
        if TORCH < (2, 11):
            pytest.skip("torch before 2.11 wants lengths of two and more here; export/program.py asks otherwise")
        onnxruntime = pytest.importorskip("onnxruntime")
        file = io.BytesIO()
        program = torch.onnx.export(
            model, example, dynamo=True, input_names=["ids", "mask"], dynamic_shapes=(DYNAMIC, DYNAMIC), verbose=False
        )
        program.save(file)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

        def run(ids: Tensor, mask: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])

    for batch, length in ((1, 1), (3, 1), (1, 12), (3, 7)):
        inputs = texts(batch, length)
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bag_of_tokens": False}, "pair_buckets is 97, and pairs are counted by the bag of tokens only"),
        ({"pair_buckets": -1}, "pair_buckets is -1"),
        ({"pair_buckets": 1.5}, "pair_buckets is 1.5"),
        ({"pair_buckets": 10_000_001}, "pair_buckets is 10000001; it must be at most 10000000"),
        ({"pair_buckets": 15838}, "pair_buckets is 15838, a multiple of 7919, .*; take 15839"),
        ({"pair_buckets": 31337}, "pair_buckets is 31337, a multiple of 31337"),
        ({"bag_of_tokens": 1}, "bag_of_tokens is 1; it must be true or false"),
    ],
)
def test_a_bad_argument_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        build(**changes)
