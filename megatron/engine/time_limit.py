"""When to save and stop, so that a checkpoint is complete before time is up.

A stop takes effect two beats after it was asked for (engine/stopping.py), and one beat passes until
the question comes again: three units of work, then a save. How long both take is measured; what was
not measured yet is guessed. Rank 0 reckons for all.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.engine.stopping import Stop

__all__ = ["Deadline", "SaveTimes", "TimeLimit"]

_UNITS_UNTIL_STOPPED = 3
_REMEMBERED = 50  # units
_SAVES_VARY_BY = 1.5
# In a launch that has not saved yet. Of a short launch a share, so that it gets something done.
_UNKNOWN_SAVE_S, _UNKNOWN_SAVE_SHARE = 120.0, 0.1
_MARGIN_S, _MARGIN_SHARE = 30.0, 0.05


@dataclass(frozen=True)
class Deadline:
    """When this launch must be over."""

    at: float  # seconds since the epoch
    what: str  # whose limit it is
    ask_again: Callable[[], float | None] = lambda: None
    """Returns where the deadline is now, for those that can be moved; infinity: it is gone."""


@dataclass(frozen=True)
class SaveTimes:
    """What is known of a run's saves."""

    slowest_s: float | None  # of this launch; None: it has not saved yet
    is_in_flight: bool


class TimeLimit:
    """Finds out that the time left is needed for a save.

    Args:
        deadlines: at least one; the first to come counts.
        began: seconds since the epoch when this launch did.
        saves: what is known of the saves; asked at every beat.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        deadlines: Sequence[Deadline],
        *,
        began: float,
        saves: Callable[[], SaveTimes],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._deadlines = list(deadlines)
        self._began = began
        self._saves = saves
        self._now = now
        self._units: deque[float] = deque(maxlen=_REMEMBERED)
        self._last_beat: float | None = None

    def __call__(self) -> Stop | None:
        """Look at the clock, at a beat; return the reason to stop, if it is time."""
        now = self._now()
        if self._last_beat is not None:
            self._units.append(now - self._last_beat)
        self._last_beat = now
        while self._reckon(deadline := self._next()) > deadline.at - now:
            later = deadline.ask_again()
            if later is None or later <= deadline.at:
                return Stop("time limit", self._told(deadline, now))
            self._deadlines.remove(deadline)
            self._deadlines.append(Deadline(later, deadline.what, deadline.ask_again))
        return None

    def _next(self) -> Deadline:
        return min(self._deadlines, key=lambda deadline: deadline.at)

    def _slowest(self) -> float:
        # A launch's first step may compile.
        units = list(self._units)
        return max(units[1:] or units, default=0.0)

    def _save(self, deadline: Deadline) -> float:
        saves = self._saves()
        if saves.slowest_s is None:
            return min(_UNKNOWN_SAVE_S, _UNKNOWN_SAVE_SHARE * (deadline.at - self._began))
        return _SAVES_VARY_BY * saves.slowest_s * (2 if saves.is_in_flight else 1)

    def _margin(self, deadline: Deadline) -> float:
        return min(_MARGIN_S, _MARGIN_SHARE * (deadline.at - self._began))

    def _reckon(self, deadline: Deadline) -> float:
        units = _UNITS_UNTIL_STOPPED * self._slowest()
        return units + self._save(deadline) + self._margin(deadline)

    def _told(self, deadline: Deadline, now: float) -> str:
        kind = "guessed: none was measured" if self._saves().slowest_s is None else "as measured"
        return (
            f"{deadline.what} ends this launch in {deadline.at - now:.1f} s; reckoned with "
            f"{_UNITS_UNTIL_STOPPED} steps of {self._slowest():.2f} s, a save of "
            f"{self._save(deadline):.1f} s ({kind}) and {self._margin(deadline):.1f} s to spare"
        )
