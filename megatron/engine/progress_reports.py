"""What a rank says of its progress, and how long each part of a training may take.

A limit too short ends a healthy job, and does so again after every restart; one too long costs the
time of one hang. So only steps, whose durations are known from those before, have a tight one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic

from megatron.base.progress import Progress

__all__ = ["HangLimits", "Phases"]

_MINUTE_S = 60.0
_HOUR_S = 3600.0
_BLOCK = 50  # steps; the slowest one counts until another 50 to 100 were taken


def _phase_limits() -> dict[str, float]:
    return {
        "connect": 30 * _MINUTE_S,
        "verify": 4 * _HOUR_S,  # reads every byte of a checkpoint
        "data": 6 * _HOUR_S,  # builds index maps, and other ranks wait for them
        "load": 4 * _HOUR_S,
    }


@dataclass(frozen=True)
class HangLimits:
    """Seconds that pass until a rank counts as hung.

    Attributes:
        hang_timeout: of a step and of a batch of an evaluation. None: worked out from the steps
            measured so far. 0: nothing has a limit.
    """

    hang_timeout: float | None = None
    least_step_s: float = 180.0  # a file server may need as long to fail over
    times_slowest_step: float = 20.0
    first_s: float = 30 * _MINUTE_S  # of what may compile: a launch's first step and evaluation
    # Not worked out from saves before: one waits for the bytes of another, which may take any time.
    save_s: float = 2 * _HOUR_S
    other_s: float = 30 * _MINUTE_S
    phases: Mapping[str, float] = field(default_factory=_phase_limits)

    @property
    def is_off(self) -> bool:
        """Whether nothing has a limit."""
        return self.hang_timeout == 0

    def of_phase(self, name: str) -> float:
        """Return the limit of a phase outside of the loop."""
        return self._at_least_timeout(self.phases.get(name, self.other_s))

    @property
    def of_first(self) -> float:
        """The limit of a launch's first step, and of its first evaluated batch."""
        return self._at_least_timeout(self.first_s)

    def of_step(self, slowest_s: float | None) -> float:
        """Return the limit of a step.

        Args:
            slowest_s: of the steps measured lately; None: none was.
        """
        if self.is_off:
            return math.inf
        if self.hang_timeout is not None:
            return self.hang_timeout
        if slowest_s is None:
            return self.of_first
        return max(self.least_step_s, self.times_slowest_step * slowest_s)

    @property
    def of_save(self) -> float:
        """The limit of a save, or of the wait for one in flight."""
        return self._at_least_timeout(self.save_s)

    def _at_least_timeout(self, limit_s: float) -> float:
        return math.inf if self.is_off else max(limit_s, self.hang_timeout or 0.0)


class Phases:
    """Tells of one rank's progress.

    Each call says what begins, and thereby that what came before is over. A step costs about a
    microsecond.

    Args:
        progress: where it is told.
        limits: how long things may take.
        clock: seconds, as ``time.monotonic()``.
    """

    def __init__(
        self,
        progress: Progress | None = None,
        limits: HangLimits | None = None,
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._progress = Progress() if progress is None else progress
        self._limits = HangLimits() if limits is None else limits
        self._clock = clock
        self._phase = ""
        self._began = 0.0
        self._step: int | None = None  # the last one begun
        self._steps_begun = 0
        self._steps_measured = 0
        self._slowest_now: float | None = None  # of the present block of steps
        self._slowest_before: float | None = None  # of the block before
        self._step_limit = self._limits.of_step(None)
        self._has_evaluated = False

    def enter(self, name: str) -> None:
        """Begin a phase outside of the loop."""
        self._enter(name, self._limits.of_phase(name))

    def step(self, step: int) -> None:
        """Begin a step."""
        now = self._clock()
        if self._phase == "step":
            self._measure(now - self._began)
        else:
            self._leave(now)
            self._phase = "step"
            self._progress.enter("step")
        self._began, self._step = now, step
        self._steps_begun += 1
        limit = self._limits.of_first if self._steps_begun == 1 else self._step_limit
        self._progress.step(step, limit, now=now)

    def save(self) -> None:
        """Begin to save, or to wait for a save."""
        self._enter("save", self._limits.of_save)

    def evaluation(self) -> None:
        """Begin an evaluation."""
        self._enter("evaluation", self._batch_limit)

    def batch(self) -> None:
        """Say that another batch of the evaluation is done."""
        self._progress.step(self._step, self._batch_limit)

    def finish(self) -> None:
        """Begin what comes after the last step: evaluations, the last save, the end."""
        self._enter("finish", self._limits.of_save)

    def fail(self) -> None:
        """Begin to end after an error: what is being saved is waited for."""
        self._enter("failing", self._limits.of_phase("failing"))

    @property
    def _batch_limit(self) -> float:
        return self._step_limit if self._has_evaluated else self._limits.of_first

    def _enter(self, name: str, limit_s: float) -> None:
        now = self._clock()
        self._leave(now)
        self._phase, self._began = name, now
        self._progress.enter(name, self._step, limit_s)

    def _leave(self, now: float) -> None:
        if self._phase == "step":
            self._measure(now - self._began)
        elif self._phase == "evaluation":
            self._has_evaluated = True

    def _measure(self, seconds: float) -> None:
        if self._steps_begun == 1:
            return  # it may have compiled
        self._steps_measured += 1
        is_slower = self._slowest_now is None or seconds > self._slowest_now
        if is_slower:
            self._slowest_now = seconds
        if self._steps_measured % _BLOCK == 0:
            self._slowest_before, self._slowest_now = self._slowest_now, None
        elif not is_slower:
            return
        known = [one for one in (self._slowest_before, self._slowest_now) if one is not None]
        self._step_limit = self._limits.of_step(max(known))
