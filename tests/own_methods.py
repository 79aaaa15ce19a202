"""Methods of a user's own, right and wrong, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.uneven import Labelled, Partition
from fedsim.optim.lr_schedule import Shape
from fedsim.training.local_steps import DecisionState, LocalSteps, LocalStepsSchedule, Outline, SoFar
from fedsim.training.workers import Turn, Workers
from strategies.arguments import at_least, below
from strategies.compression import Codec, Parts
from strategies.mean import Mean
from strategies.method import Method, ServerRound, State, Tensors, WorkerRound, Zeros, minus, zeros_like


@dataclass(frozen=True)
class Drift(Method):
    """A worker adds a part of its last drift to its gradients."""

    constant = True
    strength: Annotated[float, at_least(0), below(1)] = 0.1

    def keeps(self, zero: Zeros) -> Tensors:
        return zero.parameters

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.add_to_gradients({name: self.strength * d for name, d in (own or zeros_like(r.begun)).items()})

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        return {}, minus(r.start, r.y)


@dataclass(frozen=True)
class Half(Method):
    """The server goes a part of the way to the mean."""

    place = "outer"
    part: float = 0.5

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        r.next_x = {name: torch.lerp(r.x[name], y, self.part) for name, y in r.next_x.items()}
        return state


@dataclass(frozen=True)
class Rounded(Codec):
    """So many decimal digits."""

    digits: int = 3

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        return {"values": (x * 10**self.digits).round().to(torch.int32)}

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        return parts["values"].to(like.dtype).div(10**self.digits)


@dataclass(frozen=True)
class First(Mean):
    """The first worker's."""

    def __call__(self, x: Tensors, parts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        return dict(parts[0])


@dataclass(frozen=True)
class EveryOther(Partition):
    """Client k holds the images k, k + K, ..."""

    first: int = 0

    def shards(self, images: Labelled, clients: int, seed: int) -> list[NDArray[np.int64]]:
        return [np.arange(self.first + client, len(images.labels), clients) for client in range(clients)]


@dataclass(frozen=True)
class Triangle(Shape):
    """To zero in a line."""

    def factor(self, epoch: float, progress: float) -> float:
        return 1.0 - progress


@dataclass(frozen=True)
class Alternating(LocalStepsSchedule):
    """J in even epochs, one step in odd ones."""

    def rule(self, run: Outline) -> LocalSteps:
        return LocalSteps(lambda step: run.local_steps if int(step / run.steps_per_epoch) % 2 == 0 else 1)


@dataclass(frozen=True)
class Growing(LocalStepsSchedule):
    """One step more in every round; J of the first one is the key's."""

    def decide(self, run: Outline, so_far: SoFar, state: DecisionState) -> tuple[int, DecisionState]:
        rounds = state.get("rounds", 0)
        return run.local_steps + int(rounds), {"rounds": rounds + 1}


@dataclass(frozen=True)
class Shifts(Workers):
    """Every other client takes half of the steps; in every third round the last client is away."""

    part: float = 0.5

    def steps(self, turn: Turn) -> int:
        return max(1, int(self.part * turn.local_steps)) if turn.worker % 2 else turn.local_steps

    def is_away(self, turn: Turn) -> bool:
        return turn.round % 3 == 0 and turn.worker == 3


class SignSGD(torch.optim.Optimizer):
    """A step of the same length along the sign of each gradient."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scale": scale})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign() * (group["lr"] * group["scale"]))


class Lines:
    """A tracker that writes a line for each row."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.file = (folder / "lines.txt").open("a")
        self.file.write(f"K = {config['clients']}, J = {config['local-steps']}\n")

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.file.write(f"{row['syncs']} {row['bytes_up']} {row['bytes_down']}\n")

    def close(self) -> None:
        self.file.close()


# Wrong ones


@dataclass(frozen=True)
class Misspelt(Method):
    """Its hook has another name."""

    def begins(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.start = {}


@dataclass(frozen=True)
class Forgets(Drift):
    """It does not keep what it declares."""

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        return {}, {}


@dataclass(frozen=True)
class Replies(Drift):
    """It replies what it does not declare."""

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        return {"secret": torch.zeros(1)}, minus(r.start, r.y)


@dataclass(frozen=True)
class Random(Drift):
    """It draws random numbers."""

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        return {}, {name: torch.randn_like(y) for name, y in r.y.items()}


@dataclass(frozen=True)
class InPlace(Drift):
    """It changes what it is given."""

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        for tensor in r.begun.values():
            tensor.add_(1)


@dataclass(frozen=True)
class Third(Drift):
    """It fails in the third round."""

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        if r.round == 3:
            raise ValueError("no third round")


@dataclass(frozen=True)
class Undeclared(Drift):
    """It adds to the gradients without saying so."""

    constant = False


@dataclass(frozen=True)
class Peeks(Drift):
    """It reads the message of the server without saying so."""

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.add_to_gradients({name: self.strength * x for name, x in r.begun.items()})


@dataclass(frozen=True)
class Spoils(Drift):
    """In a later round than those of a trial, what the second worker keeps is not a number."""

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        spoilt = r.worker == 1 and r.round == 6
        return {}, {name: value * float("nan") if spoilt else value for name, value in minus(r.start, r.y).items()}


class NotFrozen(Drift):
    """Its fields would be no arguments."""

    gamma: float = 0.5


@dataclass(frozen=True)
class Shorter(Rounded):
    """It decodes another shape."""

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        return super().decode(parts, like, generator).flatten()[:1]


@dataclass(frozen=True)
class Worst(First):
    """It is not finite."""

    def __call__(self, x: Tensors, parts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        return {name: value / 0 for name, value in parts[0].items()}


@dataclass(frozen=True)
class Negative(Shape):
    """It gives no rate."""

    def factor(self, epoch: float, progress: float) -> float:
        return 0.5 - progress


@dataclass(frozen=True)
class Standing(LocalStepsSchedule):
    """It gives no J."""

    def rule(self, run: Outline) -> LocalSteps:
        return LocalSteps(lambda step: 0)


@dataclass(frozen=True)
class Halting(LocalStepsSchedule):
    """It decides on no J."""

    def decide(self, run: Outline, so_far: SoFar, state: DecisionState) -> tuple[int, DecisionState]:
        return 0, state


@dataclass(frozen=True)
class Idle(Workers):
    """It takes no step."""

    def steps(self, turn: Turn) -> int:
        return 0


@dataclass(frozen=True)
class Overlapping(EveryOther):
    """Two clients hold one image."""

    def shards(self, images: Labelled, clients: int, seed: int) -> list[NDArray[np.int64]]:
        return [np.arange(len(images.labels) - client) for client in range(clients)]
