"""The networks by name, as plain modules; counter-based dropout; and K copies of a network stacked into one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.data.datasets import task_of
from fedsim.data.images import CIFAR_IMAGE
from fedsim.data.task import Task, by, with_floats
from fedsim.device import one_thread, parameter_dtype
from fedsim.errors import UserError
from fedsim.models.dropout import StepKeys, set_dropout_keys, use_counter_based_dropout
from fedsim.models.layout import Layout, layout_of, set_layout
from fedsim.registry import MODELS, failures_of
from fedsim.rng import generator
from fedsim.system.locks import GLOBAL_GENERATORS
from strategies.arguments import Choice


def initial_model(config: Config) -> nn.Module:
    """The model of `config` (resolved) with which a run begins."""
    task = task_of(config)
    what = (config.model, task.outputs(config), config.seed, config.device, config.precision)
    return build_model(*what, task.shape(config))


def starting_model(config: Config) -> nn.Module:
    """`initial_model` with the weights of the file `init`, if it is given; raises UserError where they do not fit."""
    model = initial_model(config)
    if config.init:
        model.load_state_dict(_weights_of(config, model.state_dict()))
    return model


def _weights_of(config: Config, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in the file `init`, checked against those of the model."""
    with failures_of(f"init = {config.init} cannot be read", remedy="give a run's model.pt, or a saved state_dict"):
        held = torch.load(config.init, map_location="cpu", weights_only=True)
    what = f"init = {config.init}"
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise UserError(f"{what} is no state_dict: give a run's model.pt, or what torch.save makes of one")
    if other := sorted(held.keys() ^ like.keys()):
        has = "has" if other[0] in held else "has no"
        raise UserError(f"{what} {has} {other[0]}, other than model = {config.model}: give weights of this model")
    for name, value in held.items():
        if value.shape != like[name].shape:
            shapes = f"{list(value.shape)}, and of model = {config.model} {list(like[name].shape)}"
            raise UserError(f"{what}: {name} is {shapes}: give weights of this model")
        if not bool(value.isfinite().all()):
            raise UserError(f"{what}: {name} holds nan or inf: give other weights")
    return held


def cpu_model(config: Config) -> nn.Module:
    """The same model on the CPU in fp32, whatever `config` says of either, for checks before a run."""
    return initial_model(config.changed({"device": "cpu", "precision": "fp32"}))


@one_thread()
def check_model(config: Config) -> None:
    """Raise UserError where the model of `config` cannot be trained on its data: a step on two examples is tried.

    The forward pass may draw no random numbers except for dropout, or a run could not be repeated. Every parameter must
    get a gradient, and not a sparse one. A test of the two examples is tried too.
    """
    model, task = cpu_model(config), task_of(config)
    set_dropout_keys(model.train(), StepKeys())
    with GLOBAL_GENERATORS, torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        loss = _loss(model, config, task)
        drawn = not torch.equal(before, torch.get_rng_state())
    if drawn:
        raise UserError(f"model = {config.model} draws from torch's global generator: let all dropout be nn.Dropout")
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    check_gradients(config.model, dict(model.named_parameters()))
    if config.batch_size == 1:
        check_one_example(config, "batch-size = 1")
    with torch.no_grad():
        _loss(model.eval(), config, task)
    starting_model(config.changed({"device": "cpu"}))


def _loss(model: nn.Module, config: Config, task: Task) -> Tensor:
    """The loss of `model` on two examples; raises UserError where it gives no such outputs as the task wants."""
    batch = with_floats(task.trial(config, 2), torch.float32)
    taken = f"model = {config.model} does not take {task.taken(config)}"
    with failures_of(taken + ("" if model.training else ", in eval mode"), "give another --model or --dataset"):
        outputs = task.forward(model, batch)
    what = f"model = {config.model}, on the {task.metric.examples} of {config.dataset}"
    if problem := task.problem(config, outputs):
        raise UserError(f"{what}: {problem}")
    with failures_of(f"{what}: the loss fails"), warnings.catch_warnings(action="error", category=UserWarning):
        loss = task.loss(outputs, batch[1])  # of shapes that are broadcast torch only warns
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        kind = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"{what}: the loss is {kind}, not a number: let it be the mean over a batch")
    return loss


def check_gradients(name: str, parameters: dict[str, nn.Parameter]) -> None:
    """Raise UserError where one of the `parameters` of the model `name` got no gradient, or one that is not dense."""
    unused = [parameter for parameter, value in parameters.items() if value.grad is None]
    if unused:
        raise UserError(
            f"model = {name}: {', '.join(unused[:3])} gets no gradient: every parameter must. "
            "Frozen parameters are not supported: make them buffers"
        )
    sparse = [p for p, value in parameters.items() if value.grad is not None and value.grad.layout != torch.strided]
    if sparse:
        raise UserError(
            f"model = {name}: {', '.join(sparse[:3])} gets a sparse gradient, which no optimizer here takes: "
            "give nn.Embedding sparse=False"
        )


