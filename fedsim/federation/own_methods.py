"""The trial of methods of the user's own, before a run: a few rounds of two workers on small made-up tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsim.config import CHOSEN, Config
from fedsim.device import one_thread
from fedsim.errors import UserError
from fedsim.models import cpu_model
from fedsim.registry import describe, names_own
from fedsim.training.failures import place_of
from fedsim.training.methods import OF_THE_SERVER, codec_of, field_of, layers_of, mean_of
from strategies.arguments import kebab
from strategies.batchnorm import batchnorm_buffers
from strategies.compression import Codec
from strategies.mean import Mean, mean
from strategies.method import Method, ServerRound, State, Tensors, Update, WorkerRound, Zeros
from strategies.sections import buffers_of

ROUNDS, WORKERS, STEPS, LR = 4, 2, 2, 0.1
OF_WORKERS = ("begin", "end", "keeps", "replies", "constant", "pull", "mean_gradient")


@one_thread()
def try_own_methods(config: Config) -> None:
    """Raise UserError where a layer, codec or mean of the user's own fails, or does not do what it declares."""
    own = [key for key in CHOSEN if names_own(getattr(config, key))]
    if not own:
        return
    small = _Small.of(config)
    for name, layer in layers_of(config, server=True):
        if field_of(name) in own and not layer.replaces_mean:
            _check_halves(config, name, layer)
            _twice(config, field_of(name), partial(_rounds, layer, small))
    for key, down in (("compress", False), ("compress_down", True)):
        codec = codec_of(config, down)
        if codec and key in own:
            _twice(config, key, partial(_messages, codec, small))
    if "mean" in own:
        _twice(config, "mean", partial(_mean, mean_of(config), small))


def _check_halves(config: Config, name: str, layer: Method) -> None:
    """Raise UserError where a layer has a worker's half in a key whose layers the server has alone."""
    halves = [half for half in OF_WORKERS if getattr(type(layer), half) is not getattr(Method, half)]
    if name in OF_THE_SERVER and halves:
        key = kebab(field_of(name))
        raise UserError(
            f"{key} = {getattr(config, field_of(name))}: its {halves[0]} runs on a worker, where {key} has no part: "
            f'give it as --layer, with place = "{key}" in its class'
        )


def _twice(config: Config, key: str, trial: Callable[[], list[Tensor]]) -> None:
    """Raise UserError where a trial fails, or gives other tensors when it is repeated."""
    what = f"{kebab(key)} = {getattr(config, key)}"
    results = []
    for _ in range(2):
        try:
            results.append(trial())
        except Wrong as wrong:
            raise UserError(f"{what}: in a trial {wrong}") from wrong
        except Exception as error:  # the user's code may raise anything
            place = ", ".join(filter(None, [describe(error), place_of(error)]))
            raise UserError(f"{what} fails in a trial ({place})") from error
    if not all(map(torch.equal, *results)):
        raise UserError(f"{what} gives other results when it is called again: let it draw no random numbers")


class Wrong(UserError):
    """What a method of the user's own did in a trial, and should not."""


@dataclass(frozen=True)
class _Small:
    """The parameters and buffers of a model, cut to two values in each dimension."""

    parameters: Tensors
    buffers: Tensors
    batchnorm: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> _Small:
        model = cpu_model(config)
        cut = {n: v.detach()[(slice(2),) * v.ndim].clone() for n, v in model.state_dict().items()}
        buffers = {name: cut.pop(name) for name in buffers_of(model)}
        return cls(cut, buffers, batchnorm_buffers(model))

    @property
    def zeros(self) -> Zeros:
        return Zeros(_zeros(self.parameters), _zeros(self.buffers), self.batchnorm)


def _rounds(layer: Method, small: _Small) -> list[Tensor]:
    """What a layer makes of a few rounds."""
    draw = torch.Generator().manual_seed(0)
    state, kept = layer.initial(small.zeros), [Tensors(), Tensors()]
    x, found = small.parameters, list[Tensor]()
    for round_ in range(1, ROUNDS + 1):
        server = ServerRound(round_, True, x, x, LR, small.batchnorm)
        updates: dict[int, Update] = {}
        for worker in range(WORKERS):
            sent = _unchanged("send", layer.send, server, state, worker)
            r = WorkerRound(worker, round_, STEPS, lambda _: [LR] * STEPS, True, 0.0, x, x, small.buffers)
            updates[worker], kept[worker] = _on_worker(layer, small, r, (kept[worker], sent, state), draw)
        server.updates, server.weights, server.share = updates, [0.5, 0.5], 1.0
        server.next_x = {**x, **mean([update.parameters for update in updates.values()], server.weights)}
        server.buffers = small.buffers
        replied = mean([update.layers[""] for update in updates.values()], server.weights)
        state = _unchanged("update", layer.update, server, state, replied)
        _check_like("update", "the next parameters", server.next_x, small.parameters)
        x = server.next_x
        tested = _unchanged("model_for_test", layer.model_for_test, x, state)
        _check_like("model_for_test", "the parameters to test", tested, small.parameters)
        of_workers = [tensor for own in kept for tensor in own.values()]
        found += [*x.values(), *tested.values(), *of_workers, *(v for v in state.values() if isinstance(v, Tensor))]
    return found


