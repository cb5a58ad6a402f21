"""The convolutional classifier: shapes, initialisation, factory, and the three ways out of eager mode."""

import io
import math

import pytest
import torch
from torch import nn

from models.blocks import ConvBlock
from models.convnet import ConvClassifier, build_conv_classifier
from models.errors import ModelConfigError

CONFIG = {"in_channels": 1, "num_classes": 10, "widths": [4, 8], "blocks_per_stage": 2, "dropout": 0.5}


@pytest.fixture
def model() -> ConvClassifier:
    torch.manual_seed(0)
    return build_conv_classifier(**CONFIG).eval()


def test_a_conv_block_keeps_the_size_and_normalises_each_channel() -> None:
    torch.manual_seed(0)
    block = ConvBlock(3, 5)
    image = torch.randn(16, 3, 9, 7) * 10 + 4

    output = block(image)

    assert output.shape == (16, 5, 9, 7)
    assert output.min() == 0
    before_relu = block.bn(block.conv(image))
    torch.testing.assert_close(before_relu.mean(dim=(0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(before_relu.std(dim=(0, 2, 3)), torch.ones(5), rtol=0, atol=1e-2)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 1, 1), (3, 33, 17), (4, 2, 50)])
@pytest.mark.parametrize("batch", [1, 5])
def test_any_image_size_and_channel_count_gives_logits(channels: int, height: int, width: int, batch: int) -> None:
    model = build_conv_classifier(in_channels=channels, num_classes=3, widths=[4, 4, 4]).eval()

    logits = model(torch.randn(batch, channels, height, width))

    assert logits.shape == (batch, 3)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_samples_of_a_batch_do_not_influence_each_other(model: ConvClassifier) -> None:
    images = torch.randn(4, 1, 8, 8)

    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])

    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_weights_start_with_he_and_xavier_variance() -> None:
    torch.manual_seed(0)
    model = build_conv_classifier(in_channels=8, num_classes=50, widths=[64, 96])
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]

    for convolution in convolutions:
        he_std = math.sqrt(2 / (convolution.out_channels * 9))
        assert convolution.weight.std().item() == pytest.approx(he_std, rel=0.05)
    xavier_bound = math.sqrt(6 / (96 + 50))
    assert 0.98 * xavier_bound < model.classifier.weight.abs().max().item() <= xavier_bound
    assert not model.classifier.bias.any()


def test_dropout_is_active_in_training_only(model: ConvClassifier) -> None:
    image = torch.randn(1, 1, 8, 8)

    torch.testing.assert_close(model(image), model(image), rtol=0, atol=0)
    model.dropout.train()
    assert not torch.equal(model(image), model(image))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"in_channels": 0}, "in_channels is 0"),
        ({"num_classes": 1}, "num_classes is 1"),
        ({"num_classes": True}, "num_classes is True"),
        ({"widths": []}, "widths is empty"),
        ({"widths": [8, -1]}, r"widths\[1\] is -1"),
        ({"widths": 8}, "widths is 8"),
        ({"blocks_per_stage": 0}, "blocks_per_stage is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"blocks_per_stag": 1}, "'blocks_per_stag'; did you mean blocks_per_stage"),
        ({"q": 1}, "'q'; it takes in_channels"),
    ],
)
def test_a_bad_argument_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ModelConfigError, match=named):
        build_conv_classifier(**{**CONFIG, **changes})


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(ModelConfigError, match="needs num_classes and widths"):
        build_conv_classifier(in_channels=1)


# torch deprecates TorchScript; it is still one of the two formats that TorchServe loads by itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["trace", "script"])
def test_torchscript_answers_like_eager(model: ConvClassifier, method: str) -> None:
    converted = torch.jit.trace(model, torch.randn(2, 1, 8, 8)) if method == "trace" else torch.jit.script(model)

    for batch in (1, 2, 7):
        images = torch.randn(batch, 1, 8, 8)
        torch.testing.assert_close(converted(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_with_dynamic_batch_answers_like_eager(model: ConvClassifier) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    program = torch.onnx.export(
        model,
        (torch.randn(2, 1, 8, 8),),
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    for batch in (1, 3, 16):
        images = torch.randn(batch, 1, 8, 8)
        (logits,) = session.run(None, {"image": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), rtol=1e-3, atol=1e-4)
