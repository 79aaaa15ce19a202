"""Layers that compute K copies of a layer at once, and the operations that can be stacked unchanged.

Between layers the activations of the copies, (B, C, ...) each, are in one of two forms: side by side, (B, K * C, ...),
or by copy, (K, B, C, ...).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.models.dropout import Dropout


def side_by_side(x: Tensor) -> Tensor:
    """(K, B, C, ...) -> (B, K * C, ...), channels-last."""
    return x.movedim((0, 2), (-2, -1)).flatten(-2).movedim(-1, 1)


def by_copy(x: Tensor, copies: int) -> Tensor:
    """(B, K * C, ...) -> (K, B, C, ...), a view."""
    return x.view(len(x), copies, -1, *x.shape[2:]).transpose(0, 1)


class ConvolutionByProducts(nn.Conv2d):
    """A convolution in G groups, as a batched matrix product over patches: (B, G * C, H, W) -> (B, G * D, H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self._reversed_padding_repeated_twice)
        for dim, size, stride, dilation in zip((2, 3), self.kernel_size, self.stride, self.dilation, strict=True):
            x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        windows = x.view(len(x), self.groups, -1, *x.shape[2:])  # (B, G, C, H', W', h, w)
        patches = windows.permute(1, 0, 3, 4, 5, 6, 2).flatten(4)  # (G, B, H', W', h * w * C)
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.groups, -1, patches.shape[-1])
        y = _products(patches, weight, self.bias)  # (G, B, H', W', D)
        return y.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


class StackedLinear(nn.Linear):
    """K fully connected layers as one batched matrix product: (K, B, ..., inputs) -> (K, B, ..., outputs)."""

    def forward(self, x: Tensor) -> Tensor:
        return _products(x, self.weight.view(len(x), -1, self.in_features), self.bias)


def _products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(G, ..., N) inputs, (G, M, N) weights and (G * M,) biases -> (G, ..., M)."""
    rows = x.flatten(1, -2)
    y = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.view(len(x), 1, -1), rows, weight.mT)
    return y.view(*x.shape[:-1], -1)


class StackedLayerNorm(nn.Module):
    """K layer normalizations: (K, B, ...) -> (K, B, ...)."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layer: nn.LayerNorm, copies: int) -> None:
        super().__init__()
        self.shape, self.eps = layer.normalized_shape, layer.eps
        for name, value in (("weight", layer.weight), ("bias", layer.bias)):
            stacked = None if value is None else nn.Parameter(value.new_empty(copies * len(value), *value.shape[1:]))
            self.register_parameter(name, stacked)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, self.shape, eps=self.eps)
        affine = (len(x), *[1] * (x.ndim - 1 - len(self.shape)), *self.shape)
        if self.weight is not None:
            y = y * self.weight.view(affine)
        return y if self.bias is None else y + self.bias.view(affine)


def shifted(dim: int) -> int:
    """The dimension of an activation in the form "by copy" that corresponds to `dim` of a single copy."""
    return dim + 1 if dim >= 0 else dim


def _conv2d(layer: nn.Conv2d, copies: int, by_products: bool) -> nn.Module:
    kind = ConvolutionByProducts if by_products and layer.padding_mode == "zeros" else nn.Conv2d
    return kind(
        copies * layer.in_channels,
        copies * layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        copies * layer.groups,
        layer.bias is not None,
        layer.padding_mode,
    )


def _batch_norm(layer: Any, copies: int, _: bool) -> nn.Module:
    arguments = (layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    norm: nn.Module = type(layer)(copies * layer.num_features, *arguments)
    return norm


def _same(layer: nn.Module, copies: int, _: bool) -> nn.Module:
    return layer


POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
ACTIVATIONS = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
)

StackLayer = Callable[[Any, int, bool], nn.Module]  # layer, copies, whether convolutions run by products
LAYERS_SIDE_BY_SIDE: dict[type[nn.Module], StackLayer] = {
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: lambda layer, copies, _: nn.GroupNorm(
        copies * layer.num_groups, copies * layer.num_channels, layer.eps, layer.affine
    ),
    **dict.fromkeys(POOLING, _same),
}
LAYERS_BY_COPY: dict[type[nn.Module], StackLayer] = {
    nn.Linear: lambda layer, copies, _: StackedLinear(
        layer.in_features, copies * layer.out_features, layer.bias is not None
    ),
    nn.LayerNorm: lambda layer, copies, _: StackedLayerNorm(layer, copies),
    nn.Flatten: lambda layer, *_: nn.Flatten(shifted(layer.start_dim), shifted(layer.end_dim)),
    Dropout: _same,
}
LAYERS_ELEMENTWISE: dict[type[nn.Module], StackLayer] = dict.fromkeys(ACTIVATIONS, _same)
LAYERS = LAYERS_SIDE_BY_SIDE | LAYERS_BY_COPY | LAYERS_ELEMENTWISE

# Functions, and names of tensor methods
OPERATIONS_SIDE_BY_SIDE: set[Any] = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
OPERATIONS_ELEMENTWISE: set[Any] = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.neg),
    *(torch.add, torch.sub, torch.mul, torch.relu, torch.sigmoid, torch.tanh),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh),
    *("add", "add_", "sub", "mul", "mul_", "relu", "relu_", "sigmoid", "tanh", "contiguous"),
}
# For each, the arguments after the first that are dimensions; the first of these must be given
OPERATIONS_ON_DIMENSIONS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.flatten, "flatten"), ("start_dim", "end_dim")),
    **dict.fromkeys((torch.mean, torch.sum, torch.amax, torch.cat, F.softmax, F.log_softmax), ("dim",)),
    **dict.fromkeys(("mean", "sum", "amax", "softmax", "log_softmax", "size", operator.getitem), ("dim",)),
}
