"""Lets the agents of a job in, and finds out whether their nodes can take part."""

import hmac
import os
import selectors
import socket
import time
from collections.abc import Sequence
from typing import Any

from megatron.engine.launch.agent import GraceTimes
from megatron.engine.launch.job_channel import PROTOCOL, Channel, Message
from megatron.engine.launch.job_nodes import Job, JobNode
from megatron.engine.launch.output import write_all
from megatron.engine.launch.software import differences, digest_of_file, installed_software

__all__ = ["Muster", "listen"]

_STDERR = 2
_ATTEMPTS = 3  # to find the same software on a node


class Muster:
    """The door: who comes through it, and what is wrong with whom."""

    def __init__(
        self,
        job: Job,
        nodes: Sequence[JobNode],
        grace: GraceTimes,
        listener: socket.socket,
        selector: selectors.BaseSelector,
    ) -> None:
        self._job = job
        self._nodes = nodes
        self._grace = grace
        self._listener = listener
        self._selector = selector
        self._software = installed_software()
        self.strangers: list[Channel] = []  # connections that haven't said yet who they are
        selector.register(listener, selectors.EVENT_READ)

    def let_in(self) -> None:
        """Give every new agent its place, and send away who isn't one."""
        self._let_strangers_in()
        for channel in list(self.strangers):
            self._hear_stranger(channel)

    def hear(self, node: JobNode, message: Message) -> None:
        """Take in whether a node is ready."""
        if message.kind == "ready":
            node.ready = message
            node.problem = self._problem_of(node, message)
        elif message.kind == "cannot":
            node.problem = message["reason"]

    @property
    def problems(self) -> list[str]:
        """Why nodes can't take part, of those that have answered."""
        having = [node.name for node in self._nodes if node.ready and node.ready["devices"] > 0]
        for node in self._nodes:
            if having and node.ready is not None and node.ready["devices"] == 0:
                node.problem = f"no GPU can be seen, unlike on {having[0]}"
        return [f"{node.name}: {node.problem}" for node in self._nodes if node.problem]

    def _let_strangers_in(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            channel = Channel(connection)
            self._selector.register(channel, selectors.EVENT_READ)
            self.strangers.append(channel)

    def _hear_stranger(self, channel: Channel) -> None:
        messages = channel.receive()
        if not messages and not channel.is_broken:
            return
        if not messages or not self._is_ours(messages[0], channel):
            self.strangers.remove(channel)
            self._send_away(channel)
            return
        hello = messages[0].fields
        if self._has_other_software(hello) and hello["attempt"] < _ATTEMPTS:
            channel.send("again")  # unless somebody is just editing our code, it stays different
            return
        self.strangers.remove(channel)
        if self._admit(hello, channel) is None:
            self._send_away(channel)

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

    def _admit(self, fields: dict[str, Any], channel: Channel) -> JobNode | None:
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

    def _node_called(self, fields: dict[str, Any]) -> JobNode | None:
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

    def _problem_of(self, node: JobNode, ready: Message) -> str | None:
        digest, devices = ready["script"], ready["devices"]
        script, folder = self._job.user_script, self._job.working_directory
        if digest is None:
            return f"there is no {script} in {folder}; the script has to be on every node"
        if digest != digest_of_file(os.path.join(folder, script)):
            return f"{script} is not the launcher's: its content differs"
        if 0 < devices <= max(node.slots):
            return f"slot {max(node.slots)} is asked for, but there are {devices} GPUs"
        return None

    def _send_away(self, channel: Channel) -> None:
        self._selector.unregister(channel)
        channel.flush()
        channel.close()


def listen() -> socket.socket:
    """Return a socket that agents can connect to, at a free port."""
    try:
        listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):
        listener = socket.create_server(("", 0))  # a machine without IPv6
    listener.setblocking(False)
    return listener


def _say(text: str) -> None:
    write_all(_STDERR, f"deepy: {text}\n".encode())
