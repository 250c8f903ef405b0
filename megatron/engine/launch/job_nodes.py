"""A job on several nodes, and what the launcher knows of each of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.engine.launch.addresses import is_loopback
from megatron.engine.launch.job_channel import Channel, Message

__all__ = ["Job", "JobNode", "nodes_of", "rendezvous_of"]


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


@dataclass
class JobNode:
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
        """Tell its agent something, if there is one."""
        if self.channel is not None:
            self.channel.send(kind, **fields)

    @property
    def has_answered(self) -> bool:
        """Whether it is known if it can take part."""
        return self.ready is not None or self.problem is not None

    @property
    def is_running(self) -> bool:
        """Whether its end is still to come."""
        return self.ended is None and self.loss is None


def nodes_of(job: Job) -> list[JobNode]:
    """Return the nodes of a job, of which nothing is known yet."""
    nodes = []
    first_rank = 0
    for index, (name, slots) in enumerate(job.hosts.items()):
        nodes.append(JobNode(index, name, slots, first_rank))
        first_rank += len(slots)
    return nodes


def rendezvous_of(job: Job, nodes: Sequence[JobNode]) -> tuple[str, int]:
    """Return address and port where the ranks meet. All nodes are ready."""
    first = nodes[0].ready
    assert first is not None  # noqa: S101 - the caller has seen to it
    return job.master_addr or _address_of_rank_0(nodes), int(first["port"])


def _address_of_rank_0(nodes: Sequence[JobNode]) -> str:
    channels = [node.channel for node in nodes if node.channel is not None]
    address = channels[0].peer_address
    if not is_loopback(address):
        return address
    # Rank 0 runs beside us: where the other nodes reach us they reach it.
    ours = [channel.local_address for channel in channels[1:]]
    outside = [address for address in ours if not is_loopback(address)]
    return outside[0] if outside else address
