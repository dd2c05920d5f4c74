"""ResNets and DeepLabv3+ in PyTorch, written from their papers under the lineage's layer names.

The tests hold our networks against them, `benchmark.py model` times both.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

DEPTHS = {  # layer counts, and whether blocks are bottlenecks
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}


class Block(nn.Module):
    """A residual block; the stride lies in the 3x3 of a bottleneck."""

    def __init__(
        self, inputs: int, width: int, bottleneck: bool, stride: int, first: int, dilation: int
    ):
        super().__init__()
        kinds = [(width, 3, stride, first), (width, 3, 1, dilation)]
        if bottleneck:
            kinds = [(width, 1, 1, 1), (width, 3, stride, first), (4 * width, 1, 1, 1)]
        channels = inputs
        for i, (outputs, size, step, rate) in enumerate(kinds, start=1):
            conv = nn.Conv2d(channels, outputs, size, step, rate * (size // 2), rate, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(outputs))
            channels = outputs
        self.count = len(kinds)
        self.downsample = None
        if stride > 1 or inputs != channels:
            conv = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = torch.relu(y) if i < self.count else y
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Maps of all four stages; dilated by torchvision's rule, multi-grid as in the lineage."""

    def __init__(
        self, depth: str, stem: str, width: int, output_stride: int, multi_grid: tuple[int, ...]
    ):
        super().__init__()
        counts, bottleneck = DEPTHS[depth]
        if stem == "deep":
            self.conv1: nn.Module = nn.Sequential(
                nn.Conv2d(3, width, 3, 2, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, 1, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False),
            )
        else:
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        channels = 2 * width if stem == "deep" else width
        self.bn1 = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=stem == "deep")
        reached, dilation = 4, 1
        for stage, count in enumerate(counts, start=1):
            previous, stride = dilation, 1
            if stage > 1 and reached < output_stride:
                stride, reached = 2, 2 * reached
            elif stage > 1:
                dilation *= 2
            features = width * 2 ** (stage - 1)
            blocks = []
            for i in range(count):
                grid = multi_grid[i] if stage == 4 and multi_grid else 1
                first = (previous if i == 0 else dilation) * grid
                step = stride if i == 0 else 1
                blocks.append(Block(channels, features, bottleneck, step, first, dilation * grid))
                channels = features * (4 if bottleneck else 1)
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.channels = (width * (4 if bottleneck else 1), channels)  # of layer1 and layer4

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        maps = []
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            maps.append(x)
        return maps


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling."""

    def __init__(self, inputs: int, width: int, rates: tuple[int, ...]):
        super().__init__()
        self.conv1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv(inputs, width, 1))
        self.conv2 = nn.Sequential(*_conv(inputs, width, 1))
        self.count = 2 + len(rates)
        for i, rate in enumerate(rates, start=3):
            setattr(self, f"conv{i}", nn.Sequential(*_conv(inputs, width, 3, rate)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.conv1(x).expand(-1, -1, *x.shape[2:])
        rest = (getattr(self, f"conv{i}")(x) for i in range(2, self.count + 1))
        return torch.cat([pooled, *rest], dim=1)


class Decoder(nn.Module):
    """Logits and projection at stride 4 from layer1 and layer4."""

    def __init__(
        self,
        channels: tuple[int, int],
        width: int,
        rates: tuple[int, ...],
        num_classes: int,
        projection_dim: int,
    ):
        super().__init__()
        low, deep = channels
        self.low_conv = nn.Sequential(*_conv(low, width, 1, bias=True))
        self.aspp = ASPP(deep, width, rates)
        self.head = nn.Sequential(*_conv((2 + len(rates)) * width, width, 3), nn.Dropout2d(0.1))
        self.classifier = _head(2 * width, width, num_classes)
        self.representation = _head(2 * width, width, projection_dim)

    def forward(self, maps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        low = self.low_conv(maps[0])
        deep = self.head(self.aspp(maps[3]))
        deep = functional.interpolate(deep, low.shape[2:], mode="bilinear", align_corners=True)
        fused = torch.cat([low, deep], dim=1)
        return self.classifier(fused), self.representation(fused)


class DeepLabV3Plus(nn.Module):
    """(B, 3, H, W) normalised image -> logits and projection at stride 4."""

    def __init__(
        self,
        num_classes: int,
        backbone: str,
        *,
        stem: str = "deep",
        width: int = 64,
        output_stride: int = 8,
        multi_grid: tuple[int, ...] = (2, 2, 4),
        rates: tuple[int, ...] = (12, 24, 36),
        decoder_width: int = 256,
        projection_dim: int = 256,
    ):
        super().__init__()
        self.encoder = ResNet(backbone, stem, width, output_stride, multi_grid)
        self.decoder = Decoder(
            self.encoder.channels, decoder_width, rates, num_classes, projection_dim
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs: tuple[torch.Tensor, torch.Tensor] = self.decoder(self.encoder(x))
        return outputs


def state_arrays(network: nn.Module) -> dict[str, Any]:
    """Returns a network's state dict as NumPy arrays of their own."""
    return {name: value.numpy().copy() for name, value in network.state_dict().items()}


def _conv(inputs: int, outputs: int, size: int, rate: int = 1, bias: bool = False) -> list[Any]:
    padding = rate * (size // 2)
    conv = nn.Conv2d(inputs, outputs, size, padding=padding, dilation=rate, bias=bias)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _head(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *_conv(inputs, width, 3, bias=True),
        nn.Dropout2d(0.1),
        *_conv(width, width, 3, bias=True),
        nn.Dropout2d(0.1),
        nn.Conv2d(width, outputs, 1),
    )
