"""A convolutional image classifier for any image size and channel count."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from models.blocks import ConvBlock
from models.checks import require_arguments, require_dropout, require_integer
from models.errors import ModelConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvClassifierConfig:
    """What a `ConvClassifier` is built from; `build_conv_classifier` translates."""

    in_channels: int
    """Channels of an image: 1 for grey, 3 for RGB."""

    num_classes: int
    """Length of the logits; at least 2."""

    widths: tuple[int, ...]
    """Channels of each stage. Every stage after the first halves height and width."""

    blocks_per_stage: int = 1
    """ConvBlocks in each stage."""

    dropout: float = 0.0
    """Probability, in [0, 1), that a pooled feature is zeroed in training."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ModelConfigError: naming the field, its value and what it must be.
        """
        require_integer("in_channels", self.in_channels, minimum=1)
        require_integer("num_classes", self.num_classes, minimum=2)
        require_integer("blocks_per_stage", self.blocks_per_stage, minimum=1)
        if not self.widths:
            raise ModelConfigError("widths is empty; give the channels of at least one stage, such as [32, 64].")
        for stage, width in enumerate(self.widths):
            require_integer(f"widths[{stage}]", width, minimum=1)
        require_dropout(self.dropout)


class ConvClassifier(nn.Module):
    """Stages of ConvBlocks, global average pooling, and one linear layer.

    Shapes (B = batch, C = channels, H = height, W = width, K = classes):
        input  [B, in_channels, H, W] float32, normalised; any H >= 1 and W >= 1
        output [B, num_classes] float32 logits
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        blocks_per_stage: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, width in enumerate(widths):
            if stage > 0:
                # ceil_mode keeps the last row of an odd size, and a size of 1 alive.
                layers.append(nn.MaxPool2d(kernel_size=2, ceil_mode=True))
            for _ in range(blocks_per_stage):
                layers.append(ConvBlock(channels, width))
                channels = width
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        """Maps normalised images [B, C, H, W] to logits [B, K]."""
        features = self.features(image)  # [B, widths[-1], H', W']
        # mean() rather than adaptive pooling: its backward pass is deterministic on CUDA.
        pooled = features.mean(dim=[2, 3])  # [B, widths[-1]]
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits


def build_conv_classifier(**config: Any) -> ConvClassifier:
    """Builds the classifier a checkpoint describes.

    Args:
        **config: the fields of `ConvClassifierConfig`; lists are taken for tuples.

    Returns:
        A classifier with fresh weights (from torch's global random generator), in training mode.

    Raises:
        ModelConfigError: for an unknown, missing or impossible argument.
    """
    require_arguments("ConvClassifier", ConvClassifierConfig, config)
    if not isinstance(config["widths"], list | tuple):
        raise ModelConfigError(f"widths is {config['widths']!r}; it must be a list of channel counts.")
    checked = ConvClassifierConfig(**{**config, "widths": tuple(config["widths"])})
    return ConvClassifier(**asdict(checked))


def _initialise(module: nn.Module) -> None:
    """He initialisation before a ReLU, Xavier before the softmax, zero for biases."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
