"""ResNet with bottleneck blocks, for gpu_limits.py: torchvision's may be missing where the GPU is.

Eager archives carry this file, so it imports nothing but torch.
"""

from torch import Tensor, nn

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al., arXiv:1512.03385; the stride in the 3x3, as v1.5).

    Shapes: [B, in_channels, H, W] -> [B, 4 * channels, H / stride, W / stride]
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.body = nn.Sequential(
            *_convolution(in_channels, channels, 1),
            nn.ReLU(inplace=True),
            *_convolution(channels, channels, 3, stride=stride),
            nn.ReLU(inplace=True),
            *_convolution(channels, out_channels, 1),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(*_convolution(in_channels, out_channels, 1, stride=stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        activations: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return activations


class ResNet(nn.Module):
    """Stem, four stages of bottlenecks, mean pooling, one linear layer.

    Shapes: [B, 3, H, W] float -> [B, num_classes] float
    """

    def __init__(self, *, blocks: list[int], width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_convolution(3, width, 7, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
        )
        stages: list[nn.Module] = []
        in_channels = width
        for stage, number in enumerate(blocks):
            channels = width << stage
            for block in range(number):
                stages.append(Bottleneck(in_channels, channels, stride=2 if stage and not block else 1))
                in_channels = EXPANSION * channels
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.stages(self.stem(image)).mean(dim=[2, 3]))
        return logits


def build_resnet(*, blocks: list[int], width: int, num_classes: int) -> ResNet:
    """Fresh weights from torch's global random generator; ResNet-50 has blocks of 3, 4, 6, 3 and a width of 64."""
    return ResNet(blocks=blocks, width=width, num_classes=num_classes)


def _convolution(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.BatchNorm2d(out_channels)
