"""Notices ranks that hang, and tells which one holds up the others.

Each rank says in its progress file by when it will be done with what it has begun
(``base/progress.py``). One that is not done by then hangs, or waits for one that does. Which is
which shows when all ranks are compared: whoever is stopped, is furthest behind, or isn't waiting
for others comes first.

Time in which the agent itself couldn't look doesn't count: then the whole job was stopped, or the
machine asleep or overloaded.
"""

import contextlib
import math
import os
import re
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron.base.progress import PROGRESS_VARIABLE, ProgressFile, Snapshot

__all__ = ["RankProgress", "Watchdog", "culprit", "hang_report"]

_HELD_UP_S = 2.0  # a look that comes so much later than the one before: we couldn't
_LISTED = 16  # ranks in a report
_LOOP_PHASES = ("step", "save", "evaluation", "finish")  # in their order after a step

_THREAD = re.compile(r"^(Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\)")
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
# Where a rank that waits for others is.
_COLLECTIVE = re.compile(r"torch/distributed/|deepspeed/comm/|c10d")


@dataclass(frozen=True)
class RankProgress:
    """How far one rank had come when the job was found to hang. Plain values: it travels as JSON.

    Attributes:
        limit_s: what it was allowed; None: any time.
        state: of its process: "runs", "is stopped", "waits for a disk" or "has ended".
        frame: where its main thread is; None if it couldn't say.
        is_waiting: that is in a collective: it waits for other ranks.
    """

    rank: int
    node: str
    pid: int
    phase: str
    step: int | None
    for_s: float
    limit_s: float | None
    state: str
    frame: str | None = None
    is_waiting: bool = False

    @property
    def done_step(self) -> int | None:
        """The last step it had done; None if it hadn't begun one."""
        if self.step is None:
            return None
        return self.step - 1 if self.phase == "step" else self.step

    def doing(self) -> str:
        """Return what it does, since when and how long that may take."""
        what = "start-up" if not self.phase else self.phase
        if self.step is not None:
            what = f"step {self.step}" + ("" if self.phase == "step" else f", {self.phase}")
        limit = "" if self.limit_s is None else f", limit {_seconds(self.limit_s)}"
        return f"{what} for {_seconds(self.for_s)}{limit}"

    def __str__(self) -> str:
        text = f"rank {self.rank} ({self.node}, process {self.pid}): {self.doing()}"
        if self.state != "runs":
            text += f"; it {self.state}"
        if self.frame is not None:
            text += f"; {'waits for others in' if self.is_waiting else 'in'} {self.frame}"
        return text


