"""`fedsim.reference` with every method, in plain PyTorch: each engine is tested against it in float64.

`local_sgd` is the algorithm, `train` a worker's part of it; what can take the place of its `outer`, `compress` and
`combine` stands at the end.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

MomentumAtSync = Literal["keep", "reset", "average"]
BatchNormAtSync = Literal["average", "first-worker", "pooled", "local", "re-estimated"]
Tensors = dict[str, Tensor]
Compress = Callable[[Tensors, int | None, int], Tensors]  # update, worker (None: the server), first step of the round
Combine = Callable[[Sequence[Tensor], Sequence[float] | None], Tensor]
Outer = Callable[[Tensors, Tensors, float], Tensors]


def local_sgd(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Optimizer],
    batch: Callable[[int, int], tuple[Tensor, Tensor]],
    lr: Callable[[int], float],
    workers: int,
    local_steps: Sequence[int],
    sample: Callable[[int], Sequence[int]] | None = None,
    weights: Sequence[float] | None = None,
    combine: Combine | None = None,
    clip: bool = False,
    momentum_at_sync: MomentumAtSync = "keep",
    batchnorm_at_sync: BatchNormAtSync = "average",
    compress: Compress | None = None,
    error_feedback: bool = True,
    compress_down: Compress | None = None,
    outer: Outer | None = None,
    prox_mu: float = 0.0,
    scaffold: bool = False,
    delay: bool = False,
) -> None:
    """Train `model` in place: in each round `local_steps[round]` (J) steps on each of K `workers`, and one mean.

    The workers `sample(round)`, counted from 1, take part in a round, or all; in the mean they count as `weights` says.
    `combine(values, weights)` is that mean, by default `mean`; `clip` cuts updates to their median length before it.
    `batch(worker, step)` gives the inputs and labels of a local step and `lr(step)` its learning rate; steps are
    counted from 0 through all rounds. `momentum_at_sync` says what becomes of each worker's optimizer state when the
    models are averaged, `batchnorm_at_sync` what becomes of BatchNorm's running statistics; to re-estimate them is to
    average them and to call `reestimate` on the model. `compress(update, worker, step)` is what arrives of a worker's
    update in the round that begins with `step`: the parameters that it began from minus its own; with `error_feedback`
    the worker adds what did not arrive to its next update. Workers begin a round from x, the model's parameters; with
    `compress_down`, from what they began the last one from plus `compress_down(change, None, step)`, what arrives of
    the change from there to x. `outer(x, mean, lr)` is the server's step: the next parameters from those before the
    round, the mean of the workers' and the rate of the round's last step; without it, the mean. FedProx adds `prox_mu`
    times the distance from where the round began to a gradient, SCAFFOLD c - c_k: c_k is the mean of worker k's
    gradients in the last round, c the mean of all c_k. With `delay` a worker begins a round from its own model, and at
    its end adds the difference from there to x.
    """
    combine = combine or mean
    replicas = [copy.deepcopy(model) for _ in range(workers)]
    optimizers = [make_optimizer(replica) for replica in replicas]
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    residuals, controls = [zeros] * workers, [zeros] * workers
    trained: set[int] = set()  # the workers that have statistics of their own
    begun: Tensors = {}
    first_step = 0
    for round_, steps in enumerate(local_steps, 1):
        sampled = sample(round_) if sample else range(workers)
        x = parameters_of(model)
        begun = plus(begun, compress_down(minus(x, begun), None, first_step)) if compress_down and begun else x
        c = {name: mean([control[name] for control in controls], weights) for name in x}

        for worker in sampled:
            replica = replicas[worker]
            own = {name: buffer.clone() for name, buffer in replica.named_buffers()}
            if not delay:
                replica.load_state_dict(model.state_dict())
                statistics = own if batchnorm_at_sync == "local" and worker in trained else {}
                replica.load_state_dict(begun | statistics, strict=False)
            start = parameters_of(replica)
            correction = minus(c, controls[worker]) if scaffold else zeros
            these_steps = range(first_step, first_step + steps)
            controls[worker] = train(replica, optimizers[worker], worker, these_steps, batch, lr, prox_mu, correction)
            if delay:
                replica.load_state_dict(plus(parameters_of(replica), minus(begun, start)), strict=False)
        trained |= set(sampled)

        states = [replicas[worker].state_dict() for worker in sampled]
        if compress:
            for state, worker in zip(states, sampled, strict=True):
                update = plus(minus(begun, state), residuals[worker])
                arrived = compress(update, worker, first_step)
                state |= minus(begun, arrived)
                if error_feedback:
                    residuals[worker] = minus(update, arrived)
        if clip:
            states = clipped(states, begun)
        shares = [weights[worker] for worker in sampled] if weights else None
        average = {name: combine([state[name] for state in states], shares) for name in states[0]}
        average |= statistics_at_sync(model, average, states, shares, batchnorm_at_sync)
        if compress_down:
            average |= minus(x, minus(begun, average))
        if outer:
            average |= outer(x, {name: average[name] for name in x}, lr(first_step + steps - 1))
        model.load_state_dict(average)

        if momentum_at_sync == "reset":
            optimizers = [make_optimizer(replica) for replica in replicas]
        if momentum_at_sync == "average":
            average_states([optimizers[worker] for worker in sampled], shares, combine)
            for optimizer in optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizers[sampled[0]].state_dict()))
        first_step += steps


def train(
    model: nn.Module,
    optimizer: Optimizer,
    worker: int,
    steps: Sequence[int],
    batch: Callable[[int, int], tuple[Tensor, Tensor]],
    lr: Callable[[int], float],
    prox_mu: float,
    correction: Tensors,
) -> Tensors:
    """Take local steps; returns the mean of their gradients, without `correction` and FedProx."""
    model.train()
    start = parameters_of(model)
    gradients = {name: torch.zeros_like(value) for name, value in start.items()}
    for step in steps:
        inputs, labels = batch(worker, step)
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        for name, y in model.named_parameters():
            assert y.grad is not None
            gradients[name] += y.grad
            y.grad += prox_mu * (y.detach() - start[name]) + correction[name]
        optimizer.step()
    return {name: value / len(steps) for name, value in gradients.items()}


def statistics_at_sync(
    model: nn.Module,
    average: Tensors,
    states: Sequence[Tensors],
    weights: Sequence[float] | None,
    batchnorm_at_sync: BatchNormAtSync,
) -> Tensors:
    """The buffers after a round that are not the `average` of the workers' `states`."""
    if batchnorm_at_sync in ("first-worker", "local"):
        return {name: states[0][name] for name, _ in model.named_buffers()}
    pooled: Tensors = {}
    for name in average if batchnorm_at_sync == "pooled" else ():
        if name.endswith("running_var"):
            means = [state[name.replace("var", "mean")] for state in states]
            pooled[name] = average[name] + mean([(each - mean(means, weights)) ** 2 for each in means], weights)
    return pooled


