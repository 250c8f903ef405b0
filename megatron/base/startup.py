"""How long this process took from its start to its first step, phase by phase.

Rank 0's times stand for all: most phases end with something that every rank takes part in, so what
it waits for the slowest one is in them.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

__all__ = ["StartUp"]

_IMPORTS = "imports"


class StartUp:
    """Divides the time since ``began`` into phases that follow each other.

    Args:
        began: seconds on the boot clock at which ``first_phase`` began.
        first_phase: its name.
        clock: seconds since the machine's boot.

    Example:
        >>> ticks = iter([6.0, 6.5, 8.0])
        >>> startup = StartUp(1.0, "imports", clock=lambda: next(ticks))
        >>> startup.enter("connect")
        >>> startup.enter("first step")
        >>> startup.finish()
        >>> startup.seconds
        {'imports': 5.0, 'connect': 0.5, 'first step': 1.5}
        >>> print(startup)
        start-up took 7.0 s: imports 5.0, connect 0.5, first step 1.5
    """

    def __init__(
        self,
        began: float,
        first_phase: str,
        *,
        clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._clock = clock
        self._entered = began
        self._phase: str | None = first_phase
        self._seconds: dict[str, float] = {}

    @classmethod
    def of_this_process(cls) -> Self:
        """Begin with the imports, which have taken all time since the process was started."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        return cls(_process_start(now), _IMPORTS)

    @classmethod
    def from_now(cls, phase: str) -> Self:
        """Begin with ``phase`` now: what the process did before was something else."""
        return cls(time.clock_gettime(time.CLOCK_BOOTTIME), phase)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase that is over, in their order."""
        return dict(self._seconds)

    @property
    def is_finished(self) -> bool:
        """Whether the last phase is over."""
        return self._phase is None

    def enter(self, phase: str) -> None:
        """Begin ``phase``, which ends the one before; one that comes again is added up."""
        self._close()
        self._phase = phase

    def finish(self) -> None:
        """End the last phase; what follows isn't start-up."""
        self._close()
        self._phase = None

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {spent:.1f}" for name, spent in self._seconds.items())
        return f"start-up took {sum(self._seconds.values()):.1f} s: {phases}"

    def _close(self) -> None:
        if self._phase is None:
            raise ValueError("the start-up is over; it has no further phases")
        now = self._clock()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._entered
        self._entered = now


def _process_start(now: float) -> float:
    """Return when the kernel started this process, on the boot clock (to 10 ms); else ``now``."""
    try:
        stat = Path("/proc/self/stat").read_text()
        # The command in parentheses may hold anything; the fields after it are counted from there.
        ticks = int(stat.rpartition(")")[2].split()[19])
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