@one_thread()
def check_one_example(config: Config, reason: str) -> None:
    """Raise UserError where the model of `config` cannot train on a batch of one example, which `reason` asks for.

    BatchNorm over single values cannot: one value has no variance.
    """
    model, task = cpu_model(config), task_of(config)
    set_dropout_keys(model.train(), StepKeys())
    one = f"one {task.metric.examples.removesuffix('s')}"
    with failures_of(f"{reason}: model = {config.model} does not train on {one}", remedy="give another batch-size"):
        task.forward(model, with_floats(task.trial(config, 1), torch.float32))


def build_model(
    name: str,
    outputs: int,
    seed: int,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    shape: tuple[int, ...] = CIFAR_IMAGE,
) -> nn.Module:
    """The model with PyTorch's default initialisation from `seed`, on `device`, in its layout (`fedsim.models.layout`).

    It gives so many `outputs` for an input of `shape`. Weights are drawn on the CPU, so that they are the same on every
    device. Threads may call it in parallel. Raises UserError for a model that cannot be used.
    """
    with GLOBAL_GENERATORS, torch.random.fork_rng(devices=[]):  # nn.Module's initialisation uses no other
        torch.manual_seed(int(generator(seed, 0, 0, "init").integers(2**63)))
        model = _network(name, outputs, shape)
        layout = _layout(builder_of(name), name, outputs, shape) if len(shape) == 3 else None
    model = model.to(device, parameter_dtype(precision))
    return set_layout(model, layout) if layout else model


def _network(name: str, outputs: int, shape: tuple[int, ...]) -> nn.Module:
    choice = _choice(name)
    what = f"{outputs} classes and images of" if len(shape) == 3 else f"{outputs} outputs and inputs of"
    remedy = "" if len(shape) == 3 else "give a model of such inputs, or other arguments"
    with failures_of(f"model = {name} cannot be built for {what} {by(shape)}", remedy):
        model = choice.make(outputs, image=shape, shape=shape)
    if not isinstance(model, nn.Module):
        raise UserError(f"model = {name} returns {type(model).__name__}: it must return an nn.Module")
    use_counter_based_dropout(model)
    _check_tensors(name, model)
    return model


def _check_tensors(name: str, model: nn.Module) -> None:
    """Raise UserError where the engines cannot hold every parameter and buffer of the model `name` as it is."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if lazy := [n for n, value in tensors.items() if nn.parameter.is_lazy(value)]:
        raise UserError(f"model = {name}: {', '.join(lazy[:3])} has no shape yet: give its layer the number of inputs")
    if shared := dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys():
        raise UserError(f"model = {name}: {', '.join(sorted(shared))} is a parameter of another layer too: copy it")
    if left_out := dict(model.named_buffers()).keys() - model.state_dict().keys():
        raise UserError(f"model = {name}: every buffer must be persistent, {', '.join(sorted(left_out))} is not")
    if not dict(model.named_parameters()):
        raise UserError(f"model = {name} has no parameters to train: give one with a layer that has weights")
    if unreal := [n for n, value in tensors.items() if value.is_complex()]:
        raise UserError(
            f"model = {name}: {', '.join(unreal[:3])} is complex, and all that is averaged is real: keep its real and "
            "imaginary part (torch.view_as_real), and let the forward pass join them (torch.view_as_complex)"
        )
    if empty := [n for n, value in tensors.items() if value.numel() == 0]:
        raise UserError(f"model = {name}: {', '.join(empty[:3])} has no values: leave it out of the model")


@functools.lru_cache(maxsize=8)  # as long as the process: the forward passes of a large model take seconds
def _layout(builder: Callable[..., nn.Module], name: str, outputs: int, shape: tuple[int, ...]) -> Layout:
    """The layout of the model `name`, which `builder` makes; fedsim's own are not tried."""
    if builder.__module__.startswith(f"{__name__}."):
        return "channels-last"
    with one_thread():
        return layout_of(_network(name, outputs, shape), shape)


def builder_of(name: str) -> Callable[..., nn.Module]:
    """The function that builds a model; raises UserError where it cannot be imported."""
    return _choice(name).kind


def _choice(name: str) -> Choice:
    try:
        return MODELS.read(name)[0]
    except ValueError as error:
        raise UserError(f"model = {name}: {error}") from error
