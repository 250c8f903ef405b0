"""The launcher's end of a job on several nodes: lets the agents in, keeps them together, ends them.

First all agents have to come and to be alike (``muster``); only then does a rank start. From then
on the first bad news of one node ends the others, and what is told at the end is what came first.
"""

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from megatron.base.errors import LaunchError
from megatron.base.exit_codes import NODE_LOST
from megatron.engine.launch.agent import GraceTimes
from megatron.engine.launch.conclusion import JobEnd
from megatron.engine.launch.failures import RankEnd
from megatron.engine.launch.job_channel import BEAT_S, PAUSED_S, SILENCE_S, Channel, Message
from megatron.engine.launch.job_nodes import Job, JobNode, nodes_of, rendezvous_of
from megatron.engine.launch.muster import Muster, listen
from megatron.engine.launch.output import write_all
from megatron.engine.launch.rank_process import signal_name
from megatron.engine.launch.remote_start import RemoteStart
from megatron.engine.launch.sessions import SessionGuard
from megatron.engine.launch.signal_inbox import SignalInbox, open_signal_inbox
from megatron.engine.launch.starter import Starter
from megatron.engine.launch.wishes import FORWARDED_SIGNALS, Wishes

__all__ = ["run_job"]

_STDERR = 2
_TICK_S = 1.0
_NODES_END_S = 15.0  # beyond the ranks' grace times


def run_job(
    job: Job,
    start: Callable[[int], RemoteStart],
    *,
    grace: GraceTimes,
    connect_s: float,
    all_are_here: Callable[[], None],
) -> JobEnd | None:
    """Run a job on several nodes to its end, say how it ended, and return that.

    When this returns, nothing of the job runs any more on a node that can be reached; if this
    process is killed, the agents see it. Main thread only.

    Args:
        job: what runs.
        start: returns what starts the agents, given the port to connect to.
        grace: how long ranks may take to end.
        connect_s: how long agents may take to come.
        all_are_here: called when the last agent has come.

    Returns:
        None if a signal stopped the launch before a rank was started.

    Raises:
        LaunchError: a node can't take part; no rank was started.
    """
    with ExitStack() as stack:
        inbox = stack.enter_context(open_signal_inbox((signal.SIGCHLD, *FORWARDED_SIGNALS)))
        guard = stack.enter_context(SessionGuard())
        listener = stack.enter_context(listen())
        starter = Starter(start(listener.getsockname()[1]))
        stack.callback(starter.end)
        guard.watch(starter.pid)
        head = _Head(job, inbox, listener, starter, grace)
        stack.callback(head.close)
        if not head.muster(connect_s):
            return None
        all_are_here()
        head.start_ranks()
        head.wait()
        end = head.conclude()
        starter.end()  # so that what the agents wrote stands before our last words
        write_all(_STDERR, end.report().encode())
        return end


