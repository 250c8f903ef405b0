"""torch.distributed through DeepSpeed, and the process groups one rank belongs to."""

import datetime
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

from megatron.base.errors import LaunchError
from megatron.config.topology import RankCoordinates, Topology

__all__ = ["ProcessGroups", "RankEnvironment", "connect", "rank_environment"]

_SMALL_OBJECT = 1024  # bytes; digests of ten steps are a third of it
_LENGTH_BYTES = 4
_CONTROL_TIMEOUT = datetime.timedelta(hours=6)
"""In decisions, ranks wait for the disk of one of them: index maps, every byte of a checkpoint.
That a rank hangs is found sooner, by the watchdog."""


@dataclass(frozen=True)
class RankEnvironment:
    """What the launcher told this process."""

    rank: int
    local_rank: int
    world_size: int
    init_method: str = "env://"  # tests use a file store, so that no port is needed


def rank_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment:
    """Read the launcher's variables; a process started without one is a world of its own.

    Raises:
        LaunchError: some of the variables are set and others are not.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    present = [name for name in names if name in environ]
    if not present:
        return RankEnvironment(rank=0, local_rank=0, world_size=1)
    if len(present) != len(names):
        missing = sorted(set(names) - set(present))
        raise LaunchError(
            f"the environment has {present} but not {missing}; start training with "
            "`python deepy.py train.py CONFIG.yml`, which sets all of them"
        )
    return RankEnvironment(
        rank=int(environ["RANK"]),
        local_rank=int(environ["LOCAL_RANK"]),
        world_size=int(environ["WORLD_SIZE"]),
    )


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of this rank. ``grid`` is DeepSpeed's view of the same ranks."""

    topology: Topology
    place: RankCoordinates
    rank: int
    local_rank: int  # this rank's number on its node
    device: torch.device
    grid: PipelineParallelGrid
    control: Any  # every rank, on the CPU: for decisions, not for tensors of the model

    @property
    def tensor(self) -> Any:
        """Ranks that share one pipeline stage and one data-parallel rank."""
        return self.grid.get_slice_parallel_group()

    @property
    def tensor_source(self) -> int:
        """Global rank of tensor rank 0 beside this rank: the one that reads data."""
        return self.topology.rank(
            RankCoordinates(self.place.pipeline_stage, self.place.data_parallel_rank, 0)
        )

    @property
    def data(self) -> Any:
        """Ranks that hold the same parameters."""
        return self.grid.get_data_parallel_group()

    @property
    def model(self) -> Any:
        """Ranks that together hold one copy of the model: all stages and tensor ranks."""
        return self.grid.get_model_parallel_group()

    @property
    def store(self) -> Any:
        """torch.distributed's store: what one rank writes, every rank can read."""
        return torch.distributed.distributed_c10d._get_default_store()

    def barrier(self) -> None:
        """Wait for every rank."""
        torch.distributed.barrier(group=self.control)

    def gather(self, value: Any) -> list[Any]:
        """Return ``value`` of every rank, in rank order, on every rank."""
        size = self.topology.world_size
        if size == 1:
            return [value]
        pickled = pickle.dumps(value)
        # One collective where torch's all_gather_object needs two, the first for the lengths.
        mine = torch.zeros(_SMALL_OBJECT, dtype=torch.uint8)
        head = len(pickled).to_bytes(_LENGTH_BYTES, "little") + pickled
        if len(head) <= _SMALL_OBJECT:
            mine[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        else:
            mine[:_LENGTH_BYTES] = 0xFF
        gathered = torch.empty(size * _SMALL_OBJECT, dtype=torch.uint8)
        torch.distributed.all_gather_into_tensor(gathered, mine, group=self.control)
        rows = gathered.numpy().reshape(size, _SMALL_OBJECT)
        if (rows[:, :_LENGTH_BYTES] == 0xFF).all(axis=1).any():
            values: list[Any] = [None] * size
            torch.distributed.all_gather_object(values, value, group=self.control)
            return values
        return [pickle.loads(row[_LENGTH_BYTES:].tobytes()) for row in rows]

    def from_rank_0(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


def connect(
    environment: RankEnvironment, topology: Topology, *, backend: str, timeout_minutes: float = 10.0
) -> ProcessGroups:
    """Initialise torch.distributed and build the groups of ``topology``.

    Raises:
        LaunchError: the number of processes is not the topology's.
    """
    if environment.world_size != topology.world_size:
        raise LaunchError(
            f"{environment.world_size} processes were started, but the configuration needs "
            f"{topology.world_size}: pipeline {topology.pipeline_parallel_size} x data "
            f"{topology.data_parallel_size} x tensor {topology.tensor_parallel_size}"
        )
    # DeepSpeed calls collectives by names that torch is about to retire; users can't change that.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+. is deprecated", FutureWarning)
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        # DeepSpeed would compile a shared-memory collective that training never uses:
        # 94-177 s at the first start on a machine, measured (platform facts, §3).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(environment.local_rank)
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else backend,
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(minutes=timeout_minutes),
        init_method=environment.init_method,
        rank=environment.rank,
        world_size=environment.world_size,
    )
    grid = PipelineParallelGrid(
        topology=PipeModelDataParallelTopology(
            num_pp=topology.pipeline_parallel_size,
            num_mp=topology.tensor_parallel_size,
            num_dp=topology.data_parallel_size,
        )
    )
    return ProcessGroups(
        topology=topology,
        place=topology.coordinates(environment.rank),
        rank=environment.rank,
        local_rank=environment.local_rank,
        device=torch.device(accelerator.device_name(environment.local_rank)),
        grid=grid,
        control=torch.distributed.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT),
    )
