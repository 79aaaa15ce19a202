"""Copies of many tensors at once: a GPU would need a kernel launch, or a wait, for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def fill(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy each of `values` into its tensor, all that share types and device in one call."""
    kinds: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, value in zip(tensors, values, strict=True):
        targets, sources = kinds.setdefault((tensor.dtype, value.dtype, value.device), ([], []))
        targets.append(tensor)
        sources.append(value)
    with torch.no_grad():
        for targets, sources in kinds.values():
            torch._foreach_copy_(targets, sources)


def copies(parts: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Detached copies of all tensors in `parts`."""
    copied = [{name: torch.empty_like(tensor.detach()) for name, tensor in part.items()} for part in parts]
    fill(
        (tensor for part in copied for tensor in part.values()),
        (tensor for part in parts for tensor in part.values()),
    )
    return copied


def on_host(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content`, nested mappings included, with its tensors on the CPU; a GPU is waited for once."""
    devices: set[torch.device] = set()
    copied = _copied_to_host(content, devices)
    for device in devices:
        torch.cuda.synchronize(device)
    return copied


def _copied_to_host(content: Mapping[str, Any], devices: set[torch.device]) -> dict[str, Any]:
    """Copies that may not have ended yet, into pinned memory; `devices` are then those to wait for."""
    copied: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            copied[name] = _copied_to_host(value, devices)
        elif isinstance(value, Tensor) and value.is_cuda:
            devices.add(value.device)
            copied[name] = value.to("cpu", non_blocking=True)
        else:
            copied[name] = value
    return copied
