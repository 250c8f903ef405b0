"""Runs the ranks of one node: all of them, or none.

The loop sleeps until a rank writes, a rank ends, a signal or a message of the launcher arrives.
When a rank fails, the others get a moment to fail by themselves (what they print may tell the
cause), then SIGTERM, then SIGKILL. A signal is somebody's wish to stop: it goes on to the ranks,
which save and end. A second wish goes on too, and what then still runs is killed.

Of a job on several nodes every node has such a loop; a link joins it to the launcher's.
"""

import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from megatron.engine.launch.conclusion import JobEnd
from megatron.engine.launch.failures import RankEnd
from megatron.engine.launch.head_link import HeadLink
from megatron.engine.launch.job_channel import BEAT_S
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
from megatron.engine.launch.watchdog import Watchdog
from megatron.engine.launch.wishes import FORWARDED_SIGNALS, Wishes

__all__ = ["GraceTimes", "run_ranks"]

_SECOND_WISH_GRACE_S = 2.0
_STACKS_TAKE_S = 2.0
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
    link: HeadLink | None = None,
) -> JobEnd:
    """Run this node's ranks to their end and return how the job ended.

    When this returns, or if this process is killed, nothing that the ranks started is left. Main
    thread only.

    Args:
        placement: this node's part of the job.
        user_script: what every rank runs.
        arguments: the script's.
        environ: what the ranks' environment is made from.
        grace: how long ranks may take to end.
        link: to the launcher, which tells how the job ended; None if this node is the whole job.

    Raises:
        LaunchError: a rank can't be started; those that were are ended.
    """
    cores = usable_cores()
    with ExitStack() as stack:
        inbox = stack.enter_context(open_signal_inbox((signal.SIGCHLD, *FORWARDED_SIGNALS)))
        guard = stack.enter_context(SessionGuard())
        watchdog = stack.enter_context(Watchdog(placement.first_rank, len(placement.slots)))
        node = _Node(inbox, grace, watchdog, link)
        stack.callback(node.end_everything)
        for local_rank in range(len(placement.slots)):
            process = start_rank(
                placement.first_rank + local_rank,
                rank_command(user_script, arguments, local_rank),
                rank_environment(placement, local_rank, environ, cores)
                | watchdog.variables(local_rank),
                # srun may give the agents a terminal: that isn't the user's
                is_foreground=link is None and local_rank == 0,
            )
            guard.watch(process.pid)
            node.add(process)
        node.wait()
        node.end_everything()
        end = node.outcome()
        if link is None:
            write_all(_STDERR, end.report().encode())
        return end


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

    def __init__(
        self, inbox: SignalInbox, grace: GraceTimes, watchdog: Watchdog, link: HeadLink | None
    ) -> None:
        self._inbox = inbox
        self._grace = grace
        self._watchdog = watchdog
        self._link = link
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(inbox, selectors.EVENT_READ)
        if link is not None:
            self._selector.register(link, selectors.EVENT_READ)
        self._started = self._looked_at = time.monotonic()
        self._wishes = Wishes(under_slurm="SLURM_JOB_ID" in os.environ)
        self._hang: str | None = None
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
                    self._take_signal(number)
            self._notice_ends()
            if self._link is not None:
                self._obey(self._link)
            for key, _ in events:
                if key.data is not None:
                    self._pass_on(*key.data)
            self._look_for_hangs()
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

    def outcome(self) -> JobEnd:
        """Return how it ended, and tell the launcher of a job on several nodes."""
        end = JobEnd(
            ends=tuple(self._end_of(rank) for rank in self._ranks),
            wishes=self._wishes.numbers,
            hang=self._hang,
        )
        if self._link is not None:
            ends = [rank.as_fields() for rank in end.ends]
            self._link.tell("ended", ends=ends, wishes=end.wishes, hang=end.hang)
        return end

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.ended_at is None]

    def _processes(self) -> dict[int, int]:
        return {rank.process.rank: rank.process.pid for rank in self._running()}

    def _prompts(self) -> list[tuple[float, OutputPipe]]:
        pipes = [pipe for rank in self._ranks for pipe in rank.pipes]
        return [(pipe.prompt_at, pipe) for pipe in pipes if pipe.prompt_at is not None]

    def _seconds_to_next_step(self) -> float:
        times = [when for when, _ in self._prompts()] + [when for when, _ in self._due[:1]]
        times.append(self._looked_at + self._watchdog.interval_s)
        if self._link is not None:
            times.append(time.monotonic() + BEAT_S / 2)
        return max(0.0, min(times) - time.monotonic())

    def _take_due_steps(self) -> None:
        now = time.monotonic()
        for when, pipe in self._prompts():
            if when <= now:
                pipe.show_prompt()
        while self._due and self._due[0][0] <= now:
            _, act = self._due.pop(0)
            act()

    def _take_signal(self, number: int) -> None:
        # SIGINT twice is a user at a terminal, who is heard at once.
        is_own = self._link is None and number == signal.SIGINT
        if self._link is not None and self._due:
            return  # the launcher is ending the job, and srun or mpirun does so too
        if not self._wishes.add(number, is_urgent=is_own):
            return
        if self._link is not None:
            self._link.tell("wish", number=number)
        self._pass_wish_on(number)

    def _pass_wish_on(self, number: int) -> None:
        for rank in self._running():
            rank.process.send(number)
        if self._wishes.is_second:
            if self._link is None:
                _say("asked to stop a second time; killing the ranks")
            grace_s = min(_SECOND_WISH_GRACE_S, self._grace.terminate_s)
            self._due = [(time.monotonic() + grace_s, self._kill)]
        elif self._link is None:
            _say(f"{signal_name(number)} passed on to the ranks; a second one kills them")

    def _obey(self, link: HeadLink) -> None:
        for message in link.take():
            if message.kind == "signal":
                if self._wishes.add(message["number"], is_urgent=message["is_second"]):
                    self._pass_wish_on(message["number"])
            elif message.kind == "end":
                self._end_for_the_job(shows_stacks=message["shows_stacks"])
        link.keep_alive()
        if link.loss is not None and not self._due:
            _say(f"{link.loss}; ending the ranks of this node")
            self._end_for_the_job(shows_stacks=False)

    def _end_for_the_job(self, *, shows_stacks: bool) -> None:
        """End the ranks, which have done nothing wrong."""
        if self._due:
            return  # that has begun already
        settled = time.monotonic() + self._grace.settle_s
        if shows_stacks:
            self._show_stacks()
            settled = time.monotonic() + _STACKS_TAKE_S
        self._end_at(settled)

    def _end_at(self, settled: float) -> None:
        self._due = [
            (settled, self._terminate),
            (settled + self._grace.terminate_s, self._kill),
        ]

    def _look_for_hangs(self) -> None:
        now = time.monotonic()
        if now < self._looked_at + self._watchdog.interval_s or self._due:
            return
        self._looked_at = now
        hang = self._watchdog.look(self._processes())
        if hang is None:
            return
        self._hang = hang
        _say(f"no progress: {hang}; ending the job")
        if self._link is not None:
            self._link.tell("hung", text=hang)
        self._end_for_the_job(shows_stacks=True)

    def _show_stacks(self) -> None:
        for rank in self._ranks:
            for pipe in rank.pipes:
                pipe.mark()
        self._watchdog.ask_for_stacks(self._processes())

    def _notice_ends(self) -> None:
        for rank in self._running():
            if rank.process.check_exit():
                rank.ended_at = time.monotonic()
                for pipe in list(rank.pipes):
                    self._pass_on(rank, pipe)
                if rank.process.has_failed and not self._end_of(rank).was_on_purpose:
                    self._begin_to_end(rank)

    def _begin_to_end(self, failed: _Rank) -> None:
        others = len(self._running())
        if self._due or failed.was_told:
            return
        end = self._end_of(failed)
        if self._link is not None:
            self._link.tell("failed", end=end.as_fields())
        if others:
            if self._link is None:
                _say(f"{end}; ending the other {others}")
            self._end_at(time.monotonic() + self._grace.settle_s)

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
            progress=self._watchdog.progress_of(rank.process.rank, rank.tail.lines()),
        )


def _say(text: str) -> None:
    write_all(_STDERR, f"deepy: {text}\n".encode())
