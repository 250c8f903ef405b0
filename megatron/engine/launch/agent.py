"""Runs the ranks of one node: all of them, or none.

The loop sleeps until a rank writes, a rank ends or a signal arrives. When a rank fails, the others
get a moment to fail by themselves (what they print may tell the cause), then SIGTERM, then SIGKILL.
Signals to the launcher go on to the ranks; the second SIGINT or SIGTERM ends everything at once.
"""

import selectors
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from megatron.engine.launch.failures import RankEnd, failure_report, first_failure
from megatron.engine.launch.output import OutputPipe, StderrTail, write_all
from megatron.engine.launch.placement import (
    NodePlacement,
    rank_command,
    rank_environment,
    usable_cores,
)
from megatron.engine.launch.rank_process import Exit, RankProcess, signal_name, start_rank
from megatron.engine.launch.sessions import SessionGuard, end_sessions, kill_sessions
from megatron.engine.launch.signal_inbox import SignalInbox, open_signal_inbox

__all__ = ["GraceTimes", "run_ranks"]

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_STOP = (signal.SIGINT, signal.SIGTERM)  # those of which a second one kills
_STDOUT, _STDERR = 1, 2


@dataclass(frozen=True)
class GraceTimes:
    """How long ranks may take to end, in seconds."""

    settle_s: float = 1.0  # after the first failure, for the others to fail by themselves
    terminate_s: float = 5.0  # between SIGTERM and SIGKILL


def run_ranks(
    placement: NodePlacement,
    user_script: str,
    arguments: tuple[str, ...],
    *,
    environ: Mapping[str, str],
    grace: GraceTimes,
) -> int:
    """Run this node's ranks to their end and return the job's exit status.

    The status is 0 only if every rank ended with 0. Otherwise it is that of the rank that failed
    first, 128 + N if signal N ended it. When this returns, or if this process is killed, nothing
    that the ranks started is left. Main thread only.

    Raises:
        LaunchError: a rank can't be started; those that were are ended.
    """
    cores = usable_cores()
    with ExitStack() as stack:
        inbox = stack.enter_context(open_signal_inbox((signal.SIGCHLD, *_FORWARDED)))
        guard = stack.enter_context(SessionGuard())
        node = _Node(inbox, grace)
        stack.callback(node.end_everything)
        for local_rank in range(len(placement.slots)):
            process = start_rank(
                placement.first_rank + local_rank,
                rank_command(user_script, arguments, local_rank),
                rank_environment(placement, local_rank, environ, cores),
                is_foreground=placement.first_rank + local_rank == 0,
            )
            guard.watch(process.pid)
            node.add(process)
        node.wait()
        node.end_everything()
        return node.conclude()


class _Rank:
    """A rank and what comes out of it."""

    def __init__(self, process: RankProcess) -> None:
        self.process = process
        self.tail = StderrTail()
        self.ended_at: float | None = None  # clock time; None while it runs
        self.was_told = False
        self.pipes = [OutputPipe(process.stderr, _STDERR, process.rank, self.tail)]
        if process.stdout is not None:
            self.pipes.append(OutputPipe(process.stdout, _STDOUT, process.rank))


