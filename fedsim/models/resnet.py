"""Residual networks (He et al. 2016) for small images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from fedsim.data.images import ImageShape

Norm = Callable[[int], nn.Module]  # channels -> the layer
NormName = Literal["bn", "gn"]
NORMS: dict[str, Norm] = {
    "bn": nn.BatchNorm2d,
    # 32 groups as Wu and He 2018, or groups of two channels where there are fewer than 64
    "gn": lambda channels: nn.GroupNorm(min(32, channels // 2), channels),
}


def _shortcut(channels: int, width: int, stride: int, norm: Norm) -> nn.Module:
    """The way around a block: the identity, or a 1x1 convolution where the shape changes."""
    if stride == 1 and channels == width:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), norm(width))


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut = _shortcut(channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """The ResNets of depth 6n + 2 that He et al. train on CIFAR-10, section 4.2, with projection shortcuts (option B).

    (B, C, H, W) images of any size -> (B, classes) logits; convolutions by He's initialisation.
    """

    def __init__(self, blocks: int, classes: int, image: ImageShape, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(image[0], 16, 3, padding=1, bias=False)
        self.norm = norm(16)
        layers: list[nn.Module] = []
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            layers.append(Block(width // stride, width, stride, norm))
            layers += [Block(width, width, 1, norm) for _ in range(blocks - 1)]
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(64, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.conv(x)).relu())
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet20(classes: int, image: ImageShape, norm: NormName = "bn") -> nn.Module:
    """ResNet-20; 278,324 parameters with 100 classes."""
    return CifarResNet(3, classes, image, NORMS[norm])


class PreActivationBlock(nn.Module):
    """`Block` with norm and ReLU before each convolution, and nothing on the way of the identity shortcut (He et al.
    2016, "Identity Mappings in Deep Residual Networks"). The `first` block follows a norm and ReLU already.
    """

    def __init__(self, channels: int, width: int, stride: int, norm: Norm, first: bool = False) -> None:
        super().__init__()
        self.before = nn.Identity() if first else nn.Sequential(norm(channels), nn.ReLU())
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = _shortcut(channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.norm(self.conv1(self.before(x))).relu())
        return y + self.shortcut(x)  # type: ignore[no-any-return]


def resnet18(classes: int, image: ImageShape, norm: NormName = "bn") -> nn.Module:
    """torchvision's ResNet-18 with the stem for small images: a 3x3 convolution with stride 1, no max-pooling.

    (B, C, H, W) images of any size -> (B, classes) logits; 11,220,132 parameters with 100 classes.
    """
    from torchvision.models import resnet18 as of_torchvision  # takes a second

    model: nn.Module = of_torchvision(num_classes=classes, norm_layer=NORMS[norm])
    model.conv1 = nn.Conv2d(image[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def resnet18_v2(classes: int, image: ImageShape, norm: NormName = "bn") -> nn.Module:
    """The pre-activation ResNet-18 that Reddi et al. 2021 train on images of 24 x 24 pixels.

    It begins with a 7x7 convolution and max-pooling, of stride 2 both, so that it takes a sixteenth of the operations
    of `resnet18`. (B, C, H, W) images of any size -> (B, classes) logits; 11,227,812 parameters with 100 classes.
    Convolutions by He's initialisation, and small weights in the last layer, as in their code.
    """
    make_norm = NORMS[norm]
    layers = [nn.Conv2d(image[0], 64, 7, 2, padding=3, bias=False), make_norm(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, padding=1))
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        first = width == 64
        layers.append(PreActivationBlock(width if first else width // 2, width, stride, make_norm, first))
        layers.append(PreActivationBlock(width, width, 1, make_norm))
    logits = nn.Linear(512, classes)
    nn.init.normal_(logits.weight, std=0.01)
    nn.init.zeros_(logits.bias)
    model = nn.Sequential(*layers, make_norm(512), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), logits)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model
