"""Any strategy of Flower's current API, as a layer in place of LocalSGD's mean and outer step.

The strategy gets only the parameters, as plain arrays, of the workers whose updates may be averaged. It sees the worker
numbers as node ids, in ascending order. Sampling, screening, buffers and averaged optimizer states stay LocalSGD's,
since Flower's strategies treat a counter or a variance as a weight.

Each round uses a new instance, with the attributes that the last one had at its end, so that a resumed run equals one
that was never interrupted. A strategy with any other state is refused.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from strategies.by_name import first_line, quiet
from strategies.errors import StrategyFailed
from strategies.method import Method, ServerRound, State, Tensors, Update
from strategies.object_state import NotPlain, set_state, state_of
from strategies.tensor_array import CopiedArray, tensor_record, tensors_of

MakeStrategy = Callable[[], Strategy]
TRIAL_ROUNDS = 3
MAX_ASKED = 5  # calls of get_node_ids in a round: Flower's strategies poll it while they wait for more nodes


@dataclass(frozen=True)
class FlowerStrategy(Method):
    """The strategies that `make` makes, in place of the mean of parameters and the outer step.

    Their state must be in their attributes alone, see `check_state`. What they draw depends on `seed` and the round.
    """

    needs = ("plain-models", "mean-of-all")
    replaces_mean = True
    make: MakeStrategy
    seed: int = 0

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        """Take the parameters that the strategy makes of the updates; returns what it remembers."""
        r.next_x, state = _take_round_from(self.make, state, self.seed, r.round, r.x, r.updates)
        return state


def take_round(
    strategy: Strategy, seed: int, round_: int, x: Tensors, updates: Mapping[int, Update]
) -> dict[str, Tensor]:
    """The parameters that `strategy` computes from the `updates` of a round that began from `x`.

    What it draws from the global generators of Python, NumPy and torch depends on `seed` and the round alone. Raises
    StrategyFailed.
    """
    arrays = tensor_record(x, CopiedArray)  # the strategy may change the values that it takes from it
    with _isolated(f"{seed}/{round_}"):
        try:
            messages = list(strategy.configure_train(round_, arrays, ConfigRecord(), _Workers(updates)))
            _check(messages, arrays, updates)
            to = {message.metadata.dst_node_id: message for message in messages}
            replies = [_reply(to[worker], updates[worker]) for worker in sorted(updates)]
            made, _ = strategy.aggregate_train(round_, replies)
            return _like(x, made, len(updates))
        except StrategyFailed as error:
            raise StrategyFailed(f"round {round_}: it {error}") from error
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}, {_place(error, strategy)}"
            raise StrategyFailed(f"round {round_}: it failed ({what})") from error


def _take_round_from(
    make: MakeStrategy, state: State, seed: int, round_: int, x: Tensors, updates: Mapping[int, Update]
) -> tuple[dict[str, Tensor], State]:
    """`take_round` of a new strategy with the attributes in `state`, and its attributes after the round.

    Raises StrategyFailed, also where these cannot be saved.
    """
    strategy = make()
    new = dict(vars(strategy))
    set_state(strategy, state)
    parameters = take_round(strategy, seed, round_, x, updates)
    try:
        return parameters, state_of(strategy, new)
    except NotPlain as reason:
        raise StrategyFailed(f"round {round_}: it cannot be saved: {reason}: keep arrays and numbers alone") from reason


def check_state(make: MakeStrategy, parameters: Tensors, workers: int, seed: int) -> None:
    """Raise StrategyFailed where a strategy fails, or where its state is not in its attributes alone.

    A few rounds are tried with random updates of small tensors with these names: one instance for all rounds must give
    what a new instance for each gives, which starts from the saved state.
    """
    x = again = {name: value[(slice(2),) * value.ndim].detach().cpu() for name, value in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    alive, state = make(), State()
    with contextlib.redirect_stdout(io.StringIO()):
        for round_ in range(1, TRIAL_ROUNDS + 1):
            updates = {worker: _made_up(x, worker, generator) for worker in range(workers)}
            x = take_round(alive, seed, round_, x, updates)
            again, state = _take_round_from(make, state, seed, round_, again, updates)
            if any(not torch.equal(x[name], again[name]) for name in x):
                raise StrategyFailed(
                    f"round {round_}: a resumed run would differ: it depends on more than its attributes, for instance "
                    "on a variable of its module"
                )


def _place(error: Exception, strategy: Strategy) -> str:
    """Where an error was raised: the last line in the strategy's own file, if that is in the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == inspect.getfile(type(strategy))]
    at = (own or frames)[-1]
    return f"in line {at.lineno} of {at.filename}"


