"""K copies of a network as one network, so that each kernel computes all K.

torch.fx traces the forward pass, and its graph is rewritten with the layers and operations of
`fedsim.models.stacked_layers`. A `CannotStack` error names a layer or operation that is not listed there.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fedsim.device import one_thread
from fedsim.models.dropout import StepKeys, set_dropout_keys
from fedsim.models.stacked_layers import (
    LAYERS,
    LAYERS_BY_COPY,
    LAYERS_SIDE_BY_SIDE,
    OPERATIONS_ELEMENTWISE,
    OPERATIONS_ON_DIMENSIONS,
    OPERATIONS_SIDE_BY_SIDE,
    by_copy,
    shifted,
    side_by_side,
)

Form = Literal["side by side", "by copy", "size"]  # of a value in the stacked network; sizes are those of each copy

OF_EVERY_MODULE = vars(nn.Module()).keys()
MORE_CALLS = 3  # traced, to see whether they do the same as the first
_TRACING = threading.Lock()  # torch.fx replaces nn.Module.__call__ while it traces, and then puts back what it found


class CannotStack(ValueError):
    """The model has a layer or operation that cannot be stacked; the message names it."""


def stack(model: nn.Module, copies: int, by_products: bool = False) -> nn.Module:
    """K `copies` of `model`, which `build_model` made, as one network in training mode. Raises `CannotStack`.

    If the model maps (B, C, ...) to (B, ...), the network maps (B, K * C, ...) to (K, B, ...). Parameters and buffers
    have its names and values, concatenated along the first dimension; scalars are shared. Convolutions run as one
    grouped convolution or, with `by_products`, as one batched matrix product over patches.
    """
    try:
        model = copy.deepcopy(model).train()
    except Exception as error:  # what the model holds may raise anything
        raise CannotStack(f"cannot stack {type(model).__name__}: it cannot be copied ({error})") from error
    network = _Stacker(model, copies, by_products).network()
    values = model.state_dict()
    if unused := values.keys() - network.state_dict().keys():
        raise CannotStack(f"cannot stack {', '.join(sorted(unused))}: no layer of the forward pass has it")
    network.load_state_dict({n: torch.cat([v] * copies) if v.ndim else v for n, v in values.items()}, assign=True)
    return network


class _Tracer(fx.Tracer):
    """Traces what its own thread calls; the modules that other threads call meanwhile compute as ever."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _TRACING:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in LAYERS or super().is_leaf_module(m, module_qualified_name)


def _held(model: nn.Module) -> dict[str, Any]:
    """What the modules of `model` hold besides parameters, buffers and modules: pickled, where it can be."""
    held: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in OF_EVERY_MODULE:
                with contextlib.suppress(Exception):  # its own code may raise anything
                    value = pickle.dumps(value)
                held[f"{path}.{name}" if path else name] = value
    return held


def _same(value: Any, before: Any) -> bool:
    return value is before or (isinstance(value, bytes) and isinstance(before, bytes) and value == before)


def _is_layer_of_torch(module: nn.Module) -> bool:
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, containers)


class _Stacker:
    """Rewrites the graph of a model, node by node."""

    def __init__(self, model: nn.Module, copies: int, by_products: bool) -> None:
        self._model, self._copies, self._by_products = model, copies, by_products
        for name, layer in model.named_modules():
            if _is_layer_of_torch(layer) and type(layer) not in LAYERS:
                raise CannotStack(f"cannot stack {name} ({type(layer).__name__})")
        self._held = _held(model)
        self._graph = self._trace()
        self._first_call = str(self._graph)
        self._layers: dict[str, nn.Module] = {}
        self._forms: dict[fx.Node, Form] = {}
        self._converted: dict[fx.Node, fx.Node] = {}  # activations in their other form

    def network(self) -> nn.Module:
        for node in list(self._graph.nodes):
            form = self._rewrite(node)
            inputs = "by copy" if form == "size" else form
            for value in node.all_input_nodes:
                if self._forms[value] not in (inputs, "size"):
                    node.replace_input_with(value, self._convert(value))
            self._forms[node] = form
        if any(str(self._trace()) != self._first_call for _ in range(MORE_CALLS)):
            name = type(self._model).__name__
            raise CannotStack(f"cannot stack the forward pass of {name}: it changes from call to call")
        if changed := [name for name, value in _held(self._model).items() if not _same(value, self._held.get(name))]:
            raise CannotStack(f"cannot stack the forward pass: it changes {changed[0]}, which is no buffer")
        return fx.GraphModule(self._layers, self._graph)

    def _trace(self) -> fx.Graph:
        """What a call of the forward pass does."""
        try:
            return _Tracer().trace(self._model)
        except Exception as error:  # the model's own code may raise anything
            name = type(self._model).__name__
            raise CannotStack(f"cannot trace the forward pass of {name}: {error}") from error

    def _rewrite(self, node: fx.Node) -> Form:
        """Rewrite `node` for all copies; returns the form of its output."""
        target: Any = node.target
        if node.op == "placeholder" and not self._forms:
            return "side by side"
        if node.op == "output" and isinstance(node.args[0], fx.Node):
            return "by copy"
        if node.op == "call_module":
            return self._stack_layer(node, target)
        if target in OPERATIONS_SIDE_BY_SIDE:
            return "side by side"
        if target in OPERATIONS_ELEMENTWISE:
            return self._common_form(node)
        if target in ("view", "reshape"):
            value, *sizes = node.args
            node.args, node.target = (value, self._copies, *sizes), "reshape"
            return "by copy"
        if target is getattr and node.args[1] == "shape":
            return "size"
        if target is operator.getitem and self._common_form(node) == "size" and _shift_dimensions(node, ("index",)):
            return "size"
        if _shift_dimensions(node, OPERATIONS_ON_DIMENSIONS.get(target, ())):
            return "size" if target == "size" else "by copy"
        name = target if isinstance(target, str) else target.__name__
        raise CannotStack(f"cannot stack the {node.op.removeprefix('call_')} {name} in the forward pass")

    def _stack_layer(self, node: fx.Node, name: str) -> Form:
        layer = self._model.get_submodule(name)
        if name not in self._layers:
            with torch.device("meta"):  # without drawing initial values
                self._layers[name] = LAYERS[type(layer)](layer, self._copies, self._by_products)
        if type(layer) in LAYERS_SIDE_BY_SIDE:
            return "side by side"
        return "by copy" if type(layer) in LAYERS_BY_COPY else self._common_form(node)

    def _common_form(self, node: fx.Node) -> Form:
        """The form of all inputs, or by copy if their forms differ."""
        forms = {self._forms[value] for value in node.all_input_nodes}
        return forms.pop() if len(forms) == 1 else "by copy"

    def _convert(self, value: fx.Node) -> fx.Node:
        if value not in self._converted:
            with self._graph.inserting_after(value):
                if self._forms[value] == "by copy":
                    self._converted[value] = self._graph.call_function(side_by_side, (value,))
                else:
                    self._converted[value] = self._graph.call_function(by_copy, (value, self._copies))
        return self._converted[value]


