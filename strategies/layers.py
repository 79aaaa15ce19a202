"""The list of a run's methods, from the model to the wire, and the four passes of a round through it.

    model | outer step or a foreign strategy | local rule | delay | momentum, BatchNorm at a sync | wire

Models pass the wire last, so that what is averaged is what was sent. A delay stands below the local rule, whose terms
are of the local steps alone, and above momentum and BatchNorm, whose values it takes on. What a layer does to the mean
comes before the outer step, which sees the mean that is to be the next model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from strategies.domain import Domain
from strategies.method import Method, ServerRound, State, Tensors, Terms, WorkerRound, Zeros, zeros_like
from strategies.sections import beside, under_prefix, with_prefix
from strategies.wire import MODEL, WIRE, Wire

NAMES = ("test-model", "outer", "local-rule", "delay", "momentum", "batchnorm")  # from the model to the wire


@dataclass(frozen=True)
class Layers:
    """The layers of a run by their names, those of `NAMES` or others with a place among these, and the wire.

    What a layer sends, keeps and remembers stands under its name: ``NAME/TENSOR`` in messages and in a worker's memory.
    """

    by_name: Mapping[str, Method] = field(default_factory=dict)
    wire: Wire = field(default_factory=Wire)

    def __post_init__(self) -> None:
        for name in self.by_name:
            if self._place(name) not in NAMES:
                raise ValueError(f"{name} has the place {self._place(name)}: it must be one of {', '.join(NAMES)}")

    def __iter__(self) -> Iterator[tuple[str, Method]]:
        """From the model to the wire; of two in one place, the first one given is nearer to the model."""
        return iter(sorted(self.by_name.items(), key=lambda item: NAMES.index(self._place(item[0]))))

    def _place(self, name: str) -> str:
        return name if name in NAMES else self.by_name[name].place

    @property
    def terms(self) -> Terms:
        """What the layers ask of local steps."""
        every = [layer for _, layer in self]
        return Terms(
            any(layer.constant for layer in every),
            sum(layer.pull for layer in every),
            any(layer.mean_gradient for layer in every),
        )

    @property
    def reads_x(self) -> bool:
        """Whether what a layer makes of the mean depends on the parameters before the round."""
        return any(layer.reads_x for _, layer in self)

    @property
    def partial(self) -> bool:
        """Whether messages hold a part of the parameters in some rounds."""
        return any(layer.partial for _, layer in self)

    @property
    def period(self) -> int:
        """After how many rounds messages hold the same again; after the first ones, which are as many."""
        return math.lcm(*(layer.period for _, layer in self))

    @property
    def keeps_model(self) -> bool:
        """Whether a worker keeps the model that it began its round from: the next message does not hold all of it."""
        return self.wire.down is not None or self.partial

    @property
    def keeps_memory(self) -> bool:
        """Whether a worker keeps anything between its rounds."""
        return self.wire.keeps_memory or self.keeps_model or any(layer.keeps_memory for _, layer in self)

    @property
    def reestimates_on(self) -> int:
        """On how many training images BatchNorm's statistics are estimated again before a test; 0: they are not."""
        return max([0, *(layer.reestimates_on for _, layer in self)])

    def needs_all_memories(self, everyone: bool) -> bool:
        """Whether a run must go back to its checkpoint where a worker has lost its memory."""
        return any(layer.needs_all_memories(everyone) for _, layer in self)

    def initial(self, zero: Zeros) -> State:
        """The state of each layer before the first round, by its name."""
        states = {name: layer.initial(zero) for name, layer in self}
        return {name: state for name, state in states.items() if state}

    def zero_memory(self, zero: Zeros) -> Tensors:
        """All that a worker keeps and the server has not, every entry zero."""
        kept = {name: layer.keeps(zero) for name, layer in self}
        return _joined({**kept, WIRE: self.wire.keeps(zero)})

    def messages(self, zero: Zeros) -> Tensors:
        """Tensors with the names of all that is sent besides the model, and replied, in the first and later rounds."""
        found, state = Tensors(), self.initial(zero)
        for round_ in range(1, self.period + 1):
            r = ServerRound(round_, True, zero.parameters, zero.parameters, batchnorm=zero.batchnorm)
            sent = self.send(r, state, 0)
            found |= {**sent, **self.replies(sent, round_, state)}
        return found

    def domains(self, steps: int) -> dict[str, Domain]:
        """The domains of what layers send and keep after so many local steps, of those that have one."""
        return {f"{name}/{key}": domain for name, layer in self for key, domain in layer.domains(steps).items()}

    def statistics(self) -> dict[str, Domain]:
        """The domains of BatchNorm's statistics, by their entries."""
        return {entry: domain for _, layer in self for entry, domain in layer.statistics.items()}

    def down(self, round_: int, parameters: Tensors) -> Tensors:
        """Those of the parameters that the server sends in a round to workers that hold all others."""
        return self._passing(parameters, [layer.down(round_, parameters) for _, layer in self if layer.partial])

    def up(self, round_: int, parameters: Tensors) -> Tensors:
        """Those of the parameters that a worker sends in a round."""
        return self._passing(parameters, [layer.up(round_, parameters) for _, layer in self if layer.partial])

    def _passing(self, parameters: Tensors, of_layers: Sequence[Collection[str]]) -> Tensors:
        return {name: value for name, value in parameters.items() if all(name in names for names in of_layers)}

    def send(self, r: ServerRound, state: State, worker: int) -> Tensors:
        """What the server sends to a worker besides the model."""
        return _joined({name: layer.send(r, state.get(name, {}), worker) for name, layer in self})

    def begin(self, r: WorkerRound, memory: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> None:
        """Begin a round on a worker, with its memory and what the server sent besides the model."""
        memory = beside(r.begun, memory)
        for name, layer in reversed(list(self)):
            layer.begin(r, _under(name, memory), _under(name, received))
        if self.terms.constant and not r.constant:
            r.constant = zeros_like(r.begun)

    def end(
        self, r: WorkerRound, memory: Mapping[str, Tensor], received: Mapping[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """End a round on a worker; returns what it replies besides the model, and what its layers keep."""
        r.begun, r.start = beside(r.y, r.begun), beside(r.y, r.start)
        memory, received = beside(r.y, memory), beside(r.y, received)
        replies, kept = {}, {}
        for name, layer in self:
            replies[name], kept[name] = layer.end(r, _under(name, memory), _under(name, received))
        return _joined(replies), _joined(kept)

    def message(self, r: WorkerRound, y: Tensors, memory: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
        """What a worker with this memory sends of its parameters `y`, and what the wire keeps, as ``wire/NAME``."""
        message, kept = self.wire.reply(r.round, r.worker, r.begun, self.up(r.round, y), _under(WIRE, memory))
        if self.keeps_model:
            kept = {**kept, **with_prefix(MODEL, r.begun)}
        return message, _joined({WIRE: kept})

    def replies(self, sent: Mapping[str, Tensor], round_: int, state: State) -> Tensors:
        """Tensors with the names, types and shapes of what a worker must reply to what it was sent."""
        return _joined({n: layer.replies(_under(n, sent), round_, state.get(n, {})) for n, layer in self})

    def update(self, r: ServerRound, state: State, mean: Callable[[str], Tensors]) -> State:
        """End a round on the server; `mean` gives the mean of the workers' replies to a layer."""
        after = dict(state)
        for name, layer in reversed(list(self)):
            after[name] = layer.update(r, state.get(name, {}), mean(name))
        return {name: held for name, held in after.items() if held}

    def model_for_test(self, x: Tensors, state: State) -> Tensors:
        """The parameters to be tested and saved, from those of the run."""
        for name, layer in reversed(list(self)):
            x = layer.model_for_test(x, state.get(name, {}))
        return x


def _joined(of_owners: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    """All tensors, each as ``OWNER/NAME``."""
    return {f"{owner}/{name}": tensor for owner, held in of_owners.items() for name, tensor in held.items()}


def _under(owner: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return under_prefix(f"{owner}/", tensors)
