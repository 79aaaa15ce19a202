"""The protocol of a method: a layer between the model and the wire, the server's and the worker's half in one class.

A round passes the list of layers four times, as a packet passes the layers of a network: `send` on the server, from the
model to the wire; `begin` on each worker, from the wire to the model; after the local steps `end`, back to the wire;
and `update` on the server, back to the model. `strategies.layers` has their order.

A layer is frozen and its fields are its arguments. What it remembers is given to it and returned by it: `state` on the
server, `own` on a worker. Both are part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from strategies.arguments import check_fields
from strategies.domain import Domain

Tensors = dict[str, Tensor]
State = dict[str, Any]  # tensors and numbers


class Terms(NamedTuple):
    """What local steps add to the gradient of the loss, and whether they average the gradients before that.

    `constant`: a tensor for each parameter, the same in all steps of a round; `pull`: times the distance from where the
    steps of the round began.
    """

    constant: bool = False
    pull: float = 0.0
    mean_gradient: bool = False


@dataclass(frozen=True)
class Zeros:
    """Zeros shaped like a model, by the names in its state_dict, and like the state of its local optimizer.

    `batchnorm`: those of the `buffers` that are running statistics of BatchNorm, name -> entry, as running_var.
    `new_optimizer` returns the state of a new optimizer, ``PARAMETER/ENTRY`` -> tensor.
    """

    parameters: Tensors
    buffers: Tensors
    batchnorm: Mapping[str, str]
    new_optimizer: Callable[[], Tensors] = dict

    @cached_property
    def optimizer(self) -> Tensors:
        return self.new_optimizer()


class Update(NamedTuple):
    """What one worker has sent."""

    weight: float  # in the mean; the weights of all workers averaged sum to any number
    parameters: Tensors  # its own or, where updates are encoded, those that it began from minus its own
    buffers: Tensors
    layers: Mapping[str, Tensors]  # what each layer has replied
    metrics: Mapping[str, Any]


@dataclass
class ServerRound:
    """A round on the server, counted from 1. A layer may replace what it holds, but changes no tensor in place."""

    round: int
    everyone: bool  # whether all workers take part in every round
    x: Tensors  # the parameters before the round
    begun: Tensors  # those that the workers begin from: `x`, or what an encoded message delivered of it
    lr: float = 0.0  # the workers' learning rate at its end
    batchnorm: Mapping[str, str] = field(default_factory=dict)  # see `Zeros`
    # In `update`, in which all tensors are on one device:
    updates: Mapping[int, Update] = field(default_factory=dict)  # of the workers that are averaged, in their order
    begins: Mapping[int, Tensors] = field(default_factory=dict)  # of those that begin from others than `begun`
    encoded: bool = False  # whether updates hold differences
    weights: Sequence[float] = ()  # theirs, which sum to one
    share: float = 0.0  # averaged workers over all workers
    next_x: Tensors = field(default_factory=dict)  # the mean of the workers' parameters, or what layers made of it
    buffers: Tensors = field(default_factory=dict)  # likewise

    def moved(self, worker: int) -> Tensors:
        """How far a worker that is averaged has moved: the parameters that it began from minus its own."""
        sent, begun = self.updates[worker].parameters, self.begins.get(worker, self.begun)
        return sent if self.encoded else {name: begun[name] - y for name, y in sent.items()}


@dataclass
class WorkerRound:
    """A round on a worker, counted from 1. A layer may replace what it holds, but changes no tensor in place."""

    worker: int
    round: int
    steps: int  # of this worker
    rates: Callable[[int], Sequence[float]]  # the learning rate of each local step of a round
    everyone: bool  # whether all workers take part in every round
    momentum: float  # of the local steps, where they are SGDM's
    begun: Tensors  # the parameters as the server's message has them
    start: Tensors  # those that the local steps begin from
    buffers: Tensors  # before and, in `end`, after the steps
    batchnorm: Callable[[], Mapping[str, str]] = dict  # returns those that are BatchNorm's, see `Zeros`
    continues: bool = True  # whether its update of the last round was averaged
    optimizer: Tensors = field(default_factory=dict)  # its state, likewise; what is absent is that of a new one
    constant: Tensors = field(default_factory=dict)  # see `Terms`
    # In `end`:
    y: Tensors = field(default_factory=dict)  # the parameters after the steps, to be sent
    mean_gradient: Tensors = field(default_factory=dict)  # see `Terms`

    def add_to_gradients(self, term: Tensors) -> None:
        """Add `term` to the constant, for a layer with `constant`."""
        self.constant = {name: self.constant[name] + t for name, t in term.items()} if self.constant else term


class Method:
    """A layer that does nothing; its subclasses are frozen dataclasses, and override what they need.

    What a layer sends, keeps and remembers is shaped like the zeros that it declares. An update of a worker with other
    names or shapes is refused, and so is one of other values than `domains` allow.
    """

    constant: ClassVar[bool] = False  # whether `begin` adds to the gradients, see `Terms`
    mean_gradient: ClassVar[bool] = False  # whether `end` reads the mean gradient, see `Terms`
    reads_message: ClassVar[bool] = False  # whether `begin` reads what the server has sent
    reads_x: ClassVar[bool] = (
        False  # whether what `update` makes of the mean depends on the parameters before the round
    )
    replaces_mean: ClassVar[bool] = False  # whether `update` makes the next parameters of the updates themselves
    begins_early: ClassVar[bool] = False  # whether workers begin a round before that arrives
    own_start: ClassVar[bool] = False  # whether workers begin a round from parameters of their own
    statistics: ClassVar[Mapping[str, Domain]] = {}  # of BatchNorm's statistics those that have one, by their entry
    place: ClassVar[str] = "local-rule"  # of one's own in `strategies.layers.NAMES`

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs(self) -> tuple[str, ...]:
        """The properties of a run that it needs, see `fedsim.federation.checks`."""
        return ()

    @property
    def pull(self) -> float:
        """See `Terms`."""
        return 0.0

    @property
    def reestimates_on(self) -> int:
        """On how many training images BatchNorm's statistics are estimated again before a test; 0: they are not."""
        return 0

    @property
    def one_model(self) -> bool:
        """Whether it needs one model for all workers: by default where the server has a part in it, see `update`.

        Without it, `update` is called for the models that some workers average, with a state for these; where it
        `reads_x`, for each model that these workers had before the round.
        """
        return type(self).update is not Method.update

    @property
    def keeps_memory(self) -> bool:
        """Whether a worker keeps anything between its rounds, see `keeps`."""
        return type(self).keeps is not Method.keeps

    @property
    def partial(self) -> bool:
        """Whether messages hold a part of the parameters in some rounds, see `down` and `up`."""
        return False

    @property
    def period(self) -> int:
        """After how many rounds messages hold the same parameters and replies again."""
        return 1

    def initial(self, zero: Zeros) -> State:
        """The server's state before the first round; {} where the first `update` makes it."""
        return {}

    def keeps(self, zero: Zeros) -> Tensors:
        """What a worker keeps between its rounds."""
        return {}

    def down(self, round_: int, parameters: Tensors) -> Collection[str]:
        """Which of the parameters the server sends in a round after the first, to workers that hold all others."""
        return parameters

    def up(self, round_: int, parameters: Tensors) -> Collection[str]:
        """Which of the parameters a worker sends in a round: only these are averaged."""
        return parameters

    def replies(self, sent: Tensors, round_: int, state: State) -> Tensors:
        """Tensors with the names, types and shapes of what a worker replies to what it was `sent` in a round.

        By default they are those of what was sent; `state` is the server's before the round.
        """
        return sent

    def domains(self, steps: int) -> Mapping[str, Domain]:
        """The domains of what a worker replies and keeps after so many local steps, of those that have one, by name."""
        return {}

    def needs_all_memories(self, everyone: bool) -> bool:
        """Whether a run must go back to its checkpoint where a worker has lost what it kept."""
        return False

    def send(self, r: ServerRound, state: State, worker: int) -> Tensors:
        """What the server sends to a worker besides the model."""
        return {}

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        """Begin a round on a worker that has kept `own`: {} in its first round, and after it has lost its memory."""

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        """End a round on a worker; returns what it replies, and what it keeps."""
        return {}, {}

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        """End a round on the server, from the `mean` of the workers' replies; returns the next state.

        The arguments are not changed in place.
        """
        return state

    def model_for_test(self, x: Tensors, state: State) -> Tensors:
        """The parameters to be tested and saved, from those of the run."""
        return x


def zeros_like(tensors: Mapping[str, Tensor]) -> Tensors:
    """Zeros of the same names and shapes."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def minus(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensors:
    """The difference of each tensor in `one` and the one of its name in `other`."""
    return {name: value - other[name] for name, value in one.items()}