def parameters_of(model: nn.Module) -> Tensors:
    """Copies of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def plus(one: Tensors, other: Tensors) -> Tensors:
    """The sum of each tensor in `one` and the one of its name in `other`."""
    return {name: value + other[name] for name, value in one.items()}


def minus(one: Tensors, other: Tensors) -> Tensors:
    """The difference of each tensor in `one` and the one of its name in `other`."""
    return {name: value - other[name] for name, value in one.items()}


def mean(values: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The mean of equally shaped tensors, in float64; of integers (BatchNorm's counters) the largest."""
    stacked = torch.stack(list(values))
    if not stacked.is_floating_point():
        return stacked.amax(0)
    if weights is None:
        return stacked.double().mean(0)
    weighted: Tensor = torch.tensordot(torch.tensor(weights).double() / sum(weights), stacked.double(), dims=1)
    return weighted


def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of BatchNorm layers to the means of those of `batches`; dropout is off."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # the mean of all batches
    with torch.no_grad():
        for inputs in batches:
            model(inputs)


def average_states(optimizers: Sequence[Optimizer], weights: Sequence[float] | None, combine: Combine) -> None:
    """Give every optimizer the mean of all their states, parameter by parameter."""
    groups = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    for parameters in zip(*groups, strict=True):
        states = [optimizer.state[p] for optimizer, p in zip(optimizers, parameters, strict=True)]
        for entry, value in list(states[0].items()):
            if isinstance(value, Tensor):
                average = combine([state[entry] for state in states], weights)
                for state in states:
                    state[entry].copy_(average)


def momentum_step(lr: float, momentum: float = 0.0, nesterov: bool = False, per_lr: bool = False) -> Outer:
    """FedAvgM (Hsu et al. 2019) and DiLoCo (Douillard et al. 2023); `per_lr`: SlowMo (Wang et al. 2020)."""
    u: dict[str, Tensor | float] = {}

    def step(x: Tensors, mean: Tensors, local_lr: float) -> Tensors:
        unit = local_lr if per_lr else 1.0
        if unit == 0:
            return mean
        after = {}
        for name in x:
            gradient = (x[name] - mean[name]) / unit
            u[name] = momentum * u.get(name, 0.0) + gradient
            after[name] = x[name] - lr * unit * (gradient + momentum * u[name] if nesterov else u[name])
        return after

    return step


