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
# SLURM signals every process of a step, and the launcher passes on what it gets itself.
_SAME_WISH_S = 2.0


class Wishes:
    """The wishes so far."""

    def __init__(self) -> None:
        self.numbers: tuple[int, ...] = ()
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
        self.numbers += (int(number),)
        self._last_at = now
        return True

    @property
    def is_second(self) -> bool:
        """Whether somebody has asked more than once."""
        return len(self.numbers) > 1