class Watchdog:
    """Watches the ranks of one node; a context manager.

    Args:
        first_rank: global rank of the node's local rank 0.
        num_local: ranks of the node.
        clock: seconds, as ``time.monotonic()``.
    """

    interval_s = 1.0
    """How often :meth:`look` should be called."""

    def __init__(
        self, first_rank: int, num_local: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first_rank = first_rank
        self._files = {first_rank + local: ProgressFile() for local in range(num_local)}
        self._clock = clock
        self._looked_at: float | None = None
        self._held_up: deque[tuple[float, float]] = deque(maxlen=64)  # until when, for how long
        self._suspected: dict[int, Snapshot] = {}
        self._found: dict[int, RankProgress] = {}

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def variables(self, local_rank: int) -> dict[str, str]:
        """Return what must be in the environment of a rank."""
        return {PROGRESS_VARIABLE: self._files[self._first_rank + local_rank].path}

    def look(self, processes: Mapping[int, int]) -> str | None:
        """Return which rank makes no progress, in words, if one doesn't.

        A rank must be over its time at two looks in a row.

        Args:
            processes: rank -> process id of the ranks that run.
        """
        now = self._clock()
        if self._looked_at is not None and now - self._looked_at > self.interval_s + _HELD_UP_S:
            self._held_up.append((now, now - self._looked_at))
            self._suspected.clear()
        self._looked_at = now
        hung = []
        for rank in processes:
            snapshot = self._files[rank].read()
            if now <= snapshot.deadline + self._excused(snapshot):
                self._suspected.pop(rank, None)
            elif self._suspected.get(rank) != snapshot:
                self._suspected[rank] = snapshot
            else:
                hung.append(self._progress_of(rank, processes[rank], snapshot, now))
        if not hung:
            return None
        first = min(hung, key=_suspicion)
        state = "" if first.state == "runs" else f"; it {first.state}"
        return f"rank {first.rank}: {first.doing()}{state}"

    def ask_for_stacks(self, processes: Mapping[int, int]) -> None:
        """Make every rank write its stacks on standard error, and note how far it has come.

        A rank that hasn't got so far that it could is left alone. One that is stopped goes on for
        that.
        """
        now = self._clock()
        for rank, file in self._files.items():
            snapshot = file.read()
            found = self._progress_of(rank, processes.get(rank), snapshot, now)
            self._found[rank] = found
            if rank not in processes or not snapshot.tells_stacks:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[rank], signal.SIGQUIT)
                if found.state == "is stopped":
                    os.kill(processes[rank], signal.SIGCONT)

    def progress_of(self, rank: int, stderr_lines: Sequence[str]) -> RankProgress | None:
        """Return how far a rank has come; if it was asked for its stacks, as of then.

        Args:
            rank: of this node.
            stderr_lines: the end of what it has written on standard error by now.

        Returns:
            None if it has never told, and nothing hangs.
        """
        found = self._found.get(rank)
        if found is None:
            snapshot = self._files[rank].read()
            if not snapshot.phase:
                return None
            return self._progress_of(rank, None, snapshot, self._clock())
        frame = _main_frame(stderr_lines)
        if frame is None:
            return found
        path, line, function = frame
        return replace(
            found,
            frame=f"{_short(path)}:{line} {function}",
            is_waiting=_COLLECTIVE.search(path) is not None,
        )

    def _excused(self, snapshot: Snapshot) -> float:
        return sum(length for until, length in self._held_up if until > snapshot.started)

    def _progress_of(
        self, rank: int, pid: int | None, snapshot: Snapshot, now: float
    ) -> RankProgress:
        limit_s = snapshot.deadline - snapshot.started
        return RankProgress(
            rank=rank,
            node=socket.gethostname(),
            pid=pid or 0,
            phase=snapshot.phase,
            step=snapshot.step,
            for_s=now - snapshot.started - self._excused(snapshot) if snapshot.started else 0.0,
            limit_s=limit_s if math.isfinite(limit_s) else None,
            state="has ended" if pid is None else _state_of(pid),
        )


def culprit(ranks: Sequence[RankProgress]) -> RankProgress | None:
    """Return the rank that the others of a job that hung seem to wait for."""
    return min(ranks, key=_suspicion, default=None)


def hang_report(ranks: Sequence[RankProgress]) -> str:
    """Return lines on the ranks of a job that hung, those to blame first."""
    ranks = sorted(ranks, key=_suspicion)
    text = f"---- of {len(ranks)} ranks the one to look at first:\n" if len(ranks) > 1 else ""
    text += "".join(f"---- {rank}\n" for rank in ranks[:_LISTED])
    if len(ranks) > _LISTED:
        text += f"---- and {len(ranks) - _LISTED} more; see their stacks above\n"
    return text


def _suspicion(rank: RankProgress) -> tuple[Any, ...]:
    """Sort the ranks that hold up others before those that wait for them."""
    is_in_loop = rank.phase in _LOOP_PHASES
    return (
        rank.state != "is stopped",
        rank.phase != "failing",
        is_in_loop,
        # The one that is behind has the lower number, or is in what comes earlier after a step.
        (rank.step if rank.step is not None else -1) if is_in_loop else 0,
        _LOOP_PHASES.index(rank.phase) if is_in_loop else 0,
        rank.is_waiting,
        -rank.for_s,
        rank.rank,
    )


def _state_of(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "has ended"
    # The program's name is in parentheses and may hold anything.
    state = stat.rpartition(")")[2].split()[0]
    names = {"T": "is stopped", "t": "is stopped", "D": "waits for a disk", "Z": "has ended"}
    return names.get(state, "runs")


def _main_frame(lines: Sequence[str]) -> tuple[str, str, str] | None:
    """Return file, line and function of the main thread, the last one in a dump of faulthandler."""
    frame = None
    is_next = False
    for line in lines:
        if _THREAD.match(line):
            frame, is_next = None, True
        elif is_next and (match := _FRAME.match(line)):
            frame, is_next = (match[1], match[2], match[3]), False
    return frame


def _short(path: str) -> str:
    """Return a source file without the folder that packages are installed in."""
    return re.sub(r"^.*/(?:site|dist)-packages/", "", path)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
