"""How long the slowest worker of a round computes, where workers or their steps are not equally fast.

A local step of worker k takes f_k X times the usual seconds: f_k is 1 or, for slow workers, a factor; X, the jitter of
each step by itself, has mean 1. A round waits for the last of its K workers, which is expected after

    E max_k f_k (X_k1 + ... + X_kJ)

usual steps. Without jitter that follows from the chance that a round samples a slow worker. With jitter it is an
integral over the distribution of a sum of J steps, which is the J-th power of that of one step in the frequency domain.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedsim.errors import UserError

Vector = npt.NDArray[np.float64]
POINTS = 2**15  # of the grid on which a distribution is computed
LONG = 1000  # local steps from which on their sum is taken to be normal


class Stragglers(NamedTuple):
    """The jitter of a step, ``lognormal`` with this `sigma` or ``exponential`` ("": none); `slow` of all clients take
    `factor` times as long.
    """

    jitter: str = ""
    sigma: float = 0.0
    slow: int = 0
    factor: float = 1.0


def stragglers(jitter: str, slow: str) -> Stragglers:
    """The options --jitter and --slow, "" where not given; raises UserError."""
    noise = re.fullmatch(r"|exponential|lognormal:([0-9]*\.?[0-9]+)", jitter)
    sigma = float(noise[1] or 0) if noise else 0.0
    found = re.fullmatch(r"([1-9][0-9]{0,5}):([0-9]{1,6}(?:\.[0-9]*)?)", slow)
    if not noise or (noise[1] and not 0 < sigma <= 1):
        raise UserError(
            f"jitter = {jitter!r} is not exponential or lognormal:SIGMA with SIGMA above 0 and at most 1: "
            "for instance lognormal:0.3"
        )
    if slow and (not found or float(found[2]) <= 1):
        raise UserError(f"slow = {slow!r} is not COUNT:FACTOR with a FACTOR above 1: for instance 1:2.5")
    count, factor = (int(found[1]), float(found[2])) if found else (0, 1.0)
    return Stragglers(jitter.partition(":")[0], sigma, count, factor)


def computed_steps(rows: pd.DataFrame, which: Stragglers) -> pd.Series:
    """The time that a run has computed up to each of its `rows` (in order), in usual steps.

    The rounds between two rows are taken to have the same J, or J and J + 1. NaN where the syncs are unknown. Requires
    `run`, `clients`, `workers`, `steps_done`, `network_syncs`.
    """
    rows = rows.dropna(subset=["steps_done", "network_syncs"])
    own = rows.groupby("run")
    steps, rounds = (own[name].diff().fillna(rows[name]) for name in ("steps_done", "network_syncs"))
    steps, rounds = steps.clip(lower=0), rounds.clip(lower=1)
    least, most = steps // rounds, np.ceil(steps / rounds)
    longer = steps - least * rounds  # rounds of `most` steps
    expected = functools.cache(functools.partial(slowest, which=which))
    computed = [
        (number - more) * expected(int(short), *of_cell) + more * expected(int(long), *of_cell)
        for number, more, short, long, *of_cell in zip(
            rounds, longer, least, most, rows["workers"], rows["clients"], strict=True
        )
    ]
    return pd.Series(computed, rows.index, dtype=float).groupby(rows["run"]).cumsum()


def slowest(steps: int, workers: int, clients: int, which: Stragglers) -> float:
    """The expected time of the slowest of `workers`, sampled from `clients`, for `steps` each, in usual steps."""
    slow = min(which.slow, clients)
    if not which.jitter:
        without = math.prod((clients - workers - i) / (clients - i) for i in range(slow))  # the share of such rounds
        return steps * (which.factor + (1 - which.factor) * without)
    times, below = distribution(steps, which)
    grid = np.union1d(times, which.factor * times)
    usual, longer = (np.interp(grid, factor * times, below) for factor in (1, which.factor))
    expected = 0.0
    for present in range(max(0, workers - clients + slow), min(slow, workers) + 1):  # of the slow ones
        share = math.comb(slow, present) * math.comb(clients - slow, workers - present) / math.comb(clients, workers)
        of_one, mean = (longer, steps * which.factor) if present else (usual, steps)
        later = of_one - usual ** (workers - present) * longer**present
        expected += share * (mean + float(np.diff(grid) @ (later[1:] + later[:-1])) / 2)
    return expected


def distribution(steps: int, which: Stragglers) -> tuple[Vector, Vector]:
    """Times of `steps` usual steps of one worker, and the probability that it takes no longer than each of them."""
    convolved = min(steps, LONG)
    deviation = math.sqrt(math.expm1(which.sigma**2)) if which.jitter == "lognormal" else 1.0
    tail = math.exp(6 * which.sigma) if which.jitter == "lognormal" else 40.0
    width = 10 * deviation * math.sqrt(convolved) + tail
    edges = np.linspace(-width, width, POINTS + 1)  # of what a sum deviates from its mean
    of_step = np.diff(below_of_step(1 + edges, which))
    of_sum = np.fft.irfft(np.fft.rfft(np.fft.ifftshift(of_step)) ** convolved)
    below = np.cumsum(np.fft.fftshift(of_sum))
    return steps + math.sqrt(steps / convolved) * edges[1:], np.clip(below, 0, 1)


def below_of_step(times: Vector, which: Stragglers) -> Vector:
    """The probability that one usual step takes no longer than each of `times`."""
    positive = np.maximum(times, 1e-300)
    if which.jitter == "exponential":
        return -np.expm1(-positive)
    z = np.log(positive) / which.sigma + which.sigma / 2
    return np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in z])