def _made_up(x: Tensors, worker: int, generator: torch.Generator) -> Update:
    moved = {n: v + 0.01 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in x.items()}
    return Update(1.0, moved, {}, {}, {"num-examples": 64 + worker, "train-loss": 1.0})


def _reply(message: Message, update: Update) -> Message:
    arrays = tensor_record(update.parameters, CopiedArray)
    metrics = MetricRecord(dict(update.metrics))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def _check(messages: Sequence[Message], arrays: ArrayRecord, workers: Iterable[int]) -> None:
    """Raise StrategyFailed unless these are the messages that the workers were sent."""
    if sorted(message.metadata.dst_node_id for message in messages) != sorted(workers):
        raise StrategyFailed("sends to other clients than those of the round, which --fraction and the seed determine")
    for message in messages:
        for config in message.content.config_records.values():
            if others := sorted(config.keys() - {"server-round"}):
                raise StrategyFailed(f"sets {others[0]} for the clients, which follow the keys of the run alone")
        for sent in message.content.array_records.values():
            same = sent is arrays or (
                sent.keys() == arrays.keys() and all(np.array_equal(sent[n].numpy(), arrays[n].numpy()) for n in arrays)
            )
            if not same:
                raise StrategyFailed("sends other arrays than the model")


def _like(x: Tensors, made: ArrayRecord | None, replies: int) -> dict[str, Tensor]:
    """The tensors of `made`, which must have the names and shapes of `x`, with its dtypes and on its device."""
    if made is None:
        raise StrategyFailed(f"made no model of {replies} updates: give --min-clients, or the strategy other arguments")
    tensors = tensors_of(made)
    if tensors.keys() != x.keys():
        raise StrategyFailed(f"made other arrays than it was sent: {min(tensors.keys() ^ x.keys())}")
    for name, tensor in tensors.items():
        if tensor.shape != x[name].shape:
            raise StrategyFailed(f"made {name} of shape {list(tensor.shape)}, not {list(x[name].shape)}")
    return {name: tensors[name].to(value.device, value.dtype) for name, value in x.items()}


@contextlib.contextmanager
def _isolated(seed: str) -> Iterator[None]:
    """Context manager: seed the global generators, and restore them afterwards.

    Existing objects are kept out of garbage collection, which some of Flower's strategies run for every record.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    gc.freeze()
    with quiet(), torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(random.getrandbits(32))  # noqa: NPY002
        torch.manual_seed(random.getrandbits(63))
        try:
            yield
        finally:
            gc.unfreeze()
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


class _Workers(Grid):
    """A grid that lists the workers of a round for the strategy; fedsim itself sends the messages."""

    def __init__(self, workers: Iterable[int]) -> None:
        self._workers = sorted(workers)
        self._asked = 0

    def get_node_ids(self) -> Iterable[int]:
        self._asked += 1
        if self._asked > MAX_ASKED:
            raise StrategyFailed("waits for more clients than a round has")
        return list(self._workers)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StrategyFailed("sends messages itself, but fedsim runs the rounds")

    set_run = push_messages = pull_messages = send_and_receive = _refuse
    run = property(_refuse)
