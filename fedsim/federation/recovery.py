"""What becomes of a run whose round fails: the round is repeated, all go back to the checkpoint, or the run ends."""

from __future__ import annotations

from fedsim.errors import RunFailed, UserError
from fedsim.federation.checkpoint import resume
from fedsim.federation.messenger import Messenger
from fedsim.federation.node_registry import NodeRegistry
from fedsim.federation.round import Progress, TooFewClients
from fedsim.runs.run import Run

MAX_ATTEMPTS = 3  # the second sees nodes that have reconnected; if these lost their memory, the third restores it


class Recovery:
    """How far a run has come, which decides what to do about a failed round.

    `rounds` are those of the whole run, `initial` is its progress without a checkpoint, and `fewest` is how many nodes
    must be there for another attempt.
    """

    def __init__(
        self, run: Run, messenger: Messenger, registry: NodeRegistry, initial: Progress, rounds: int, fewest: int
    ) -> None:
        self._run, self._messenger, self._registry = run, messenger, registry
        self._initial, self._rounds, self._fewest = initial, rounds, fewest
        self._saved = self._furthest = 0  # rounds
        self._failures, self._lost = 0, False  # since a round came further than all before it

    def resume(self) -> Progress:
        """The progress of the run's checkpoint, its memories handed back to the clients, or the initial one."""
        progress = resume(self._run, self._messenger, self._registry.nodes, self._initial, self._rounds)
        self._saved, self._furthest = progress.round, max(self._furthest, progress.round)
        return progress

    def saves_next(self, progress: Progress) -> bool:
        """Whether the next round is saved because clients lost their memory in it: the rounds before are then kept."""
        return self._lost and progress.round == self._furthest

    def trained(self, progress: Progress) -> None:
        """Note that a round was trained."""
        if progress.round > self._furthest:
            self._furthest, self._failures, self._lost = progress.round, 0, False

    def saved(self, progress: Progress) -> None:
        """Note that a checkpoint was made."""
        self._saved = progress.round

    def after(self, failure: TooFewClients, progress: Progress) -> Progress:
        """The progress to train on from after a failed round, once nodes had time to reconnect.

        Where clients have lost their memory, all go back to the last checkpoint, as a resumed run does. Raises
        RunFailed where another attempt would fail too.
        """
        self._failures, self._lost = self._failures + 1, self._lost or failure.memory_lost
        of_checkpoint = failure.all_refused and not failure.memory_lost and progress.round == self._saved > 0
        if failure.diverged and not of_checkpoint:  # as it would again
            raise RunFailed(f"{failure}: a lower --lr may help") from failure
        if self._failures == MAX_ATTEMPTS:
            if of_checkpoint:
                self._run.put_checkpoint_aside()
            how = "the same command resumes from the checkpoint" if self._run.saved else "there is no checkpoint yet"
            if self._run.saved and self._run.of_own_code:
                how += ", with --accept-changed-code where code of your own was mended"
            raise RunFailed(f"{failure}; tried {MAX_ATTEMPTS} times; {how}") from failure
        print(f"{failure}; trying again", flush=True)
        try:
            self._registry.wait_for(self._fewest)
        except UserError as error:  # not the user's: the nodes were there when the run began
            raise RunFailed(str(error)) from error
        return self.resume() if failure.memory_lost else progress
