"""SCAFFOLD (Karimireddy, Kale, Mohri, Reddi, Stich and Suresh, ICML 2020): gradients without the drift of a worker.

c_k is the mean gradient of worker k's last round and c that of all workers; c - c_k is added to each gradient. For SGD
at a constant rate, without momentum and weight decay, c_k is the paper's option II, c_k - c + (x - y) / (J lr).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from strategies.method import Method, ServerRound, State, Tensors, WorkerRound, Zeros, minus, zeros_like
from strategies.sections import under_prefix, with_prefix

CORRECTION, SENT = "correction/", "sent/"


@dataclass(frozen=True)
class Scaffold(Method):
    """c is sent with the model, and a worker replies what makes the mean of all replies the next c."""

    constant = mean_gradient = reads_message = True
    needs = ("exact-mean", "equal-shares")

    def initial(self, zero: Zeros) -> State:
        return dict(zero.parameters)

    def keeps(self, zero: Zeros) -> Tensors:
        return zero.parameters

    def needs_all_memories(self, everyone: bool) -> bool:
        """c holds the c_k of every worker: it is computed anew in each round only where all take part."""
        return not everyone

    def send(self, r: ServerRound, state: State, worker: int) -> Tensors:
        return state

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.add_to_gradients(minus(received, self._own(r, own, received)))

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        if r.everyone:
            return r.mean_gradient, r.mean_gradient
        change = minus(r.mean_gradient, self._own(r, own, received))
        return {name: c + change[name] for name, c in received.items()}, r.mean_gradient

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        """A worker that is not averaged counts with the c that it was sent."""
        if r.share == 1:
            return dict(mean)
        return {name: c.lerp(mean[name], r.share) for name, c in state.items()}

    def _own(self, r: WorkerRound, own: Tensors, received: Tensors) -> Tensors:
        """c_k. Where all take part in each round, one that has lost it begins again at c, without a correction."""
        return own or (received if r.everyone else zeros_like(received))


@dataclass(frozen=True)
class ScaffoldInferred(Method):
    """Each worker infers c - c_k from the models that it sends and gets, so that only models are sent.

    Plain SGD moved y by the mean gradient and the correction of its round times the sum of the rates. So (y - x) / sum,
    with the mean x of all y, is the mean of all mean gradients minus its own, minus the correction, as those of all
    workers add up to zero.
    """

    constant = reads_message = True
    needs = ("plain-sgd", "equal-steps", "all-updates", "mean-is-next")

    def keeps(self, zero: Zeros) -> Tensors:
        return with_prefix(CORRECTION, zero.parameters) | with_prefix(SENT, zero.parameters)

    def needs_all_memories(self, everyone: bool) -> bool:
        """The corrections must add up to zero."""
        return True

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.add_to_gradients(self._correction(r, under_prefix(CORRECTION, own), under_prefix(SENT, own)))

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        correction = self._correction(r, under_prefix(CORRECTION, own), under_prefix(SENT, own))
        return {}, with_prefix(CORRECTION, correction) | with_prefix(SENT, r.y)

    def _correction(self, r: WorkerRound, last: Tensors, sent: Tensors) -> Tensors:
        if not last:
            return zeros_like(r.begun)
        rates = math.fsum(r.rates(r.round - 1))
        if rates == 0:  # no model has moved
            return last
        return {name: last[name] + (sent[name] - x) / rates for name, x in r.begun.items()}
