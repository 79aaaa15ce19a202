"""The state of the local optimizer at a sync, for SGDM its momentum: kept by each worker, reset, or averaged."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.method import Method, ServerRound, State, Tensors, WorkerRound, Zeros


@dataclass(frozen=True)
class Keep(Method):
    """Each worker keeps its own (Lin et al. 2020, "Don't Use Large Mini-Batches, Use Local SGD", local momentum)."""

    def keeps(self, zero: Zeros) -> Tensors:
        return zero.optimizer

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.optimizer = own

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        return {}, r.optimizer


@dataclass(frozen=True)
class Reset(Method):
    """Each round begins with a new optimizer: the layer does nothing."""


@dataclass(frozen=True)
class Average(Method):
    """It is averaged as the parameters are (Yu, Jin and Yang 2019)."""

    reads_message = True

    def initial(self, zero: Zeros) -> State:
        return dict(zero.optimizer)

    def send(self, r: ServerRound, state: State, worker: int) -> Tensors:
        return state

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.optimizer = received

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        return r.optimizer, {}

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        return dict(mean)


MOMENTUM: dict[str, type[Method]] = {"keep": Keep, "reset": Reset, "average": Average}
