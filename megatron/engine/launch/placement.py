"""What one node runs: which ranks, on which slots, with which environment and command line."""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NodePlacement", "rank_command", "rank_environment", "usable_cores"]


@dataclass(frozen=True)
class NodePlacement:
    """The part of a job that one node runs."""

    slots: tuple[int, ...]  # local rank i runs on slots[i]
    master_port: int
    master_addr: str = "127.0.0.1"
    first_rank: int = 0  # global rank of local rank 0
    world_size: int | None = None  # ranks of the whole job; None: this node runs them all
    node_index: int = 0
    num_nodes: int = 1

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole job."""
        return len(self.slots) if self.world_size is None else self.world_size


def rank_environment(
    placement: NodePlacement, local_rank: int, environ: Mapping[str, str], cores: int
) -> dict[str, str]:
    """Return the environment of a rank: what torch, DeepSpeed and NeoX's worker side read.

    Sums in several threads depend on their number, so the thread count is fixed here unless the
    user has chosen one: the node's usable ``cores`` shared evenly by its ranks.
    """
    num_local = len(placement.slots)
    environment = dict(environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_local)))
    # A rank that dies inside C++ code still says where.
    environment.setdefault("PYTHONFAULTHANDLER", "1")
    environment.update(
        RANK=str(placement.first_rank + local_rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(placement.num_ranks),
        LOCAL_SIZE=str(num_local),
        LOCAL_WORLD_SIZE=str(num_local),
        CROSS_RANK=str(placement.node_index),
        CROSS_SIZE=str(placement.num_nodes),
        MASTER_ADDR=placement.master_addr,
        MASTER_PORT=str(placement.master_port),
        CUDA_VISIBLE_DEVICES=_visible_devices(placement.slots, environ),
    )
    if "SLURM_PROCID" in environ:
        # To SLURM the agent is the task; NeoX's worker side takes a rank's place from these.
        environment.update(
            SLURM_PROCID=environment["RANK"],
            SLURM_LOCALID=environment["LOCAL_RANK"],
            SLURM_NTASKS=environment["WORLD_SIZE"],
        )
    return environment


def rank_command(user_script: str, arguments: tuple[str, ...], local_rank: int) -> list[str]:
    """Return the command line of a rank, in the order DeepSpeed's launcher gives."""
    return [sys.executable, "-u", user_script, f"--local_rank={local_rank}", *arguments]


def usable_cores() -> int:
    """Return how many cores this process may keep busy: its affinity and its cgroup's quota."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, math.ceil(min(cores, quota)))


def _visible_devices(slots: tuple[int, ...], environ: Mapping[str, str]) -> str:
    # Slot numbers count within the devices the user (or SLURM) has left visible.
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if max(slots) < len(visible) and all(visible):
        return ",".join(visible[slot] for slot in slots)
    return ",".join(map(str, slots))


def _cgroup_quota(membership: Path, root: Path) -> float:
    """Return the smallest CPU limit of a cgroup (version 2) and its ancestors, in cores."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return math.inf
    quota = math.inf
    for line in lines:
        if not line.startswith("0::/"):
            continue
        group = root / line.removeprefix("0::/")
        for folder in (group, *group.parents):
            try:
                limit, period = (folder / "cpu.max").read_text().split()
            except (OSError, ValueError):
                continue
            if limit != "max":
                quota = min(quota, int(limit) / int(period))
    return quota
