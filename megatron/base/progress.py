"""How far a rank has come, where the agent that started it can see it without asking.

A *progress file* is 48 bytes of memory that a rank writes and its agent reads: what the rank is
doing, since when, and by when it should be done. Writing costs a few stores, so it is done every
step; reading works as well when the rank is stopped, or busy in C code that never lets go of
Python's lock. The file is a memfd of the agent's: it has no place on a disk, and is gone with the
agent and its ranks whatever ends them.

Times are those of ``time.monotonic()``, which all processes of a machine share, and which stands
still while the machine sleeps.
"""

import faulthandler
import functools
import math
import mmap
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

__all__ = [
    "PROGRESS_VARIABLE",
    "Progress",
    "ProgressFile",
    "Snapshot",
    "open_progress",
    "progress_of_this_process",
]

PROGRESS_VARIABLE = "NEOX_PROGRESS_FILE"
"""Environment variable with the path of a rank's progress file."""

# Doubles, each written whole, then the phase's name.
_TELLS_STACKS, _STEP, _STARTED, _DEADLINE = range(4)
_NAME = slice(32, 48)
_SIZE = 48
_NO_STEP = -1.0
_STDERR = 2


@dataclass(frozen=True)
class Snapshot:
    """What a rank's progress file says."""

    tells_stacks: bool  # SIGQUIT makes it write its stacks; before that, SIGQUIT would end it
    phase: str  # empty: it has said nothing yet
    step: int | None
    started: float  # when the phase or the step began
    deadline: float  # when it should be over; infinite: it may take any time


class Progress:
    """The rank's side. Without a file every call does nothing."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self._bytes = None if memory is None else memoryview(memory)
        self._numbers = None if self._bytes is None else self._bytes[:32].cast("d")

    @classmethod
    def at(cls, path: str) -> Self:
        """Open a progress file.

        Raises:
            OSError: it isn't there, or isn't ours.
            ValueError: it isn't a progress file.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(mmap.mmap(descriptor, _SIZE))
        finally:
            os.close(descriptor)

    def tells_stacks(self) -> None:
        """Say that SIGQUIT now makes this process write its stacks."""
        if self._numbers is not None:
            self._numbers[_TELLS_STACKS] = 1.0

    def enter(self, phase: str, step: int | None = None, limit_s: float = math.inf) -> None:
        """Begin a phase, with the step it belongs to, that should be over in ``limit_s`` seconds.

        Its name is cut to 16 bytes.
        """
        if self._bytes is None:
            return
        self._bytes[_NAME] = phase.encode()[:16].ljust(16, b"\0")
        self.step(step, limit_s)

    def step(
        self, step: int | None, limit_s: float = math.inf, *, now: float | None = None
    ) -> None:
        """Begin a step of the phase. About a microsecond.

        Args:
            step: its number.
            limit_s: seconds until it should be over.
            now: of ``time.monotonic()``, if the caller knows it already.
        """
        numbers = self._numbers
        if numbers is None:
            return
        if now is None:
            now = time.monotonic()
        numbers[_STEP] = _NO_STEP if step is None else step
        numbers[_STARTED] = now
        # Last: whoever is stopped in between stays under the deadline of before.
        numbers[_DEADLINE] = now + limit_s


class ProgressFile:
    """The agent's side: a new progress file, for one rank."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("neox-progress")
        os.truncate(self._descriptor, _SIZE)
        self._memory = mmap.mmap(self._descriptor, _SIZE)
        numbers = memoryview(self._memory)[:32].cast("d")
        numbers[_STEP] = _NO_STEP
        numbers[_DEADLINE] = math.inf

    @property
    def path(self) -> str:
        """Where another process of the same user finds it, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def read(self) -> Snapshot:
        """Return what it says now. A change may be seen half; a second look tells."""
        data = memoryview(bytes(self._memory))
        numbers = data[:32].cast("d")
        step = numbers[_STEP]
        return Snapshot(
            tells_stacks=numbers[_TELLS_STACKS] == 1.0,
            phase=bytes(data[_NAME]).rstrip(b"\0").decode(errors="replace"),
            step=None if step == _NO_STEP else int(step),
            started=numbers[_STARTED],
            deadline=numbers[_DEADLINE],
        )

    def close(self) -> None:
        """Give it up; who has it open may go on writing."""
        os.close(self._descriptor)


def open_progress(environ: Mapping[str, str]) -> Progress:
    """Open the file that the agent has made for this process, if it has one.

    From here on SIGQUIT makes this process write the stacks of all its threads on standard error;
    that works also while Python's lock is held.
    """
    path = environ.get(PROGRESS_VARIABLE)
    if not path:
        return Progress()
    try:
        progress = Progress.at(path)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"nobody would notice a hang of this rank: {path}: {error}\n")
        return Progress()
    faulthandler.register(signal.SIGQUIT, file=_STDERR, all_threads=True, chain=False)
    progress.tells_stacks()
    return progress


@functools.cache
def progress_of_this_process() -> Progress:
    """Return this process's progress, opened at the first call."""
    return open_progress(os.environ)
