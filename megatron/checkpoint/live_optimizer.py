"""Where the live optimizer keeps each parameter's fp32 master, whatever DeepSpeed wrapped it in.

ZeRO 1 and 2, bf16    one flat vector per group, of which each data-parallel rank has a part
fp16, fused           one flat vector per group
fp16, unfused         a tensor per parameter
plain                 the parameters themselves
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn

__all__ = ["Fragment", "Master", "live_masters"]


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of one parameter inside a tensor of the optimizer."""

    parameter: nn.Parameter  # of the module
    start: int  # the first element, counted in the parameter
    offset: int  # the first element, counted in the optimizer's tensor
    size: int


@dataclass(frozen=True)
class Master:
    """A tensor that the optimizer updates on this rank."""

    tensor: torch.Tensor
    fragments: tuple[Fragment, ...]  # elements outside of them are padding


def live_masters(engine: Any) -> list[list[Master]]:
    """Return this rank's masters, by parameter group and in the optimizer's order."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "round_robin_bit16_groups"):
        groups = optimizer.round_robin_bit16_groups
        offsets = optimizer.round_robin_bit16_offsets
        vectors = optimizer.single_partition_of_fp32_groups
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        groups, vectors = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
        offsets = map(_offsets, groups)
    elif hasattr(optimizer, "fp32_groups_flat"):
        groups, vectors = optimizer.fp16_groups, optimizer.fp32_groups_flat
        offsets = map(_offsets, groups)
    else:
        return list(_unflattened(optimizer))
    begins = itertools.repeat(0)
    if hasattr(optimizer, "real_dp_process_group"):
        ranks = [torch.distributed.get_rank(group) for group in optimizer.real_dp_process_group]
        begins = (rank * vector.numel() for rank, vector in zip(ranks, vectors, strict=True))
    return [
        [Master(vector, tuple(_fragments(parameters, places, begin, vector.numel())))]
        for parameters, places, vector, begin in zip(groups, offsets, vectors, begins, strict=False)
    ]


def _unflattened(optimizer: Any) -> Iterator[list[Master]]:
    if hasattr(optimizer, "fp32_groups"):
        pairs = list(zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True))
    else:
        pairs = [(group["params"], group["params"]) for group in optimizer.param_groups]
    for parameters, masters in pairs:
        yield [
            Master(master, (Fragment(parameter, 0, 0, parameter.numel()),))
            for parameter, master in zip(parameters, masters, strict=True)
        ]


def _fragments(
    parameters: Sequence[nn.Parameter], offsets: Sequence[int], begin: int, length: int
) -> Iterator[Fragment]:
    """Yield what of the parameters lies in the ``length`` elements from ``begin`` on."""
    for parameter, offset in zip(parameters, offsets, strict=True):
        first = max(offset, begin)
        last = min(offset + parameter.numel(), begin + length)
        if first < last:
            yield Fragment(parameter, first - offset, first - begin, last - first)


def _offsets(parameters: Sequence[nn.Parameter]) -> list[int]:
    sizes = [parameter.numel() for parameter in parameters]
    return list(itertools.accumulate(sizes, initial=0))[:-1]
