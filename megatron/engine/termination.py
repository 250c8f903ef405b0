"""SIGTERM while a checkpoint is being written: it is finished if the time allows."""

import os
import signal
import threading
import time
from types import FrameType

from megatron.base.errors import MegatronError

__all__ = ["GRACE_S", "Terminated", "TerminationWatch", "end_by"]

GRACE_S = 20.0
"""Seconds from SIGTERM until a save is given up. SLURM kills 30 s after it (KillWait); our own
launcher waits for as long as no rank ends, and 5 s after one did."""


class Terminated(MegatronError):  # noqa: N818 - nothing went wrong
    """A signal asked this process to end, and what could not wait is done."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = number


class TerminationWatch:
    """Keeps SIGTERM from ending the process, as long as that is wanted; tells that it came.

    Whoever has set a handler already keeps it: then nothing is watched.
    """

    def __init__(self) -> None:
        self._received_at: float | None = None
        self._is_watching = False

    @property
    def has_come(self) -> bool:
        """Whether SIGTERM came while it was watched for."""
        return self._received_at is not None

    @property
    def seconds_left(self) -> float:
        """Until :data:`GRACE_S` after the signal; infinite without one."""
        if self._received_at is None:
            return float("inf")
        return self._received_at + GRACE_S - time.monotonic()

    def begin(self) -> None:
        """Watch from now on; does nothing on another thread than the main one."""
        if self._is_watching or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._note)
            self._is_watching = True

    def end(self) -> None:
        """SIGTERM ends the process again."""
        if self._is_watching and signal.getsignal(signal.SIGTERM) == self._note:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._is_watching = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received_at is None:
            self._received_at = time.monotonic()


def end_by(number: int) -> None:
    """End this process by a signal, so that whoever started it sees that it was told to."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
