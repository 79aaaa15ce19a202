"""The check of a user's own augmentation, which `Images.augmented` calls in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.data.datasets import image_shape
from fedsim.errors import UserError
from fedsim.registry import describe, function_of, is_function

TRIALS = 20  # so many equal results of one fair coin of the function's own have a chance of one in a million


def check_augment(config: Config) -> None:
    """Raise UserError where keys of crops do not fit the images of `config`, or its own augmentation cannot be used.

    A function ``f(images, generator)`` is tried on a few images: it must return images of the same shape and type, and
    the same ones whenever the generator is in the same state.
    """
    shape = image_shape(config)
    if not is_function(config.augment):
        return
    function = function_of("augment", config.augment)
    images = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last)
    results = []
    for _ in range(TRIALS):
        try:
            with torch.no_grad():
                results.append(function(images.clone(), torch.Generator().manual_seed(0)))
        except Exception as error:  # the function may raise anything
            raise UserError(f"augment = {config.augment} fails with {describe(error)}") from error
        if problem := _problem(results[-1], images):
            raise UserError(f"augment = {config.augment} returns {problem}: it must return a tensor like the images")
    if not all(torch.equal(result, results[0]) for result in results[1:]):
        raise UserError(
            f"augment = {config.augment} gives other images on another call: let it draw from the generator it is given"
        )


def _problem(result: object, images: Tensor) -> str:
    """How a function's `result` differs in kind from the `images` that it was given, or ""."""
    if not isinstance(result, Tensor):
        return type(result).__name__
    kinds = [(each.dtype, list(each.shape), each.device.type) for each in (result, images)]
    return "" if kinds[0] == kinds[1] else f"{kinds[0][0]} {kinds[0][1]} for {kinds[1][0]} {kinds[1][1]}"
