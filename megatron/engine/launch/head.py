"""The launcher's end of a job on several nodes: lets the agents in, keeps them together, ends them.

First all agents have to come and to be alike (``muster``); only then does a rank start. From then
on the first bad news of one node ends the others, and what is told at the end is what came first.
"""

import hmac
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from megatron.base.errors import LaunchError
from megatron.base.exit_codes import NODE_LOST
from megatron.engine.launch.addresses import is_loopback
from megatron.engine.launch.agent import GraceTimes
from megatron.engine.launch.conclusion import JobEnd
from megatron.engine.launch.failures import RankEnd
from megatron.engine.launch.job_channel import BEAT_S, PROTOCOL, SILENCE_S, Channel, Message
from megatron.engine.launch.output import write_all
from megatron.engine.launch.rank_process import Exit, signal_name
from megatron.engine.launch.remote_start import RemoteStart
from megatron.engine.launch.sessions import SessionGuard, kill_sessions
from megatron.engine.launch.signal_inbox import SignalInbox, open_signal_inbox
from megatron.engine.launch.software import differences, digest_of_file, installed_software
from megatron.engine.launch.wishes import FORWARDED_SIGNALS, Wishes

__all__ = ["Job", "run_job"]

_STDERR = 2
_TICK_S = 1.0
_STARTER_ENDS_S = 5.0
_ATTEMPTS = 3  # to find the same software on a node
_NODES_END_S = 15.0  # beyond the ranks' grace times


@dataclass(frozen=True)
class Job:
    """What runs, and where."""

    hosts: dict[str, list[int]]  # slots by host; ranks count through them in this order
    user_script: str
    arguments: tuple[str, ...]
    environment: dict[str, str]  # for the ranks of every node
    working_directory: str
    token: str
    master_addr: str | None = None  # None: the first host's
    master_port: int | None = None  # None: one that is free there

    @property
    def num_ranks(self) -> int:
        """Ranks on all hosts together."""
        return sum(map(len, self.hosts.values()))


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
        listener = stack.enter_context(_listen())
        starter = _Starter(start(listener.getsockname()[1]))
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


