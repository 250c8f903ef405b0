"""Saves in the course of training: what they record, and what a failed one means."""

import time
from collections.abc import Callable
from typing import Any

from megatron.base.errors import CheckpointError
from megatron.checkpoint.saver import Saver
from megatron.engine.distributed import ProcessGroups
from megatron.engine.journal import Journal
from megatron.engine.stop_signals import StopSignals
from megatron.engine.time_limit import SaveTimes

__all__ = ["RunSaver"]

_LOOKS_EVERY_S = 0.02
# For a save in flight when training has failed already; and when a signal came, too.
_PATIENCE_S = 300.0
_PATIENCE_WHEN_TOLD_S = 20.0


class RunSaver:
    """Saves a run. Methods that act are collective, except :meth:`settle`.

    Args:
        groups: of this rank.
        saver: writes the checkpoints.
        journal: records the run.
        goes_on_without: a save that fails doesn't end the run (``on_save_error: continue``).
        say: tells the user a line, on rank 0.
        signals: that ask this process to stop.
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
        signals: StopSignals,
        more_state: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._groups = groups
        self._saver = saver
        self._journal = journal
        self._goes_on_without = goes_on_without
        self._say = say
        self._more_state = more_state
        self._signals = signals

    @property
    def committed_step(self) -> int | None:
        """Step of the last checkpoint that this launch is known to have committed."""
        return self._saver.committed_step

    @property
    def times(self) -> SaveTimes:
        """What rank 0 knows of how long saves take."""
        return SaveTimes(self._saver.slowest_s, self._saver.is_in_flight)

    def why_lost(self) -> str | None:
        """Return who has taken the run directory over, if rank 0 has noticed; costs nothing."""
        return self._saver.why_lost()

    def save(self, step: int, evaluation_due: bool) -> None:
        """Begin to save ``step``; first the save before it is waited for.

        Raises:
            CheckpointError: on all ranks: one of them failed.
        """
        self.finish()
        ledger = self._journal.ledger(evaluation_due=evaluation_due)
        if ledger is not None and ledger.step != step:
            ledger = None  # a script's own loop took the steps: what is recorded isn't theirs
        more_state = self._more_state()

        def begin() -> None:
            self._saver.save(
                step,
                ledger,
                lambda manifest: self._journal.committed(ledger, manifest.sequence),
                client_state=more_state,
            )

        self._attempt(begin)

    def poll(self) -> None:
        """At a step boundary, look how the save in flight is doing; without one, do nothing.

        Raises:
            CheckpointError: on all ranks: it failed. What was committed before is untouched.
        """
        if self._saver.is_in_flight:
            self._attempt(self._saver.poll)

    def finish(self) -> None:
        """Wait for the save in flight.

        Raises:
            CheckpointError: see :meth:`poll`.
        """
        while self._saver.is_in_flight:
            self._saver.wait(_LOOKS_EVERY_S)
            self.poll()

    def settle(self) -> None:
        """After an error, end the save in flight without asking other ranks; not collective."""
        deadline = time.monotonic() + _PATIENCE_S

        def time_left() -> float:
            wish = self._signals.wish
            soon = float("inf") if wish is None else wish.came_at + _PATIENCE_WHEN_TOLD_S
            return min(deadline, soon) - time.monotonic()

        self._saver.settle(time_left)

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
