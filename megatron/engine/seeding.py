"""Random state of a rank at the start of training."""

import hashlib
import random
from contextlib import AbstractContextManager

import numpy as np
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing

from megatron.config.topology import RankCoordinates, Topology
from megatron.engine.distributed import ProcessGroups
from megatron.engine.tensor_parallel_unit import TensorParallelUnit

__all__ = [
    "prepare_random_state",
    "rank_seed",
    "resumed_seed",
    "seed_resumed_run",
    "tensor_parallel_stream",
]


def prepare_random_state(groups: ProcessGroups, seed: int, *, partition_activations: bool) -> None:
    """Seed this rank, and tell activation checkpointing its place among the tensor ranks."""
    checkpointing.configure(TensorParallelUnit(groups), partition_activations=partition_activations)
    _seed_rank(rank_seed(seed, groups.topology, groups.place))


def tensor_parallel_stream() -> AbstractContextManager[None]:
    """Draw random numbers that differ between tensor ranks while the context is entered."""
    return checkpointing.get_cuda_rng_tracker().fork()


def rank_seed(seed: int, topology: Topology, place: RankCoordinates) -> int:
    """Return the seed of a rank: NeoX gives stages strictly inside the pipeline another one.

    Source: spec/training.md §4 (seed + 1138 + stage * tensor parallel size).
    """
    is_inner = 0 < place.pipeline_stage < topology.pipeline_parallel_size - 1
    if not is_inner:
        return seed
    return seed + 1138 + place.pipeline_stage * topology.tensor_parallel_size


def seed_resumed_run(groups: ProcessGroups, seed: int, *, step: int) -> None:
    """Seed this rank where the stored random states are another topology's (design §2, E4)."""
    _seed_rank(resumed_seed(seed, step=step, stage=groups.place.pipeline_stage))


def resumed_seed(seed: int, *, step: int, stage: int) -> int:
    """Return the 31-bit seed of a stage whose run goes on after ``step`` at another topology.

    Tensor ranks share it, as hidden dropout must be the same on all of them; their own stream is
    set apart by the tensor rank.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{stage}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _seed_rank(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # The tensor-parallel stream gets seed + 2718 + tensor rank.
    checkpointing.model_parallel_cuda_manual_seed(seed)