def adaptive_step(
    second_moment: Callable[[Tensor, Tensor, float], Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool = False,
) -> Outer:
    """Reddi et al. 2021, with Kingma's bias correction where it is asked for."""
    m: Tensors = {}
    v: Tensors = {}
    rounds = itertools.count(1)

    def step(x: Tensors, mean: Tensors, local_lr: float) -> Tensors:
        t, after = next(rounds), {}
        for name in x:
            gradient = x[name] - mean[name]
            zero = torch.zeros_like(gradient)
            m[name] = betas[0] * m.get(name, zero) + (1 - betas[0]) * gradient
            v[name] = second_moment(v.get(name, zero), gradient**2, betas[1])
            unbiased = [1 - beta**t if bias_correction else 1 for beta in betas]
            after[name] = x[name] - lr * (m[name] / unbiased[0]) / ((v[name] / unbiased[1]) ** 0.5 + eps)
        return after

    return step


def adam(v: Tensor, square: Tensor, beta: float) -> Tensor:
    """FedAdam's second moment."""
    return beta * v + (1 - beta) * square


def yogi(v: Tensor, square: Tensor, beta: float) -> Tensor:
    """FedYogi's second moment."""
    return v - (1 - beta) * square * torch.sign(v - square)


def adagrad(v: Tensor, square: Tensor, beta: float) -> Tensor:
    """FedAdagrad's second moment."""
    return v + square


def topk(x: Tensor, ratio: float) -> Tensor:
    """The `ratio` of the values that is largest, at least one (Stich et al. 2018)."""
    least = x.abs().flatten().sort().values[-max(1, part_of(ratio, x.numel()))]
    return torch.where(x.abs() >= least, x, 0.0)


def uniform(x: Tensor, largest: int) -> Tensor:
    """Whole numbers up to `largest`, times a scale in float32."""
    scale = (x.abs().max() / largest).float().double()
    return (x / scale).nan_to_num().round().clamp(-largest, largest) * scale


def sign(x: Tensor) -> Tensor:
    """The sign of each value, times their mean magnitude in float32 (Karimireddy et al. 2019)."""
    scale = x.abs().mean().float().double()
    return torch.where(x >= 0, scale, -scale)


def random_k(x: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """A random `ratio` of the values, at least one."""
    kept = torch.randperm(x.numel(), generator=generator)[: max(1, part_of(ratio, x.numel()))]
    arrived = torch.zeros_like(x).flatten()
    arrived[kept] = x.flatten()[kept]
    return arrived.view(x.shape)


def qsgd(x: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """Round each value at random to a multiple of 1 / `levels` of its bucket's norm (Alistarh et al. 2017)."""
    arrived = []
    for bucket in torch.split(F.pad(x.flatten(), (0, -x.numel() % 128)), 128):
        norm = bucket.norm().float()
        level = (bucket.abs() / norm).nan_to_num() * levels
        level = (level + torch.rand(128, generator=generator, dtype=torch.float64)).floor().clamp(max=levels)
        arrived.append(bucket.sign() * level * (norm / levels))
    return torch.cat(arrived)[: x.numel()].view(x.shape)


def power_sgd(x: Tensor, right: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """A low-rank approximation by one power iteration, and the next `right` factor (Vogels et al. 2019).

    Columns of `right` that are zero are replaced by those `drawn`.
    """
    matrix = x.flatten(1)
    right = torch.where(right.abs().sum(0) == 0, drawn, right)
    left = torch.linalg.qr(matrix @ right).Q
    right = matrix.T @ left
    return (left @ right.T).view(x.shape), right


def trimmed_mean(values: Sequence[Tensor], weights: Sequence[float] | None, trim: float) -> Tensor:
    """Without the largest and smallest `trim` of each value; a `trim` of half is the median (Yin et al. 2018)."""
    ordered = torch.stack(list(values)).sort(0).values
    dropped = min(part_of(trim, len(values)), (len(values) - 1) // 2)
    return ordered[dropped : len(values) - dropped].double().mean(0).to(values[0].dtype)


def clipped(states: Sequence[Tensors], x: Tensors) -> list[Tensors]:
    """The `states`, each moved towards `x` until its distance from it is at most the median of all distances."""
    updates = [minus(x, state) for state in states]
    lengths = [torch.stack([value.norm() for value in update.values()]).norm() for update in updates]
    limit = trimmed_mean(lengths, None, 0.5)
    factors = [torch.clamp(limit / length, max=1.0) for length in lengths]
    return [
        state | {name: x[name] - factor * value for name, value in update.items()}
        for state, factor, update in zip(states, factors, updates, strict=True)
    ]


def part_of(ratio: float, count: int) -> int:
    """`ratio` of a `count`, rounded down; in decimal, where 0.29 of 100 is 29."""
    return int(Fraction(str(ratio)) * count)
