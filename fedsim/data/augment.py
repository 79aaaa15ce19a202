"""The parts of an augmentation, and the check of functions of the user's own.

`Images` cuts, mirrors and calls them in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.registry import describe, is_own
from strategies.arguments import Choice, at_least, at_most

TRIALS = 20  # so many equal results of one fair coin of the function's own have a chance of one in a million
CUTS = ("crop", "center")
ORDERS: list[list[str]] = [*([cut] for cut in CUTS), *([cut, "mirror"] for cut in CUTS), ["mirror"], []]
Padding = Annotated[int, at_least(0), at_most(1000)]
PaddingMode = Literal["constant", "reflect"]


@dataclass(frozen=True)
class Crop:
    """A square, cut at random, also in a test its middle; `size` is its side, 0: as large as the image.

    It may reach `padding` pixels around the image, which are black (constant) or the image reflected.
    """

    size: Annotated[int, at_least(0)] = 0
    padding: Padding = 4
    mode: PaddingMode = "constant"


@dataclass(frozen=True)
class Center:
    """The square of side `size` in the middle of the image, in training and tests; `padding` and `mode` as of crop."""

    size: Annotated[int, at_least(1)]
    padding: Padding = 4
    mode: PaddingMode = "constant"


@dataclass(frozen=True)
class Mirror:
    """Mirrored, half of the time."""


def check_augment(config: Config, shape: tuple[int, int, int]) -> None:
    """Raise UserError where a function of the user's own cannot be used on images of this shape (C, H, W).

    A function ``f(images, generator)`` is tried on a few images: it must return images of the same shape and type, and
    the same ones whenever the generator is in the same state.
    """
    for choice in config.choices("augment"):
        if is_own(choice.name):
            _try(choice, shape)


def _try(choice: Choice, shape: tuple[int, int, int]) -> None:
    images = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last)
    results = []
    for _ in range(TRIALS):
        try:
            with torch.no_grad():
                results.append(choice.make(images.clone(), torch.Generator().manual_seed(0)))
        except Exception as error:  # the function may raise anything
            raise UserError(f"augment = {choice} fails with {describe(error)}") from error
        if problem := _problem(results[-1], images):
            raise UserError(f"augment = {choice} returns {problem}: it must return a tensor like the images")
    if not all(torch.equal(result, results[0]) for result in results[1:]):
        raise UserError(
            f"augment = {choice} gives other images on another call: let it draw from the generator it is given"
        )


def _problem(result: object, images: Tensor) -> str:
    """How a function's `result` differs in kind from the `images` that it was given, or ""."""
    if not isinstance(result, Tensor):
        return type(result).__name__
    kinds = [(each.dtype, list(each.shape), each.device.type) for each in (result, images)]
    return "" if kinds[0] == kinds[1] else f"{kinds[0][0]} {kinds[0][1]} for {kinds[1][0]} {kinds[1][1]}"
