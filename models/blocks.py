"""Building blocks of the architectures."""

from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Convolution 3x3, batch normalisation, ReLU; keeps height and width.

    Shapes (B = batch, C = channels, H = height, W = width):
        input  [B, in_channels, H, W] float32
        output [B, out_channels, H, W] float32, never negative
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # No bias: batch normalisation subtracts the mean, and any constant with it.
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H, W]."""
        activations: Tensor = self.relu(self.bn(self.conv(x)))
        return activations
