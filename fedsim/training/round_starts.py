"""At which local step each round starts, kept as runs of rounds of equal J: a million rounds take no more than one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from fedsim.training.local_steps import Decisions, LocalSteps

EqualRounds = tuple[int, int]  # J, and how many rounds in a row take so many steps


class RoundStarts(Sequence[int]):
    """One entry for each round, the local steps taken before it, and a last one, the steps of the whole run.

    Its size, and the time to look up an entry, grow with the changes of J, not with the rounds.
    """

    def __init__(self, rounds: Iterable[EqualRounds]) -> None:
        """`rounds`: all rounds of the run, in order; at least one."""
        merged: list[EqualRounds] = []
        for steps, count in rounds:
            if merged and merged[-1][0] == steps:
                count += merged.pop()[1]
            merged.append((steps, count))
        self.equal_rounds = tuple(merged)
        self._firsts = [0, *itertools.accumulate(count for _, count in merged)]
        self._steps = [0, *itertools.accumulate(steps * count for steps, count in merged)]

    def __len__(self) -> int:
        return self._firsts[-1] + 1

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        run = bisect.bisect_right(self._firsts, position) - 1
        if run == len(self.equal_rounds):
            return self._steps[-1]
        return self._steps[run] + (position - self._firsts[run]) * self.equal_rounds[run][0]

    @property
    def most_steps(self) -> int:
        """The most local steps that any round takes."""
        return max(steps for steps, _ in self.equal_rounds)

    def begins(self, longer: RoundStarts) -> bool:
        """Whether the rounds of this run are the first ones of a `longer` or equal one."""
        *whole, (steps, count) = self.equal_rounds
        before, after = longer.equal_rounds[: len(whole)], longer.equal_rounds[len(whole) :]
        return tuple(whole) == before and bool(after) and after[0][0] == steps and count <= after[0][1]


def rounds_of_steps(local_steps: LocalSteps, total: int) -> Iterator[EqualRounds]:
    """The rounds of a run of `total` steps; the last one ends with the run."""
    start = 0
    while start < total:
        steps = local_steps(start)
        if steps > total - start:
            yield total - start, 1
            return
        count = _equal(local_steps, start, (total - start) // steps)
        yield steps, count
        start += steps * count


def rounds_of_number(local_steps: LocalSteps, number: int) -> Iterator[EqualRounds]:
    """The first `number` rounds."""
    start = done = 0
    while done < number:
        steps, count = local_steps(start), _equal(local_steps, start, number - done)
        yield steps, count
        start, done = start + steps * count, done + count


def rounds_decided(decided: Decisions, total: int = 0, number: int = 0) -> Iterator[EqualRounds]:
    """The rounds of a run of `total` steps, or of a `number` of rounds, whose J stays as it was `decided` last."""
    done = 0
    for (start, steps), (end, _) in itertools.pairwise(decided):
        yield steps, (end - start) // steps
        done += (end - start) // steps
    start, steps = decided[-1]
    full, rest = (number - done, 0) if number else divmod(total - start, steps)
    if full:
        yield steps, full
    if rest:
        yield rest, 1


def _equal(local_steps: LocalSteps, start: int, most: int) -> int:
    """How many rounds from step `start` on take the same number of steps; not more than `most`.

    Between two of its `changes` J only rises or only falls, so the end of equal rounds is found by bisection.
    """
    steps = local_steps(start)
    if change := next((step for step in local_steps.changes if step > start), 0):
        most = min(most, -(-(change - start) // steps))

    def differs(rounds: int) -> bool:
        return local_steps(start + rounds * steps) != steps

    reached = 1
    while reached < most and not differs(reached):
        reached *= 2
    return bisect.bisect_left(range(min(reached, most)), True, lo=reached // 2 + 1, key=differs)
