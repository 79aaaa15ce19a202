"""The networks, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.device import parameter_dtype
from fedsim.errors import UserError
from fedsim.models.dropout import Dropout
from fedsim.rng import generator


class Conv2d(nn.Conv2d):
    """`replicas` 5x5 convolutions side by side: (B, K * inputs, H, W) -> (B, K * outputs, H', W').

    They run as the groups of one convolution or, with `by_products`, as one batched matrix product over the patches.
    """

    def __init__(self, inputs: int, outputs: int, replicas: int, padding: int = 0) -> None:
        super().__init__(inputs * replicas, outputs * replicas, 5, padding=padding, groups=replicas)
        self.by_products = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_products:
            return super().forward(x)
        assert self.bias is not None
        patches = _patches(F.pad(x, [int(self.padding[0])] * 4), self.groups)  # (K, B, H', W', 5 * 5 * inputs)
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.groups, -1, patches.shape[-1])
        y = torch.baddbmm(self.bias.view(self.groups, 1, -1), patches.flatten(1, 3), weight.mT)
        return _side_by_side(y.view(*patches.shape[:-1], -1).flatten(0, 1).permute(0, 3, 1, 2), self.groups)


def _patches(x: Tensor, replicas: int) -> Tensor:
    """(B, K * C, H, W) -> (K, B, H - 4, W - 4, 5 * 5 * C) what the 5x5 window sees, channels the innermost."""
    windows = x.unfold(2, 5, 1).unfold(3, 5, 1)  # (B, K * C, H', W', 5, 5)
    return windows.view(len(x), replicas, -1, *windows.shape[2:]).permute(1, 0, 3, 4, 5, 6, 2).flatten(4)


def _side_by_side(x: Tensor, replicas: int) -> Tensor:
    """(K * B, C, H, W) -> (B, K * C, H, W), channels-last."""
    apart = x.permute(0, 2, 3, 1).view(replicas, -1, *x.shape[2:], x.shape[1])  # (K, B, H, W, C)
    return apart.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


class Linear(nn.Linear):
    """`replicas` fully connected layers side by side: (K, B, inputs) -> (K, B, outputs), a batched product.

    One alone is `nn.Linear`: (B, inputs) -> (B, outputs).
    """

    def __init__(self, inputs: int, outputs: int, replicas: int) -> None:
        super().__init__(inputs, outputs * replicas)
        self.replicas = replicas

    def forward(self, x: Tensor) -> Tensor:
        if self.replicas == 1:
            return super().forward(x)
        weight = self.weight.view(self.replicas, -1, self.in_features)
        return torch.baddbmm(self.bias.view(self.replicas, 1, -1), x, weight.mT)


def _flatten(x: Tensor, replicas: int) -> Tensor:
    """(B, K * C, H, W) -> (K, B, C * H * W); without the K for one replica."""
    if replicas == 1:
        return x.flatten(1)
    return x.contiguous().view(len(x), replicas, -1).transpose(0, 1)


class LeNetBN(nn.Module):
    """The course paper's "LeNet-5 variant": two wide 5x5 convolutions with BN, three fully connected layers.

    (B, 3, 32, 32) images -> (B, classes) logits; 1,774,052 parameters with 100 classes. K `replicas` side by side:
    (B, K * 3, 32, 32) -> (K, B, classes).
    """

    def __init__(self, classes: int, replicas: int = 1) -> None:
        super().__init__()
        self.replicas = replicas
        self.conv1 = Conv2d(3, 64, replicas, padding=2)
        self.bn1 = nn.BatchNorm2d(64 * replicas)
        self.conv2 = Conv2d(64, 64, replicas, padding=2)
        self.bn2 = nn.BatchNorm2d(64 * replicas)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = Linear(64 * 8 * 8, 384, replicas)
        self.dropout1 = Dropout(0.5)
        self.fc2 = Linear(384, 192, replicas)
        self.dropout2 = Dropout(0.5)
        self.fc3 = Linear(192, classes, replicas)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.bn1(self.conv1(x))).relu()  # pool(relu(x)), bit for bit, on a quarter of the values
        x = self.pool(self.bn2(self.conv2(x))).relu()
        x = self.dropout1(self.fc1(_flatten(x, self.replicas)).relu())
        x = self.dropout2(self.fc2(x).relu())
        return self.fc3(x)  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """The classic LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling; for small machines.

    (B, 3, 32, 32) images -> (B, classes) logits; 62,006 parameters with 10 classes. K `replicas` side by side:
    (B, K * 3, 32, 32) -> (K, B, classes).
    """

    def __init__(self, classes: int, replicas: int = 1) -> None:
        super().__init__()
        self.replicas = replicas
        self.conv1 = Conv2d(3, 6, replicas)
        self.conv2 = Conv2d(6, 16, replicas)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = Linear(16 * 5 * 5, 120, replicas)
        self.fc2 = Linear(120, 84, replicas)
        self.fc3 = Linear(84, classes, replicas)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x)).relu()
        x = self.pool(self.conv2(x)).relu()
        x = self.fc2(self.fc1(_flatten(x, self.replicas)).relu()).relu()
        return self.fc3(x)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[int, int], nn.Module]] = {"lenet-bn": LeNetBN, "lenet5": LeNet5}


def build_model(
    name: str, classes: int, seed: int, device: torch.device | str = "cpu", precision: str = "fp32"
) -> nn.Module:
    """The model with PyTorch's default initialisation drawn from `seed`, channels-last on `device`.

    It is drawn on the CPU: the same weights on every device. Channels-last trains 1.3 to 2.8 times faster.
    """
    with torch.random.fork_rng(devices=[]):  # nn.Module's initialisation knows only the global stream
        torch.manual_seed(int(generator(seed, 0, 0, "init").integers(2**63)))
        model = _network(name, classes)
    return model.to(device, parameter_dtype(precision)).to(memory_format=torch.channels_last)


def blank_model(
    name: str, classes: int, device: torch.device | str = "cpu", precision: str = "fp32", replicas: int = 1
) -> nn.Module:
    """The model, or `replicas` side by side, as `build_model` lays it out, its values not set: for others to be loaded.

    It draws nothing, so that client threads may build theirs at once: two that touch torch's global stream
    deadlock, one in `get_rng_state`, which holds its lock and waits for the GIL, one in `manual_seed`.
    """
    with torch.device("meta"):
        model = _network(name, classes, replicas)
    # What `to_empty` does, without the second that it takes to import SymPy for it
    shapes = model.state_dict().items()
    values = {name: torch.empty(value.shape, dtype=value.dtype, device=device) for name, value in shapes}
    model.load_state_dict(values, assign=True)
    return model.to(parameter_dtype(precision)).to(memory_format=torch.channels_last)


def _network(name: str, classes: int, replicas: int = 1) -> nn.Module:
    if name not in MODELS:
        raise UserError(f"unknown model {name}: it must be one of {', '.join(MODELS)}")
    return MODELS[name](classes, replicas)


def convolve_by_products(model: nn.Module) -> None:
    """Let every convolution of `model` run as a matrix product over patches: for replicas side by side on a GPU."""
    for module in model.modules():
        if isinstance(module, Conv2d):
            module.by_products = True
