"""A mean that arrives a round late (CoCoD-SGD: Shen et al. 2019): workers compute while models are on their way."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.method import Method, Tensors, WorkerRound, Zeros


@dataclass(frozen=True)
class Delay(Method):
    """A worker begins a round from its own model of the end of the last one.

    It takes its local steps from `own` to z, adds the difference from there to the model x that arrived in the
    meantime, sends y = z + (x - own) and begins the next round from y.
    """

    begins_early = own_start = one_model = True
    needs = ("all-clients", "whole-models")

    def keeps(self, zero: Zeros) -> Tensors:
        return {**zero.parameters, **zero.buffers}

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.start = {name: own.get(name, x) for name, x in r.begun.items()}
        r.buffers = {name: own.get(name, value) for name, value in r.buffers.items()}

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        r.y = {name: z + (r.begun[name] - r.start[name]) for name, z in r.y.items()}
        return {}, {**r.y, **r.buffers}
