"""Networks that are trained with batch norm, in plain PyTorch, written as people write them.

Each is built by a function with the sizes of its publication as defaults; smaller ones are for trying out. There is no
dropout, so that two runs can be compared.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = [
    "densenet121",
    "efficientnet",
    "gan",
    "mlp",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet50",
    "small_convnet",
    "unet",
]


def _head(channels: int, classes: int) -> tuple[nn.Module, ...]:
    """From feature maps to classes, at the end of a Sequential."""
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)


# ---------------------------------------------------------------- MobileNet v1 (Howard et al., 2017)


def mobilenet_v1(
    blocks: Sequence[tuple[int, int]] = (
        (2, 1),
        (4, 2),
        (4, 1),
        (8, 2),
        (8, 1),
        (16, 2),
        *[(16, 1)] * 5,
        (32, 2),
        (32, 1),
    ),
    width: int = 32,
    classes: int = 1000,
) -> nn.Module:
    """Depthwise and pointwise convolutions in turn; a block is its channels in multiples of `width`, and its stride."""

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]

    layers = [nn.Sequential(*conv(3, width, 3, 2))]
    channels = width
    for multiple, stride in blocks:
        outputs = multiple * width
        depthwise = conv(channels, channels, 3, stride, groups=channels)
        layers.append(nn.Sequential(*depthwise, *conv(channels, outputs, 1)))
        channels = outputs
    return nn.Sequential(*layers, *_head(channels, classes))


# ---------------------------------------------------------------- MobileNet v2 (Sandler et al., 2018)


class ConvBNReLU6(nn.Sequential):
    """Convolution, batch norm, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """A wide depthwise convolution between two narrow ends, which are added where they have the same shape."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.use_residual = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [] if expansion == 1 else [ConvBNReLU6(inputs, hidden, 1)]
        layers += [
            ConvBNReLU6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """``x + conv(x)``, or ``conv(x)``."""
        out: Tensor = self.conv(x)
        return x + out if self.use_residual else out


class MobileNetV2(nn.Module):
    """Inverted residuals; a stage is an expansion, channels, a number of blocks, and the stride of the first."""

    def __init__(self, stages: Sequence[tuple[int, int, int, int]], width: int, last: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvBNReLU6(3, width, 3, 2)]
        channels = width
        for expansion, outputs, blocks, stride in stages:
            for block in range(blocks):
                layers.append(InvertedResidual(channels, outputs, 1 if block else stride, expansion))
                channels = outputs
        layers.append(ConvBNReLU6(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        x = self.classifier(x)
        return x


def mobilenet_v2(
    stages: Sequence[tuple[int, int, int, int]] = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ),
    width: int = 32,
    last: int = 1280,
    classes: int = 1000,
) -> nn.Module:
    """MobileNet v2; a stage is an expansion, channels, a number of blocks, and the stride of the first."""
    return MobileNetV2(stages, width, last, classes)


# ---------------------------------------------------------------- ResNet (He et al., 2015)


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut; the stride is that of the second."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``relu(bn3(...) + shortcut)``."""
        identity = x

        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)
        return out  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stages of bottlenecks, each of half the resolution of the one before."""

    def __init__(self, blocks: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        stages = []
        for stage, count in enumerate(blocks):
            layers = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(channels, width << stage, stride))
                channels = (width << stage) * Bottleneck.expansion
            stages.append(nn.Sequential(*layers))
        self.layers = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layers(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.fc(x)
        return x


def resnet50(blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> nn.Module:
    """ResNet of bottlenecks; `blocks` are their numbers, stage by stage."""
    return ResNet(blocks, width, classes)


# ---------------------------------------------------------------- DenseNet (Huang et al., 2016)


class DenseLayer(nn.Sequential):
    """Batch norm and ReLU before each of two convolutions; the result is appended to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__(
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The channels of `x`, and the new ones."""
        new = super().forward(x)
        return torch.cat([x, new], 1)


class Transition(nn.Sequential):
    """Half the channels at half the resolution."""

    def __init__(self, inputs: int) -> None:
        super().__init__(
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs, inputs // 2, 1, bias=False),
            nn.AvgPool2d(2, 2),
        )


class DenseNet(nn.Module):
    """Dense blocks with transitions between them."""

    def __init__(self, blocks: Sequence[int], growth: int, classes: int) -> None:
        super().__init__()
        channels = 2 * growth
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 7, 2, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]
        for place, count in enumerate(blocks):
            if place:
                layers.append(Transition(channels))
                channels //= 2
            layers.append(nn.Sequential(*(DenseLayer(channels + k * growth, growth) for k in range(count))))
            channels += count * growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = self.features(x)
        x = nn.functional.relu(x, inplace=True)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x


def densenet121(blocks: Sequence[int] = (6, 12, 24, 16), growth: int = 32, classes: int = 1000) -> nn.Module:
    """DenseNet; `blocks` are the numbers of layers in each dense block."""
    return DenseNet(blocks, growth, classes)


# ---------------------------------------------------------------- EfficientNet (Tan and Le, 2019)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a number that depends on the means of all."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """``x * scale``."""
        scale = x.mean((2, 3), keepdim=True)
        scale = self.activation(self.fc1(scale))
        scale = torch.sigmoid(self.fc2(scale))
        return x * scale


class MBConv(nn.Module):
    """An inverted residual with SiLU and squeeze-excitation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.use_residual = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU(inplace=True)]
        layers += [
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.SiLU(inplace=True),
            SqueezeExcitation(hidden, max(1, inputs // 4)),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """``block(x) + x``, or ``block(x)``."""
        out: Tensor = self.block(x)
        if self.use_residual:
            out = out + x
        return out


def efficientnet(
    stages: Sequence[tuple[int, int, int, int, int]] = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ),
    width: int = 32,
    last: int = 1280,
    classes: int = 1000,
) -> nn.Module:
    """EfficientNet-B0; a stage is an expansion, channels, a number of blocks, the stride of the first, and a kernel."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU(inplace=True)]
    channels = width
    for expansion, outputs, blocks, stride, kernel in stages:
        for block in range(blocks):
            layers.append(MBConv(channels, outputs, kernel, 1 if block else stride, expansion))
            channels = outputs
    layers += [nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last), nn.SiLU(inplace=True)]
    return nn.Sequential(*layers, *_head(last, classes))


# ---------------------------------------------------------------- U-Net (Ronneberger et al., 2015)


class DoubleConv(nn.Sequential):
    """Twice convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Down by halves, and up again with what was there on the way down."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        pairs = list(pairwise(widths))
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList([DoubleConv(3, width), *(DoubleConv(low, high) for low, high in pairs)])
        self.up = nn.ModuleList(nn.ConvTranspose2d(high, low, 2, 2) for low, high in reversed(pairs))
        self.merge = nn.ModuleList(DoubleConv(high, low) for low, high in reversed(pairs))
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel."""
        skips = []
        for level, down in enumerate(self.down):
            x = down(self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        x = self.last(x)
        return x


def unet(width: int = 64, depth: int = 4, classes: int = 2) -> nn.Module:
    """U-Net with batch norm; the height and width of the images are multiples of ``2**depth``."""
    return UNet(width, depth, classes)


# ---------------------------------------------------------------- DCGAN (Radford et al., 2015)


def gan(latent: int = 100, width: int = 64, channels: int = 3) -> tuple[nn.Module, nn.Module]:
    """Generator, from (N, latent, 1, 1) to images of 64 x 64, and discriminator, from these to (N,)."""

    def up(inputs: int, outputs: int, stride: int = 2, padding: int = 1) -> list[nn.Module]:
        conv = nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    def down(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2, inplace=True)]

    generator = nn.Sequential(
        *up(latent, 8 * width, 1, 0),
        *up(8 * width, 4 * width),
        *up(4 * width, 2 * width),
        *up(2 * width, width),
        nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(channels, width, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        *down(width, 2 * width),
        *down(2 * width, 4 * width),
        *down(4 * width, 8 * width),
        nn.Conv2d(8 * width, 1, 4, 1, 0, bias=False),
        nn.Flatten(0),
    )
    return generator, discriminator


# ---------------------------------------------------------------- smaller ones


def mlp(width: int = 1024, layers: int = 4, classes: int = 10) -> nn.Module:
    """Linear layers, each with batch norm and ReLU."""
    hidden = [module for _ in range(layers) for module in (nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, classes))


class SmallConvNet(nn.Module):
    """Three convolutions, each with batch norm, ReLU and pooling, for small images."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = self.pool(nn.functional.relu(self.bn1(self.conv1(x))))
        x = self.pool(nn.functional.relu(self.bn2(self.conv2(x))))
        x = self.pool(nn.functional.relu(self.bn3(self.conv3(x))))
        x = self.fc(x.mean((2, 3)))
        return x


def small_convnet(width: int = 32, classes: int = 10) -> nn.Module:
    """A network of three convolutions, for images of 32 x 32."""
    return SmallConvNet(width, classes)