def _shift_dimensions(node: fx.Node, names: Sequence[str]) -> bool:
    """Shift the arguments `names` of `node`, which follow the first, by one; False if they are not plain integers."""
    arguments: dict[int | str, Any] = dict(enumerate(node.args)) | dict(node.kwargs)
    given = [key for place, name in enumerate(names, 1) for key in (place, name) if key in arguments]
    if not given or given[0] not in (1, names[0]):  # by default such operations use all dimensions
        return False
    for key in given:
        value = arguments[key]
        dims = value if isinstance(value, Sequence) else (value,)
        if not all(type(dim) is int for dim in dims):
            return False
        arguments[key] = tuple(map(shifted, dims)) if isinstance(value, Sequence) else shifted(value)
    node.args = tuple(arguments[place] for place in range(len(node.args)))
    node.kwargs = {name: arguments[name] for name in node.kwargs}
    return True


@one_thread()
def check_stack(build: Callable[[], nn.Module], shape: Sequence[int], by_products: bool = False) -> None:
    """Raise `CannotStack` unless two stacked copies of the float64 model that `build` makes compute the same as alone.

    It compares the outputs, gradients and buffers of a training step with random parameters, on random inputs of
    `shape` (C, ...).
    """
    random = torch.Generator().manual_seed(0)
    singles = [_with_random_values(build(), random) for _ in range(2)]
    inputs = [torch.randn(2, *shape, generator=random, dtype=torch.float64) for _ in singles]
    stacked = stack(singles[0], 2, by_products)
    stacked.load_state_dict(_concatenated([single.state_dict() for single in singles]))
    alone = [_train(single, inputs[i], torch.tensor([i])) for i, single in enumerate(singles)]
    try:
        together = _train(stacked, torch.cat(inputs, dim=1), torch.arange(2))
    except Exception as error:
        raise CannotStack(f"cannot stack this model: the stacked network fails with {error}") from error
    for name, value in _concatenated(alone).items():
        off = float((together[name].reshape(value.shape) - value).abs().max())
        if not off <= 1e-9 * (1 + float(value.abs().max())):
            raise CannotStack(f"cannot stack this model: {name} of the stacked network is wrong by {off:.1e}")


def _with_random_values(model: nn.Module, random: torch.Generator) -> nn.Module:
    """Draw weights that preserve the variance of activations, and all other values between 0.5 and 1.5."""
    for value in model.state_dict().values():
        noise = torch.rand(value.shape, generator=random, dtype=torch.float64) - 0.5
        value.copy_(noise * (12 / value[0].numel()) ** 0.5 if value.ndim > 1 else noise + 1)
    return model


def _train(model: nn.Module, inputs: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """The outputs and gradients of a training step, and the buffers after it."""
    step_keys = StepKeys(len(keys))
    step_keys.begin_step(keys)
    set_dropout_keys(model.train(), step_keys)
    outputs = model(inputs)
    outputs.square().sum().backward()
    gradients = {f"the gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"the output": outputs.detach(), **dict(model.named_buffers()), **gradients}


def _concatenated(copies: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    first = copies[0]
    return {name: torch.cat([of[name] for of in copies]) if first[name].ndim else first[name] for name in first}
