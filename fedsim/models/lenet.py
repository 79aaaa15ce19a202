"""LeNet-5 and the wider variant with BatchNorm of the course paper."""

from __future__ import annotations

from torch import Tensor, nn

from fedsim.data.images import CIFAR_IMAGE, ImageShape


class LeNetBN(nn.Module):
    """The course paper's "LeNet-5 variant": two wide 5x5 convolutions with BN, three fully connected layers.

    (B, C, H, W) images -> (B, classes) logits; 1,774,052 parameters with 100 classes and the images of CIFAR.
    """

    def __init__(self, classes: int, image: ImageShape = CIFAR_IMAGE) -> None:
        super().__init__()
        channels, height, width = image
        self.conv1 = nn.Conv2d(channels, 64, 5, padding=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 5, padding=2)
        self.bn2 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(64 * (height // 4) * (width // 4), 384)
        self.dropout1 = nn.Dropout(0.5)
        self.fc2 = nn.Linear(384, 192)
        self.dropout2 = nn.Dropout(0.5)
        self.fc3 = nn.Linear(192, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.bn1(self.conv1(x))).relu()  # equals pool(relu(x)) bit for bit, with a quarter of the work
        x = self.pool(self.bn2(self.conv2(x))).relu()
        x = self.dropout1(self.fc1(x.flatten(1)).relu())
        x = self.dropout2(self.fc2(x).relu())
        return self.fc3(x)  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling; for small machines.

    (B, C, H, W) images of 16 x 16 pixels or more -> (B, classes) logits; 62,006 parameters with 10 classes and the
    images of CIFAR.
    """

    def __init__(self, classes: int, image: ImageShape = CIFAR_IMAGE) -> None:
        super().__init__()
        channels, *sides = image
        height, width = (((side - 4) // 2 - 4) // 2 for side in sides)
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * height * width, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x)).relu()
        x = self.pool(self.conv2(x)).relu()
        x = self.fc2(self.fc1(x.flatten(1)).relu()).relu()
        return self.fc3(x)  # type: ignore[no-any-return]