class _Head:
    """All nodes of a job, and how far it has come."""

    def __init__(
        self,
        job: Job,
        inbox: SignalInbox,
        listener: socket.socket,
        starter: Starter,
        grace: GraceTimes,
    ) -> None:
        self.wishes = Wishes(under_slurm="SLURM_JOB_ID" in os.environ)
        self._job = job
        self._inbox = inbox
        self._starter = starter
        self._grace = grace
        self._nodes = nodes_of(job)
        self._selector = selectors.DefaultSelector()
        self._selector.register(inbox, selectors.EVENT_READ)
        self._muster = Muster(job, self._nodes, grace, listener, self._selector)
        self._beat_at = self._looked_at = time.monotonic()
        self._end_by: float | None = None  # when nodes that have not ended are given up
        self._hang: str | None = None
        self._starter_loss: str | None = None

    def muster(self, connect_s: float) -> bool:
        """Return once every node has come and can take part; False if a signal stopped it.

        Raises:
            LaunchError: a node didn't come, or can't take part.
        """
        deadline = time.monotonic() + connect_s
        while not all(node.has_answered for node in self._nodes):
            self._take_turn()
            if self.wishes.numbers:
                self._refuse(f"the launch was stopped by {signal_name(self.wishes.numbers[0])}")
                return False
            missing = [node.name for node in self._nodes if not node.has_answered]
            has_starter_ended = self._starter.exit is not None
            if missing and (has_starter_ended or time.monotonic() > deadline):
                self._take_turn()  # what came before the end
                self._refuse("not all nodes came")
                error = LaunchError(self._why_not_all_came(missing, connect_s))
                error.exit_code = NODE_LOST  # another try may get other nodes
                raise error
        if problems := self._muster.problems:
            self._refuse("a node can't take part")
            raise LaunchError("; ".join(problems))
        return True

    def start_ranks(self) -> None:
        """Tell the nodes to go. All are ready."""
        address, port = rendezvous_of(self._job, self._nodes)
        names = ", ".join(self._job.hosts)
        nodes = f"{len(self._nodes)} nodes ({names})" if len(self._nodes) > 1 else names
        _say(f"starting {self._job.num_ranks} ranks on {nodes}; rendezvous at {address}:{port}")
        self._looked_at = time.monotonic()
        for node in self._nodes:
            node.tell("go", master_addr=address, master_port=port)

    def wait(self) -> None:
        """Return when every node has ended or is given up."""
        while any(node.is_running for node in self._nodes):
            self._take_turn()
            self._look_for_silence()
            self._look_at_starter()

    def conclude(self) -> JobEnd:
        """Let the agents go, and return how the job ended."""
        ends, wishes = [], list(self.wishes.numbers)
        for node in self._nodes:
            if node.ended is not None:
                ends += [_rank_end(node, fields) for fields in node.ended["ends"]]
                wishes += [number for number in node.ended["wishes"] if number not in wishes]
        lost = [f"{node.name}: {node.loss}" for node in self._nodes if node.loss is not None]
        if self._starter_loss is not None:
            lost.append(self._starter_loss)
        end = JobEnd(tuple(ends), tuple(wishes), self._hang, tuple(lost))
        for node in self._nodes:
            node.tell("leave", status=end.status)
        return end

    def close(self) -> None:
        """Close all connections: an agent that is still there ends."""
        for channel in self._channels():
            channel.flush()
            channel.close()

    def _channels(self) -> Iterable[Channel]:
        yield from self._muster.strangers
        yield from (node.channel for node in self._nodes if node.channel is not None)

    def _take_turn(self) -> None:
        """Wait a moment for signals, connections and messages, and act on them."""
        self._selector.select(_TICK_S)
        for number in self._inbox.take():
            if number != signal.SIGCHLD:
                self._take_signal(number)
        self._muster.let_in()
        for node in self._nodes:
            self._hear(node)
        if time.monotonic() >= self._beat_at + BEAT_S:
            self._beat_at = time.monotonic()
            for node in self._nodes:
                node.tell("beat")
        for channel in self._channels():
            channel.flush()

    def _hear(self, node: JobNode) -> None:
        if node.channel is None or node.channel.fileno() < 0:
            return
        messages = node.channel.receive()
        if messages:
            node.heard_at = time.monotonic()
        for message in messages:
            self._obey(node, message)
        if node.channel.is_broken:
            self._forget(node.channel)
            if not node.has_answered:
                node.problem = "its agent ended before it was ready"
            elif node.is_running and node.problem is None:
                self._lose(node, "the connection to its agent has ended")

    def _obey(self, node: JobNode, message: Message) -> None:
        self._muster.hear(node, message)
        if message.kind == "wish" and self._end_by is None:
            # (later it may come from mpirun, which ends the agents when it is ended itself)
            self._take_signal(message["number"], is_own=False)
        elif message.kind == "failed":
            self._end_all(f"{_rank_end(node, message['end'])}; ending all nodes", but=node)
        elif message.kind == "hung":
            self._hang = self._hang or f"{message['text']} (on {node.name})"
            self._end_all(f"no progress: {self._hang}; ending all nodes", but=node, stacks=True)
        elif message.kind == "ended":
            node.ended = message
            self._hang = self._hang or message["hang"]

    def _why_not_all_came(self, missing: list[str], connect_s: float) -> str:
        count = f"{len(missing)} of {len(self._nodes)} nodes can't take part: "
        if (ended := self._starter.exit) is not None:
            why = f"no agent came, and {self._starter.program} has ended ({ended})"
        else:
            why = f"no agent came within {connect_s:.0f} s"
        text = f"{', '.join(missing)}: {why}; see above what {self._starter.program} said"
        return count + "; ".join([text, *self._muster.problems])

    def _refuse(self, reason: str) -> None:
        for channel in self._channels():
            channel.send("refuse", reason=reason)

    def _take_signal(self, number: int, *, is_own: bool = True) -> None:
        # Ctrl-C twice at a terminal is heard at once.
        is_urgent = is_own and number == signal.SIGINT
        if not self.wishes.add(number, is_urgent=is_urgent):
            return
        is_second = self.wishes.is_second
        then = "killing the ranks" if is_second else "a second one kills them"
        _say(f"{signal_name(number)} passed on to the ranks of all nodes; {then}")
        for node in self._nodes:
            node.tell("signal", number=number, is_second=is_second)

    def _end_all(self, reason: str, *, but: JobNode | None = None, stacks: bool = False) -> None:
        """Tell all nodes to end; ``but`` knows already."""
        if self._end_by is not None:
            return
        grace_s = self._grace.settle_s + self._grace.terminate_s
        self._end_by = time.monotonic() + grace_s + _NODES_END_S
        _say(reason)
        for node in self._nodes:
            if node is not but:
                node.tell("end", reason=reason, shows_stacks=stacks)

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        paused_s, self._looked_at = now - self._looked_at, now
        for node in self._nodes:
            if paused_s > PAUSED_S:
                node.heard_at = min(now, node.heard_at + paused_s)  # it was us who slept
            silent_s = now - node.heard_at
            if node.is_running and silent_s > SILENCE_S:
                self._lose(node, f"no sign of life for {silent_s:.0f} s")
            elif node.is_running and self._end_by is not None and now > self._end_by:
                self._lose(node, f"it didn't end; last heard of {silent_s:.0f} s ago")

    def _look_at_starter(self) -> None:
        ended = self._starter.exit
        if ended is None or self._starter_loss is not None:
            return
        if running := [node.name for node in self._nodes if node.is_running]:
            self._starter_loss = f"{', '.join(running)}: {self._starter.program} ended ({ended})"
            self._end_all(f"{self._starter.program} has ended ({ended}); ending all nodes")

    def _lose(self, node: JobNode, how: str) -> None:
        node.loss = how
        self._end_all(f"lost {node.name}: {how}; ending the other nodes", but=node)

    def _forget(self, channel: Channel) -> None:
        self._selector.unregister(channel)
        channel.flush()
        channel.close()


def _rank_end(node: JobNode, fields: dict[str, Any]) -> RankEnd:
    return RankEnd.from_fields({**fields, "host": node.name})


def _say(text: str) -> None:
    write_all(_STDERR, f"deepy: {text}\n".encode())
