"""Signals as wishes to stop: the same wish may arrive several times and by several ways."""

import signal
import time

__all__ = ["FORWARDED_SIGNALS", "Wishes"]

FORWARDED_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
)
_ANNOUNCEMENTS = (signal.SIGUSR1, signal.SIGUSR2)
# SLURM signals every process of a step, and the launcher passes on what it gets itself.
_SAME_WISH_S = 2.0


class Wishes:
    """The wishes so far."""

    def __init__(self, *, under_slurm: bool = False) -> None:
        self.numbers: tuple[int, ...] = ()
        self._under_slurm = under_slurm
        self._last_at = -float("inf")

    def add(self, number: int, *, is_urgent: bool = False) -> bool:
        """Take in a signal; return whether it is a wish of its own.

        Args:
            number: of the signal.
            is_urgent: it is one, if another of this number came before, however soon.
        """
        now = time.monotonic()
        is_same = now < self._last_at + _SAME_WISH_S
        if is_same and not (is_urgent and number in self.numbers):
            return False
        if self.numbers and not self._hurries(number):
            return False
        self.numbers += (int(number),)
        self._last_at = now
        return True

    def _hurries(self, number: int) -> bool:
        """Whether a later signal means that there is no time to save."""
        if number == signal.SIGINT:
            return True
        if number == signal.SIGTERM:
            # SLURM announces SIGTERM by SIGUSR1, say, and SIGKILL by SIGTERM, of which it sends two
            # when it preempts; the time between is there for saving.
            return not self._under_slurm and not set(self.numbers) <= set(_ANNOUNCEMENTS)
        return number in self.numbers

    @property
    def is_second(self) -> bool:
        """Whether somebody has asked more than once."""
        return len(self.numbers) > 1