class _Starter:
    """pdsh, srun or mpirun at work. It leads a session, out of reach of the terminal's Ctrl-C."""

    def __init__(self, remote_start: RemoteStart) -> None:
        self.program = remote_start.program
        try:
            self._process = subprocess.Popen(
                remote_start.command,
                env=remote_start.environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"{remote_start.program} can't be started: {error}") from error

    @property
    def pid(self) -> int:
        """Process id, and the id of the session it leads."""
        return self._process.pid

    @property
    def exit(self) -> Exit | None:
        """How it ended; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        return Exit(None, -status) if status < 0 else Exit(status)

    def end(self) -> None:
        """Wait for its end, or else end it and what it started here."""
        try:
            self._process.wait(_STARTER_ENDS_S)
        except subprocess.TimeoutExpired:
            kill_sessions({self.pid})
            self._process.wait()


@dataclass
class _Node:
    """What is known of one host."""

    index: int
    name: str
    slots: list[int]
    first_rank: int
    channel: Channel | None = None
    heard_at: float = 0.0
    ready: Message | None = None
    problem: str | None = None  # why it can't take part
    ended: Message | None = None
    loss: str | None = None  # how it went away

    def tell(self, kind: str, **fields: Any) -> None:
        if self.channel is not None:
            self.channel.send(kind, **fields)

    @property
    def has_answered(self) -> bool:
        return self.ready is not None or self.problem is not None

    @property
    def is_running(self) -> bool:
        return self.ended is None and self.loss is None


class _Head:
    """All nodes of a job, and how far it has come."""

    def __init__(
        self,
        job: Job,
        inbox: SignalInbox,
        listener: socket.socket,
        starter: _Starter,
        grace: GraceTimes,
    ) -> None:
        self.wishes = Wishes(under_slurm="SLURM_JOB_ID" in os.environ)
        self._job = job
        self._inbox = inbox
        self._listener = listener
        self._starter = starter
        self._grace = grace
        self._software = installed_software()
        self._nodes: list[_Node] = []
        first_rank = 0
        for index, (name, slots) in enumerate(job.hosts.items()):
            self._nodes.append(_Node(index, name, slots, first_rank))
            first_rank += len(slots)
        self._strangers: list[Channel] = []
        self._selector = selectors.DefaultSelector()
        for source in (inbox, listener):
            self._selector.register(source, selectors.EVENT_READ)
        self._beat_at = time.monotonic()
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
        self._compare_devices()
        if problems := [f"{node.name}: {node.problem}" for node in self._nodes if node.problem]:
            self._refuse("a node can't take part")
            raise LaunchError("; ".join(problems))
        return True

    def start_ranks(self) -> None:
        """Tell the nodes to go. All are ready."""
        address, port = self._job.master_addr or self._address_of_rank_0(), self._port()
        num_nodes = len(self._nodes)
        _say(
            f"starting {self._job.num_ranks} ranks on {num_nodes} nodes "
            f"({', '.join(self._job.hosts)}); rendezvous at {address}:{port}"
        )
        self._started = time.monotonic()
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
                ends += [
                    RankEnd.from_fields({**end, "host": node.name}) for end in node.ended["ends"]
                ]
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
        yield from self._strangers
        yield from (node.channel for node in self._nodes if node.channel is not None)

    def _take_turn(self) -> None:
        """Wait a moment for signals, connections and messages, and act on them."""
        self._selector.select(_TICK_S)
        for number in self._inbox.take():
            if number != signal.SIGCHLD:
                self._take_signal(number)
        self._let_strangers_in()
        for channel in list(self._strangers):
            self._hear_stranger(channel)
        for node in self._nodes:
            self._hear(node)
        if time.monotonic() >= self._beat_at + BEAT_S:
            self._beat_at = time.monotonic()
            for node in self._nodes:
                node.tell("beat")
        for channel in self._channels():
            channel.flush()

    def _let_strangers_in(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            channel = Channel(connection)
            self._selector.register(channel, selectors.EVENT_READ)
            self._strangers.append(channel)

    def _hear_stranger(self, channel: Channel) -> None:
        messages = channel.receive()
        if not messages and not channel.is_broken:
            return
        if not messages or not self._is_ours(messages[0], channel):
            self._strangers.remove(channel)
            self._forget(channel)
            return
        hello = messages[0].fields
        if self._has_other_software(hello) and hello["attempt"] < _ATTEMPTS:
            channel.send("again")  # unless somebody is just editing our code, it stays different
            return
        self._strangers.remove(channel)
        if self._admit(hello, channel) is None:
            self._forget(channel)

    def _is_ours(self, hello: Message, channel: Channel) -> bool:
        fields = hello.fields
        if hello.kind != "hello" or not hmac.compare_digest(
            str(fields.get("token")), self._job.token
        ):
            return False
        if fields.get("protocol") != PROTOCOL:
            channel.send("refuse", reason=f"this launcher speaks protocol {PROTOCOL}")
            return False
        return True

    def _has_other_software(self, hello: dict[str, Any]) -> bool:
        if differences(self._software, hello["software"]):
            self._software = installed_software()
        return bool(differences(self._software, hello["software"]))

    def _admit(self, fields: dict[str, Any], channel: Channel) -> _Node | None:
        """Take in an agent that has said hello; return None if it isn't on one of the hosts."""
        node = self._node_called(fields)
        if node is None:
            names = ", ".join(str(name) for name in fields["names"])
            channel.send("refuse", reason=f"{names} is none of {', '.join(self._job.hosts)}")
            _say(f"an agent came from {names}, which is none of the job's hosts; sent away")
            return None
        node.channel, node.heard_at = channel, time.monotonic()
        if different := differences(self._software, fields["software"]):
            node.problem = f"other software than on the launcher's machine: {', '.join(different)}"
            return node
        node.tell(
            "place",
            node_index=node.index,
            num_nodes=len(self._nodes),
            slots=node.slots,
            first_rank=node.first_rank,
            world_size=self._job.num_ranks,
            environment=self._job.environment,
            user_script=self._job.user_script,
            arguments=self._job.arguments,
            working_directory=self._job.working_directory,
            master_port=self._job.master_port if node.index == 0 else None,
            grace=[self._grace.settle_s, self._grace.terminate_s],
        )
        return node

    def _node_called(self, fields: dict[str, Any]) -> _Node | None:
        """Return the host that an agent runs on, among those nobody has come from."""
        free = [node for node in self._nodes if node.channel is None]
        for name in fields["names"]:
            for node in free:
                if node.name == name:
                    return node
        short = {str(name).partition(".")[0] for name in fields["names"]}
        alike = [node for node in free if node.name.partition(".")[0] in short]
        if len(alike) == 1:
            return alike[0]
        # Addresses or aliases in the host file: mpirun counts the agents in its order.
        ordinal = fields["ordinal"]
        if isinstance(ordinal, int) and 0 <= ordinal < len(self._nodes):
            node = self._nodes[ordinal]
            return node if node.channel is None else None
        return None

    def _hear(self, node: _Node) -> None:
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

    def _obey(self, node: _Node, message: Message) -> None:
        if message.kind == "ready":
            node.ready = message
            node.problem = self._problem_of(node, message)
        elif message.kind == "cannot":
            node.problem = message["reason"]
        elif message.kind == "wish" and self._end_by is None:
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

    def _problem_of(self, node: _Node, ready: Message) -> str | None:
        digest, devices = ready["script"], ready["devices"]
        script, folder = self._job.user_script, self._job.working_directory
        if digest is None:
            return f"there is no {script} in {folder}; the script has to be on every node"
        if digest != digest_of_file(os.path.join(folder, script)):
            return f"{script} is not the launcher's: its content differs"
        if 0 < devices <= max(node.slots):
            return f"slot {max(node.slots)} is asked for, but there are {devices} GPUs"
        return None

    def _compare_devices(self) -> None:
        having = [node.name for node in self._nodes if node.ready and node.ready["devices"] > 0]
        for node in self._nodes:
            if having and node.ready is not None and node.ready["devices"] == 0:
                node.problem = f"no GPU can be seen, unlike on {having[0]}"

    def _why_not_all_came(self, missing: list[str], connect_s: float) -> str:
        count = f"{len(missing)} of {len(self._nodes)} nodes can't take part: "
        problems = [f"{node.name}: {node.problem}" for node in self._nodes if node.problem]
        if (ended := self._starter.exit) is not None:
            why = f"no agent came, and {self._starter.program} has ended ({ended})"
        else:
            why = f"no agent came within {connect_s:.0f} s"
        text = f"{', '.join(missing)}: {why}; see above what {self._starter.program} said"
        return count + "; ".join([text, *problems])

    def _refuse(self, reason: str) -> None:
        for channel in self._channels():
            channel.send("refuse", reason=reason)

    def _address_of_rank_0(self) -> str:
        channels = [node.channel for node in self._nodes if node.channel is not None]
        address = channels[0].peer_address
        if not is_loopback(address):
            return address
        # Rank 0 runs beside us: where the other nodes reach us they reach it.
        ours = [channel.local_address for channel in channels[1:]]
        outside = [address for address in ours if not is_loopback(address)]
        return outside[0] if outside else address

    def _port(self) -> int:
        first = self._nodes[0].ready
        assert first is not None  # noqa: S101 - all are ready
        return int(first["port"])

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

    def _end_all(self, reason: str, *, but: _Node | None = None, stacks: bool = False) -> None:
        """Tell all nodes to end; ``but`` knows already."""
        if self._end_by is not None:
            return
        grace_s = self._grace.settle_s + self._grace.terminate_s
        self._end_by = time.monotonic() + grace_s + _NODES_END_S
        if len(self._nodes) > 1 or but is None:
            _say(reason)
        for node in self._nodes:
            if node is not but:
                node.tell("end", reason=reason, shows_stacks=stacks)

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        for node in self._nodes:
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

    def _lose(self, node: _Node, how: str) -> None:
        node.loss = how
        self._end_all(f"lost {node.name}: {how}; ending the other nodes", but=node)

    def _forget(self, channel: Channel) -> None:
        self._selector.unregister(channel)
        channel.flush()
        channel.close()


def _rank_end(node: _Node, fields: dict[str, Any]) -> RankEnd:
    return RankEnd.from_fields({**fields, "host": node.name})


def _listen() -> socket.socket:
    try:
        listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):
        listener = socket.create_server(("", 0))  # a machine without IPv6
    listener.setblocking(False)
    return listener


def _say(text: str) -> None:
    write_all(_STDERR, f"deepy: {text}\n".encode())
