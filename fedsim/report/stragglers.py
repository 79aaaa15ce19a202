"""How long the slowest worker of a round computes, where workers or their steps are not equally fast.

A local step of worker k takes f_k X times the usual seconds: f_k is 1 or, for slow workers, a factor; X, the jitter of
each step by itself, has mean 1. A round waits for the last of its K workers, which is expected after

    E max_k f_k (X_k1 + ... + X_kJ)

usual steps. Without jitter that follows from the chance that a round samples a slow worker. With jitter it is the mean
over simulated rounds, corrected by the sums of the slowest workers, whose expectation is known (a control variate): so
it is exact for one worker.
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

MOST_DRAWS, FEWEST_DRAWS = 4096, 64  # simulated rounds
STEPS_DRAWN = 2**22  # in all rounds of one J and K; more steps vary less, and need fewer rounds
LONG = 1000  # local steps from which on their sum is drawn as a normal variable


class Stragglers(NamedTuple):
    """The jitter of a step, ``lognormal`` with this `sigma` or ``exponential`` ("": none); `slow` of all clients take
    `factor` times as long; the seed of the simulation.
    """

    jitter: str = ""
    sigma: float = 0.0
    slow: int = 0
    factor: float = 1.0
    seed: int = 0


def stragglers(jitter: str, slow: str, seed: int) -> Stragglers:
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
    if seed < 0:
        raise UserError(f"seed = {seed} is out of range: it must be at least 0")
    count, factor = (int(found[1]), float(found[2])) if found else (0, 1.0)
    return Stragglers(jitter.partition(":")[0], sigma, count, factor, seed)


def computed_steps(rows: pd.DataFrame, which: Stragglers) -> pd.Series:
    """The time that a run has computed up to each of its `rows` (in order), in usual steps.

    The rounds between two rows are taken to have the same J, or J and J + 1. NaN where the syncs are unknown. Requires
    `run`, `clients`, `workers`, `local_steps`, `network_syncs`.
    """
    rows = rows.dropna(subset=["local_steps", "network_syncs"])
    own = rows.groupby("run")
    steps, rounds = (own[name].diff().fillna(rows[name]) for name in ("local_steps", "network_syncs"))
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
    rng = np.random.default_rng([which.seed, steps, workers, clients])
    rounds = simulated_rounds(steps, workers)
    present = rng.hypergeometric(slow, clients - slow, workers, rounds)  # of the slow ones, in each round
    factors = np.where(np.arange(workers) < present[:, None], which.factor, 1.0)
    times = factors * _sums(steps, (rounds, workers), which, rng)
    largest = factors.max(axis=1)
    of_the_slowest = times.mean(axis=1, where=factors == largest[:, None])
    return float(np.mean(times.max(axis=1) - of_the_slowest + steps * largest))


def simulated_rounds(steps: int, workers: int) -> int:
    """The number of simulated rounds for each J and K."""
    return int(np.clip(STEPS_DRAWN // max(min(steps, LONG) * workers, 1), FEWEST_DRAWS, MOST_DRAWS))


def _sums(steps: int, shape: tuple[int, int], which: Stragglers, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Sums of the times of `steps` usual steps."""
    if which.jitter == "exponential":
        return np.asarray(rng.gamma(steps, size=shape))
    if steps > LONG:
        return rng.normal(steps, np.sqrt(steps * np.expm1(which.sigma**2)), shape)
    sums = np.zeros(shape)
    for _ in range(steps):
        sums += np.exp(which.sigma * rng.standard_normal(shape) - which.sigma**2 / 2)
    return sums