def _on_worker(
    layer: Method, small: _Small, r: WorkerRound, has: tuple[Tensors, Tensors, State], draw: torch.Generator
) -> tuple[Update, Tensors]:
    """The update of a worker that `has` kept and received something of a server's state, and what the layer keeps."""
    own, received, state = has
    before = replace(r)
    _unchanged("begin", layer.begin, r, own, received)
    if not layer.reads_message:
        _check_reads_nothing(layer, before, (own, received))
    if r.constant and not layer.constant:
        raise Wrong("begin adds to the gradients: declare constant = True")
    _check_like("begin", "the parameters to begin from", r.start, small.parameters)
    r.y = {name: start - LR * torch.randn(start.shape, generator=draw) for name, start in r.start.items()}
    if layer.mean_gradient:
        r.mean_gradient = {name: torch.randn(y.shape, generator=draw) for name, y in r.y.items()}
    reply, kept = _unchanged("end", layer.end, r, own, received)
    _check_like("end", "the reply that `replies` declares", reply, layer.replies(received, r.round, state))
    _check_like("end", "the memory that `keeps` declares", kept, layer.keeps(small.zeros))
    _check_like("end", "the parameters to send", r.y, small.parameters)
    sent = {name: r.y[name] for name in r.y if name in layer.up(r.round, r.y)}
    return Update(1.0, sent, small.buffers, {"": reply}, {}), kept


def _check_reads_nothing(layer: Method, r: WorkerRound, has: tuple[Tensors, Tensors]) -> None:
    """Raise Wrong where `begin` does otherwise after another message of the server's."""
    own, received = has
    same, other = replace(r), replace(r, begun=_moved(r.begun))
    layer.begin(same, own, received)
    layer.begin(other, own, _moved(received))
    begun = [[*_tensors((each.start, each.constant, each.optimizer))] for each in (same, other)]
    if len(begun[0]) != len(begun[1]) or not all(map(torch.equal, *begun)):
        raise Wrong("begin reads what the server has sent: declare reads_message = True")


def _moved(tensors: Tensors) -> Tensors:
    return {name: value + 1 for name, value in tensors.items()}


def _messages(codec: Codec, small: _Small) -> list[Tensor]:
    """What a codec delivers of a few tensors, in messages that may begin from the one before."""
    draw, found = torch.Generator().manual_seed(0), []
    for name, like in small.parameters.items():
        warm = None
        for round_ in range(ROUNDS):
            x = torch.randn(like.shape, generator=draw)
            parts = _unchanged("encode", codec.encode, x, torch.Generator().manual_seed(round_), warm)
            decoded = codec.decode(parts, torch.zeros_like(like), torch.Generator().manual_seed(round_))
            _check_like("decode", "a tensor like the one encoded", {name: decoded}, {name: x})
            warm = codec.warm_start(parts)
            found.append(decoded)
    return found


def _mean(of_workers: Mean, small: _Small) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = small.parameters
    parts = [{name: value + torch.randn(value.shape, generator=draw) for name, value in x.items()} for _ in range(5)]
    made = _unchanged("the mean", of_workers, x, parts, [0.2] * 5)
    _check_like("it", "tensors like those of the workers", made, x)
    return list(made.values())


def _zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(value) for name, value in tensors.items()}


def _unchanged(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call, which may not change a tensor in its arguments."""
    before = [(tensor, tensor.clone()) for argument in arguments for tensor in _tensors(argument)]
    result = call(*arguments)
    if not all(torch.equal(tensor, held) for tensor, held in before):
        raise Wrong(f"{what} changes a tensor that it was given: return new ones")
    return result


def _tensors(held: Any) -> Iterator[Tensor]:
    """The tensors in an argument: in its fields, values or entries."""
    if isinstance(held, Tensor):
        yield held
    elif is_dataclass(held) and not isinstance(held, type):
        yield from (tensor for each in fields(held) for tensor in _tensors(getattr(held, each.name)))
    elif isinstance(held, Mapping | list | tuple):
        yield from (t for each in (held.values() if isinstance(held, Mapping) else held) for t in _tensors(each))


def _check_like(what: str, meant: str, made: Any, like: Tensors) -> None:
    if not isinstance(made, Mapping) or made.keys() != like.keys():
        missing = sorted(like.keys() - made.keys()) if isinstance(made, Mapping) else []
        if missing or not isinstance(made, Mapping):
            raise Wrong(f"{what} gives {f'no {missing[0]}' if missing else type(made).__name__} in {meant}")
        raise Wrong(f"{what} gives {min(made.keys() - like.keys())}, which is not in {meant}")
    for name, value in like.items():
        got = made[name]
        if not isinstance(got, Tensor) or (got.shape, got.dtype) != (value.shape, value.dtype):
            shown = f"{list(got.shape)} {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
            raise Wrong(f"{what} gives {name} in {meant} as {shown}, not {list(value.shape)} {value.dtype}")
        if not got.isfinite().all():
            raise Wrong(f"{what} gives values that are not finite: {name}")
