"""Random state of a rank at the start of training."""

import random

import numpy as np
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing

from megatron.config.topology import RankCoordinates, Topology

__all__ = ["rank_seed", "seed_rank"]


def rank_seed(seed: int, topology: Topology, place: RankCoordinates) -> int:
    """Return the seed of a rank: NeoX gives stages strictly inside the pipeline another one.

    Source: spec/training.md §4 (seed + 1138 + stage * tensor parallel size).
    """
    is_inner = 0 < place.pipeline_stage < topology.pipeline_parallel_size - 1
    if not is_inner:
        return seed
    return seed + 1138 + place.pipeline_stage * topology.tensor_parallel_size


def seed_rank(seed: int) -> None:
    """Seed Python, NumPy, torch and the tensor-parallel dropout stream (seed + 2718 + tensor rank).

    ``checkpointing.configure`` must have been called: it tells the stream its tensor rank.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    checkpointing.model_parallel_cuda_manual_seed(seed)