class _Node:
    """The ranks of this node, and how far their ending has come."""

    def __init__(self, inbox: SignalInbox, grace: GraceTimes) -> None:
        self._inbox = inbox
        self._grace = grace
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(inbox, selectors.EVENT_READ)
        self._started = time.monotonic()
        self._forwarded: list[int] = []
        self._due: list[
            tuple[float, Callable[[], None]]
        ] = []  # next steps of ending, soonest first
        self._is_over = False

    def add(self, process: RankProcess) -> None:
        """Take in a rank that was just started."""
        rank = _Rank(process)
        self._ranks.append(rank)
        for pipe in rank.pipes:
            self._selector.register(pipe, selectors.EVENT_READ, (rank, pipe))

    def wait(self) -> None:
        """Return when every rank has ended, by itself or by us."""
        while self._running():
            events = self._selector.select(self._seconds_to_next_step())
            # Signals and ends before output: a death is seen before the peers complain of it.
            for number in self._inbox.take():
                if number != signal.SIGCHLD:
                    self._forward(number)
            self._notice_ends()
            for key, _ in events:
                if key.data is not None:
                    self._pass_on(*key.data)
            self._take_due_steps()

    def end_everything(self) -> None:
        """Leave nothing running and give every process id back."""
        if self._is_over:
            return
        self._is_over = True
        sessions = {rank.process.pid for rank in self._ranks}
        if self._running() or any(rank.process.has_failed for rank in self._ranks):
            self._kill()
            kill_sessions(sessions)
        elif left := end_sessions(sessions, self._grace.terminate_s):
            _say(f"ended {len(left)} processes that ranks had left behind")
        for rank in self._ranks:
            for pipe in list(rank.pipes):
                self._pass_on(rank, pipe, is_last=True)
            if rank.process.exit is not None:
                rank.process.reap()

    def conclude(self) -> int:
        """Tell how the job ended and return its status."""
        ends = [self._end_of(rank) for rank in self._ranks]
        first = first_failure(ends)
        if first is None:
            return 0
        if (number := self._stopped_by(first)) is not None:
            _say(f"stopped by {signal_name(number)} after {first.ended_at:.1f} s")
            return 128 + number
        write_all(_STDERR, failure_report(ends, first).encode())
        return first.status

    def _stopped_by(self, first: RankEnd) -> int | None:
        """Return the signal that ended the job on the user's wish, if one did."""
        if first.exit.signal in self._forwarded:
            return first.exit.signal
        wishes = [number for number in self._forwarded if number in _STOP]
        return wishes[0] if wishes and first.was_told and first.exit.signal else None

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.ended_at is None]

    def _prompts(self) -> list[tuple[float, OutputPipe]]:
        pipes = [pipe for rank in self._ranks for pipe in rank.pipes]
        return [(pipe.prompt_at, pipe) for pipe in pipes if pipe.prompt_at is not None]

    def _seconds_to_next_step(self) -> float | None:
        times = [when for when, _ in self._prompts()] + [when for when, _ in self._due[:1]]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _take_due_steps(self) -> None:
        now = time.monotonic()
        for when, pipe in self._prompts():
            if when <= now:
                pipe.show_prompt()
        while self._due and self._due[0][0] <= now:
            _, act = self._due.pop(0)
            act()

    def _forward(self, number: int) -> None:
        self._forwarded.append(number)
        for rank in self._running():
            rank.process.send(number)
        if number not in _STOP:
            return
        if sum(earlier in _STOP for earlier in self._forwarded) > 1:
            _say("asked to stop a second time; killing the ranks")
            self._due = [(time.monotonic(), self._kill)]
        else:
            _say(f"{signal_name(number)} passed on to the ranks; a second one kills them")

    def _notice_ends(self) -> None:
        for rank in self._running():
            if rank.process.check_exit():
                rank.ended_at = time.monotonic()
                for pipe in list(rank.pipes):
                    self._pass_on(rank, pipe)
                if rank.process.has_failed:
                    self._begin_to_end(rank)

    def _begin_to_end(self, failed: _Rank) -> None:
        others = len(self._running())
        if self._due or failed.was_told or not others:
            return
        _say(f"{self._end_of(failed)}; ending the other {others}")
        settled = time.monotonic() + self._grace.settle_s
        self._due = [
            (settled, self._terminate),
            (settled + self._grace.terminate_s, self._kill),
        ]

    def _terminate(self) -> None:
        for rank in self._running():
            rank.was_told = True
            rank.process.send(signal.SIGTERM)

    def _kill(self) -> None:
        running = self._running()
        for rank in running:
            rank.was_told = True
        kill_sessions({rank.process.pid for rank in running})
        self._notice_ends()
        for rank in self._running():
            _say(f"rank {rank.process.rank} (process {rank.process.pid}) cannot be killed; left")
            rank.ended_at = time.monotonic()

    def _pass_on(self, rank: _Rank, pipe: OutputPipe, *, is_last: bool = False) -> None:
        if pipe not in rank.pipes:
            return  # closed in this round, when the rank ended
        now = time.monotonic()
        if not pipe.pass_on(now) or is_last:
            self._selector.unregister(pipe)
            rank.pipes.remove(pipe)
            pipe.close(now)

    def _end_of(self, rank: _Rank) -> RankEnd:
        ended_at = time.monotonic() if rank.ended_at is None else rank.ended_at
        began_at = rank.tail.trace_began_at
        return RankEnd(
            rank=rank.process.rank,
            pid=rank.process.pid,
            exit=rank.process.exit or Exit(None, signal.SIGKILL),
            ended_at=ended_at - self._started,
            trace_began_at=None if began_at is None else began_at - self._started,
            was_told=rank.was_told,
            excerpt=rank.tail.excerpt(),
        )


def _say(text: str) -> None:
    write_all(_STDERR, f"deepy: {text}\n".encode())
