"""The networks by name, as plain modules; counter-based dropout; and K copies of a network stacked into one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedsim.config import Config
from fedsim.data.datasets import facts_of, image_shape
from fedsim.data.images import CIFAR_IMAGE, ImageShape
from fedsim.device import one_thread, parameter_dtype
from fedsim.errors import UserError
from fedsim.locks import GLOBAL_GENERATORS
from fedsim.models.dropout import StepKeys, set_dropout_keys, use_counter_based_dropout
from fedsim.registry import MODELS, describe, function_of
from fedsim.rng import generator


def initial_model(config: Config) -> nn.Module:
    """The model of `config` (resolved) with which a run begins."""
    what = (config.model, facts_of(config).classes, config.seed, config.device, config.precision)
    return build_model(*what, image_shape(config), config.norm)


def cpu_model(config: Config) -> nn.Module:
    """The same model on the CPU in fp32, whatever `config` says of either, for checks before a run."""
    return initial_model(config.changed({"device": "cpu", "precision": "fp32"}))


@one_thread()
def check_model(config: Config) -> None:
    """Raise UserError where the model of `config` cannot be trained on its images: a step on two images is tried.

    The forward pass may draw no random numbers except for dropout, or a run could not be repeated. Every parameter must
    get a gradient.
    """
    model = cpu_model(config)
    shape, classes = image_shape(config), facts_of(config).classes
    step_keys = StepKeys()
    set_dropout_keys(model.train(), step_keys)
    images = torch.zeros(2, *shape).to(memory_format=torch.channels_last)
    taken = f"model = {config.model} does not take the images of {config.dataset}, {_by(shape)}"
    with GLOBAL_GENERATORS, torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        try:
            logits = model(images)
        except Exception as error:  # the model's own code may raise anything
            raise UserError(f"{taken} ({describe(error)})") from error
        drawn = not torch.equal(before, torch.get_rng_state())
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (2, classes):
        raise UserError(f"model = {config.model}, on the images of {config.dataset}: {_not_logits(logits, classes)}")
    if drawn:
        raise UserError(f"model = {config.model} draws from torch's global generator: let all dropout be nn.Dropout")
    if logits.requires_grad:
        F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if unused:
        raise UserError(
            f"model = {config.model}: {', '.join(unused[:3])} gets no gradient: every parameter must. "
            "Frozen parameters are not supported: make them buffers"
        )
    if config.batch_size == 1:
        check_one_image(config, "batch-size = 1")


@one_thread()
def check_one_image(config: Config, reason: str) -> None:
    """Raise UserError where the model of `config` cannot train on a batch of one image, which `reason` asks for.

    BatchNorm over single values cannot: one value has no variance.
    """
    model = cpu_model(config)
    set_dropout_keys(model.train(), StepKeys())
    try:
        model(torch.zeros(1, *image_shape(config)).to(memory_format=torch.channels_last))
    except Exception as error:  # the model's own code may raise anything
        raise UserError(
            f"{reason}: model = {config.model} does not train on one image ({describe(error)}): give another batch-size"
        ) from error


def _not_logits(outputs: object, classes: int) -> str:
    """What is wrong with the `outputs` for two images."""
    if not isinstance(outputs, torch.Tensor):
        return f"it gives {type(outputs).__name__}, not a tensor of {_by((2, classes))} logits for two of them"
    if outputs.ndim == 2 and len(outputs) == 2:
        return f"it gives {outputs.shape[1]} logits per image, but the data has {classes} classes"
    return f"it gives {_by(outputs.shape)}, not {_by((2, classes))} logits for two of them"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def build_model(
    name: str,
    classes: int,
    seed: int,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    image: ImageShape = CIFAR_IMAGE,
    norm: str = "bn",
) -> nn.Module:
    """The model with PyTorch's default initialisation from `seed`, channels-last on `device`.

    Weights are drawn on the CPU, so that they are the same on every device. Channels-last trains 1.3 to 2.8 times
    faster. Threads may call it in parallel. Raises UserError for a model that cannot be used.
    """
    with GLOBAL_GENERATORS, torch.random.fork_rng(devices=[]):  # nn.Module's initialisation uses no other
        torch.manual_seed(int(generator(seed, 0, 0, "init").integers(2**63)))
        model = _network(name, classes, image, norm)
    return model.to(device, parameter_dtype(precision)).to(memory_format=torch.channels_last)


def _network(name: str, classes: int, image: ImageShape, norm: str) -> nn.Module:
    build = builder_of(name)
    keywords = _accepted(build, {"image": image, "norm": norm})
    if "norm" not in keywords and norm != "bn":
        raise UserError(f"norm is not used by model = {name}: leave it out")
    try:
        model = build(classes, **keywords)
    except UserError:
        raise
    except Exception as error:  # its code may raise anything
        raise UserError(
            f"model = {name} cannot be built for {classes} classes and images of {_by(image)} ({describe(error)})"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model = {name} returns {type(model).__name__}: it must return an nn.Module")
    if lazy := [n for n, p in (*model.named_parameters(), *model.named_buffers()) if nn.parameter.is_lazy(p)]:
        raise UserError(f"model = {name}: {', '.join(lazy[:3])} has no shape yet: give its layer the number of inputs")
    if shared := dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys():
        raise UserError(f"model = {name}: {', '.join(sorted(shared))} is a parameter of another layer too: copy it")
    if left_out := dict(model.named_buffers()).keys() - model.state_dict().keys():
        raise UserError(f"model = {name}: every buffer must be persistent, {', '.join(sorted(left_out))} is not")
    use_counter_based_dropout(model)
    return model


def builder_of(name: str) -> Callable[..., nn.Module]:
    """The function that builds a model; raises UserError where it cannot be imported."""
    return function_of("model", MODELS.get(name, name))


def _accepted(build: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """Those of `keywords` that `build` has parameters for."""
    try:
        parameters = inspect.signature(build).parameters
    except ValueError:  # of a function in C
        return {}
    return {name: value for name, value in keywords.items() if name in parameters}
