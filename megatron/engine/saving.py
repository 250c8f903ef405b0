"""Saves in the course of training: what they record, and what a failed one means."""

import time
from collections.abc import Callable
from typing import Any

from megatron.base.errors import CheckpointError
from megatron.checkpoint.saver import Saver
from megatron.engine.distributed import ProcessGroups
from megatron.engine.journal import Journal
from megatron.engine.termination import Terminated, TerminationWatch

__all__ = ["RunSaver"]

_LOOKS_EVERY_S = 0.02
_PATIENCE_S = 300.0  # for a save in flight when training has failed already


class RunSaver:
    """Saves a run. All methods but :meth:`settle` are collective.

    Args:
        groups: of this rank.
        saver: writes the checkpoints.
        journal: records the run.
        goes_on_without: a save that fails doesn't end the run (``on_save_error: continue``).
        say: tells the user a line, on rank 0.
        more_state: more for this rank's model-states file, worked out right before a save.
    """

    def __init__(
        self,
        groups: ProcessGroups,
        saver: Saver,
        journal: Journal,
        *,
        goes_on_without: bool,
        say: Callable[[str], None],
        more_state: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._groups = groups
        self._saver = saver
        self._journal = journal
        self._goes_on_without = goes_on_without
        self._say = say
        self._more_state = more_state
        self._termination = TerminationWatch()

    @property
    def committed_step(self) -> int | None:
        """Step of the last checkpoint that this launch is known to have committed."""
        return self._saver.committed_step

    def save(self, step: int, evaluation_due: bool) -> None:
        """Begin to save ``step``; first the save before it is waited for.

        Raises:
            CheckpointError: on all ranks: one of them failed.
            Terminated: on all ranks: SIGTERM came while the one before was written.
        """
        self.finish()
        ledger = self._journal.ledger(evaluation_due=evaluation_due)
        if ledger is not None and ledger.step != step:
            ledger = None  # a script's own loop took the steps: what is recorded isn't theirs
        more_state = self._more_state()
        self._termination.begin()

        def begin() -> None:
            self._saver.save(
                step,
                ledger,
                lambda manifest: self._journal.committed(ledger, manifest.sequence),
                client_state=more_state,
            )

        self._attempt(begin)
        self._rest()

    def poll(self) -> None:
        """At a step boundary, look how the save in flight is doing; without one, do nothing.

        Raises:
            CheckpointError: on all ranks: it failed. What was committed before is untouched.
            Terminated: on all ranks: SIGTERM came while it was written; it is complete by now, or
                given up.
        """
        if not self._saver.is_in_flight:
            return
        if any(self._groups.gather(self._termination.has_come)):
            self._end_in_time()
        self._attempt(self._saver.poll)
        self._rest()

    def finish(self) -> None:
        """Wait for the save in flight.

        Raises:
            CheckpointError, Terminated: see :meth:`poll`.
        """
        while self._saver.is_in_flight:
            self._saver.wait(_LOOKS_EVERY_S)
            self.poll()

    def settle(self, error: BaseException) -> None:
        """After ``error``, end the save in flight without asking other ranks; not collective.

        Raises:
            Terminated: SIGTERM came meanwhile.
        """
        deadline = time.monotonic() + _PATIENCE_S
        try:
            self._saver.settle(
                lambda: min(deadline - time.monotonic(), self._termination.seconds_left)
            )
        finally:
            self._termination.end()
        if self._termination.has_come and not isinstance(error, Terminated):
            raise Terminated(f"ended by SIGTERM ({type(error).__name__}: {error})") from error

    def _end_in_time(self) -> None:
        step = self._saver.step_in_flight
        left = self._termination.seconds_left
        try:
            is_complete = self._saver.finish(None if left == float("inf") else left)
        except CheckpointError as error:
            outcome = f"the checkpoint of step {step} failed: {error}"
        else:
            outcome = f"the checkpoint of step {step} " + (
                "is complete" if is_complete else "was given up: there was no time left"
            )
        self._termination.end()
        terminated = Terminated(f"ended by SIGTERM; {outcome}")
        terminated.teller = 0
        raise terminated

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except CheckpointError as error:
            # Whoever has lost `save` to another job must not go on writing its record there.
            if not self._goes_on_without or not all(self._groups.gather(self._saver.may_write())):
                raise
            saved = self.committed_step
            complete = (
                "none of this launch is complete yet"
                if saved is None
                else f"the newest complete one is global_step{saved}"
            )
            self._say(
                f"WARNING: A CHECKPOINT FAILED. {error}\n"
                "WARNING: training goes on without it (on_save_error: continue); "
                f"{complete}. The next save tries again"
            )

    def _rest(self) -> None:
        """Watch for SIGTERM no longer, if nothing is in flight."""
        if self._saver.is_in_flight:
            return
        self._termination.end()
        if self._termination.has_come:
            raise Terminated("ended by SIGTERM")
